"""Sequence parallelism: every rank reads a part of each crop, and goes on from the state that the
rank before it ended with.

A block's state is an argument and a result, so that pieces of a sequence give what one call gives.
Here the pieces are on different ranks: the state is sent on, block by block, and its gradient comes
back the same way. Ranks so work at different blocks at the same time.

B crops, L tokens of a crop, N pieces of documents in a part.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from atlas_blocks import State
from atlas_blocks.recipes import describe
from atlas_blocks.recipes.data.batches import Batch


def part_of(batch: Batch, length: int, rank: int, ranks: int) -> Batch:
    """A rank's part of every crop of a packed batch.

    Its `before` and `last` say which piece goes on from the rank before, in the same crop, and with
    which piece every crop ends.
    """
    assert batch.cu_seqlens is not None
    size = length // ranks
    all_bounds = batch.cu_seqlens.tolist()
    wanted, bounds, before, last = [], [0], [], []
    for crop, first in enumerate(range(rank * size, batch.tokens.shape[1], length)):
        wanted.append(torch.arange(first, first + size))
        inner = [bound for bound in all_bounds if first < bound < first + size]
        for start, stop in zip([first, *inner], [*inner, first + size], strict=True):
            bounds.append(bounds[-1] + stop - start)
            before.append(-1 if start in all_bounds else crop)
        last.append(len(before) - 1)
    columns = torch.cat(wanted).to(batch.tokens.device)
    tokens, targets = (t.index_select(1, columns) for t in (batch.tokens, batch.targets))
    return Batch(tokens, targets, *map(torch.tensor, (bounds, before, last)))


class Ring:
    """The ranks that share every crop, in order; `attach`ed blocks pass their states along it while
    a batch is `running`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.ranks = group.rank(), group.size()
        self._batch: Batch | None = None
        # What is under way, with the memory that it is sent from.
        self._sent: list[tuple[Any, Tensor]] = []

    def attach(self, block: nn.Module) -> None:
        # Within what shards the block: see `_Receive`.
        block.register_forward_pre_hook(self._enter, with_kwargs=True)
        block.register_forward_hook(self._leave)

    @contextlib.contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Forward passes are of this part of a batch."""
        self.finish()
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def finish(self) -> None:
        """Wait until all that was sent has gone."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []

    def _enter(self, block: Any, args: Any, options: dict[str, Any]) -> Any:
        batch = self._batch
        if batch is None:
            return None
        x, state = args
        if self.rank:
            # Of what begins here.
            _, fresh = block.forward(x[:, :0], detach_state=False)
            if fresh is not None:
                assert batch.before is not None
                assert batch.last is not None
                state = self._received(block, fresh, len(batch.last), x)
                state = State.cat([fresh, state])[batch.before + 1]
        return (x, state), options | {"detach_state": False}

    def _leave(self, block: Any, args: Any, result: Any) -> Any:
        batch, (y, state) = self._batch, result
        if batch is None or state is None:
            return None
        if self.rank + 1 < self.ranks:
            assert batch.last is not None
            y = self._passed_on(block, y, state[batch.last])
        return y, state.detach()

    def _passed_on(self, block: Any, y: Tensor, state: State) -> Tensor:
        floats, whole = _apart(state)
        if describe.state_grows(block.config):
            self.send(torch.tensor([n for t in state.tensors() for n in t.shape]), 1)
        if whole:
            self.send(torch.cat([t.flatten() for t in whole]), 1)
        return _Send.apply(self, _wire(state), y, *floats)

    def _received(self, block: Any, fresh: State, crops: int, x: Tensor) -> State:
        """What the rank before passed on, of a block whose state at the start is `fresh`."""
        like = fresh.tensors()
        shapes = [(crops, *t.shape[1:]) for t in like]
        if describe.state_grows(block.config):
            numbers = iter(self.receive((sum(t.ndim for t in like),), torch.int64, -1).tolist())
            shapes = [tuple(next(numbers) for _ in t.shape) for t in like]
        is_float = [t.is_floating_point() for t in like]
        whole = [s for s, f in zip(shapes, is_float, strict=True) if not f]
        positions = iter(())
        if whole:
            sizes = [math.prod(shape) for shape in whole]
            flat = self.receive((sum(sizes),), torch.int64, -1).cpu().split(sizes)
            positions = (t.view(s) for t, s in zip(flat, whole, strict=True))
        floats = [s for s, f in zip(shapes, is_float, strict=True) if f]
        # Its gradient is wanted where that of x is.
        found = iter(_Receive.apply(self, _wire(fresh), floats, x[:, :0]) if floats else ())
        return fresh.map(
            lambda t: next(found) if t.is_floating_point() else next(positions).to(t.device)
        )

    def send(self, t: Tensor, to: int) -> None:
        """To the rank after (1) or before (-1), without waiting for it."""
        t = t.to(self.device).contiguous()
        work = dist.isend(t, group=self.group, group_dst=self.rank + to)
        self._sent.append((work, t))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, of: int) -> Tensor:
        """From the rank before (-1) or after (1)."""
        found = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(found, group=self.group, group_src=self.rank + of)
        return found


def _apart(state: State) -> tuple[list[Tensor], list[Tensor]]:
    """Its tensors of floats, and its positions."""
    tensors = state.tensors()
    floats = [t for t in tensors if t.is_floating_point()]
    return floats, [t for t in tensors if not t.is_floating_point()]


def _wire(state: State) -> torch.dtype:
    """The dtype in which all of its floats are sent."""
    found = torch.float32
    for t in _apart(state)[0]:
        found = torch.promote_types(found, t.dtype)
    return found


class _Send(torch.autograd.Function):
    """y, as it is; before its gradient goes on, that of what was sent comes back."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, wire: torch.dtype, y: Tensor, *floats: Tensor) -> Tensor:
        ctx.ring, ctx.wire = ring, wire
        ctx.shapes = [t.shape for t in floats]
        ctx.dtypes = [t.dtype for t in floats]
        if floats:
            ring.send(torch.cat([t.detach().to(wire).flatten() for t in floats]), 1)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if not ctx.shapes:
            return None, None, *gradients
        sizes = [shape.numel() for shape in ctx.shapes]
        parts = ctx.ring.receive((sum(sizes),), ctx.wire, 1).split(sizes)
        whole = zip(parts, ctx.shapes, ctx.dtypes, strict=True)
        return None, None, *gradients, *(t.view(shape).to(dtype) for t, shape, dtype in whole)


class _Receive(torch.autograd.Function):
    """What the rank before sent; its gradient is sent back.

    Its input is of the block's, so that autograd goes on to the block before, and FSDP2 to other
    ranks, only when this gradient has gone.
    """

    @staticmethod
    def forward(
        ctx: Any, ring: Ring, wire: torch.dtype, shapes: list[tuple[int, ...]], anchor: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ring, ctx.wire = ring, wire
        sizes = [math.prod(shape) for shape in shapes]
        flat = ring.receive((sum(sizes),), wire, -1).split(sizes)
        ctx.anchor = anchor.shape, anchor.dtype
        # Copies: parts of one memory would be views of each other.
        return tuple(t.view(shape).clone() for t, shape in zip(flat, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ring = ctx.ring
        ring.send(torch.cat([g.to(ctx.wire).flatten() for g in gradients]), -1)
        shape, dtype = ctx.anchor
        return None, None, None, torch.zeros(shape, dtype=dtype, device=ring.device)
