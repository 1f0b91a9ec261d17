"""The segments of `MemoryAsContext` as one node of a compiled graph, forward and backward.

A segment reads the memory that the one before it wrote, so the segments are a loop, which tracing
would unroll; and where a segment begins depends on the state's position, which is data. The block
itself says what a segment computes (`define`). The backward takes segments in reverse and computes
each again from the memory at its start: only one segment's intermediates exist at a time.

B batch, T tokens, N segments that a call touches at most.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from atlas_blocks.functional.groups import chunk_count
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.ops import providers
from atlas_blocks.ops.contract import LIBRARY, distinct, implement, own, own_empty, recording

# block: what `define`'s function builds it from. autocast: its dtype where it is on. provider: of
# `use_provider`, for the ops inside.
# -> y, the state's tensors and, with `save`, what the backward takes as `saved`: the memory's state
# before every segment, each of its tensors [B, N, ...].
LIBRARY.define(
    "memory_as_context(Tensor x, Tensor[] parameters, Tensor[] buffers, Tensor[] state, str block,"
    " ScalarType? autocast, str provider, bool save) -> Tensor[]"
)
# grads: of y and of the state's floating tensors. -> those of x, parameters, floating state.
LIBRARY.define(
    "memory_as_context_backward(Tensor[] grads, Tensor x, Tensor[] parameters, Tensor[] buffers,"
    " Tensor[] state, Tensor[] saved, str block, ScalarType? autocast, str provider) -> Tensor[]"
)

# What the segments use of the block; the rest of it stays in the graph.
PARTS = (
    "attention_norm",
    "attention_out",
    "memory",
    "memory_norm",
    "persistent",
    "qkv",
    "recall_query",
)
_build: list[Callable[[str], Any]] = []


def define(build: Callable[[str], Any]) -> None:
    """`build(text)` makes the MemoryAsContext whose `description` is `text`."""
    _build[:] = [build]


def memory_as_context(block: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """All segments of a call as one node: normed x [B, T, dim] and a ContextState -> y, state."""
    parameters, buffers = tensors_of(block)
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    before = state.tensors()
    common = (block.description, autocast, providers.context())
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters, *before)):
        sizes = (len(parameters), len(buffers))
        tensors = distinct([x, *parameters, *buffers, *before])
        y, *after = _MemoryAsContext.apply(sizes, common, *tensors)
    else:
        y, *after = torch.ops.atlas.memory_as_context.default(
            x, parameters, buffers, before, *common, False
        )
    return y, _like(state, after)


def tensors_of(block: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and the buffers of the parts that the segments use."""

    def used(named: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        return [t for name, t in named if name.split(".")[0] in PARTS]

    return used(block.named_parameters()), used(block.named_buffers())


def _like(state: Any, tensors: Sequence[Tensor]) -> Any:
    """A state of the same structure with these tensors."""
    parts = iter(tensors)
    return state.map(lambda _: next(parts))


class _MemoryAsContext(torch.autograd.Function):
    """Both directions are ops."""

    @staticmethod
    def forward(
        ctx: Any, sizes: tuple[int, int], common: tuple, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        x, *rest = tensors
        first, second = sizes[0], sizes[0] + sizes[1]
        parameters, buffers, state = rest[:first], rest[first:second], rest[second:]
        outputs = torch.ops.atlas.memory_as_context.default(
            x, parameters, buffers, state, *common, True
        )
        results = 1 + len(state)
        ctx.sizes, ctx.common, ctx.inputs = sizes, common, len(tensors)
        ctx.save_for_backward(*tensors, *outputs[results:])
        positions = [t for t in outputs[:results] if not t.is_floating_point()]
        ctx.mark_non_differentiable(*positions)
        ctx.floating = [t.is_floating_point() for t in outputs[:results]]
        return tuple(outputs[:results])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, saved = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        x, *rest = tensors
        first, second = ctx.sizes[0], ctx.sizes[0] + ctx.sizes[1]
        parameters, buffers, state = rest[:first], rest[first:second], rest[second:]
        wanted = [g for g, floating in zip(grads, ctx.floating, strict=True) if floating]
        found = torch.ops.atlas.memory_as_context_backward.default(
            wanted, x, parameters, buffers, state, list(saved), *ctx.common
        )
        grad_x, of_parameters, of_state = found[0], found[1 : 1 + first], iter(found[1 + first :])
        states = [next(of_state) if t.is_floating_point() else None for t in state]
        return None, None, grad_x, *of_parameters, *(None for _ in buffers), *states


# --- the ops ----------------------------------------------------------------------------------


class _Body(nn.Module):
    """A block without storage, run with other tensors in place of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(self.block, *arguments)


@functools.lru_cache(maxsize=64)
def _body(description: str, thread: int) -> tuple[_Body, list[str], list[str]]:
    """The body and the names of its parameters and buffers; one of each thread's own, since its
    tensors are exchanged while it runs."""
    with torch.device("meta"):
        block = _build[0](description)

    def names(named: Iterable[tuple[str, Tensor]]) -> list[str]:
        return [f"block.{name}" for name, _ in named if name.split(".")[0] in PARTS]

    return _Body(block), names(block.named_parameters()), names(block.named_buffers())


@functools.lru_cache(maxsize=64)
def _template(description: str) -> Any:
    """A ContextState of the block's structure."""
    with torch.device("meta"):
        block = _build[0](description)
        return block.initial_state(torch.empty(1, 0, block.dim))


def _with(
    description: str,
    autocast: torch.dtype | None,
    provider: str,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    work: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """work(block, *arguments) with these tensors in the block."""
    body, names, buffer_names = _body(description, threading.get_ident())
    tensors = dict(zip(names + buffer_names, [*parameters, *buffers], strict=True))
    device = parameters[0].device.type
    with (
        providers.use_provider(provider),
        torch.autocast(device, autocast, enabled=autocast is not None),
    ):
        return torch.func.functional_call(body, tensors, (work, *arguments))


def _groups(state: Any) -> list[list[int]]:
    """Rows at one position of their sequence."""
    groups: dict[int, list[int]] = {}
    for row, position in enumerate(state.position.tolist()):
        groups.setdefault(position, []).append(row)
    return list(groups.values())


def _forward(
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    state: list[Tensor],
    description: str,
    autocast: torch.dtype | None,
    provider: str,
    save: bool,
) -> list[Tensor]:
    before = _like(_template(description), state)
    groups = _groups(before)
    if x.shape[0] == 0 or x.shape[1] == 0:
        groups = []
    saved: list[Tensor] = []

    def work(block: Any) -> tuple[Tensor, Any]:
        if save:
            count = chunk_count(x.shape[1], block.config.segment, True)
            memory = before.memory.tensors()
            saved.extend(t.new_zeros(t.shape[0], count, *t.shape[1:]) for t in memory)
        if not groups:
            return torch.zeros_like(x), before
        parts = []
        for rows in groups:
            kept: list[Any] = []
            parts.append(block.segments(x[rows], before[rows], kept))
            for n, memory in enumerate(kept if save else ()):
                for out, t in zip(saved, memory.tensors(), strict=True):
                    out[rows, n] = t.to(out.dtype)
        order = [row for rows in groups for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        whole = type(before).cat([s for _, s in parts])[back]
        return torch.cat([y for y, _ in parts])[back], whole

    with torch.no_grad():
        y, after = _with(description, autocast, provider, parameters, buffers, work)
        return [*(own(t) for t in (y, *after.tensors())), *saved]


def _backward(
    grads: list[Tensor],
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    state: list[Tensor],
    saved: list[Tensor],
    description: str,
    autocast: torch.dtype | None,
    provider: str,
) -> list[Tensor]:
    before = _like(_template(description), state)
    leaves = [p.detach().requires_grad_() for p in parameters]
    grad_y, *grad_after = grads
    grad_x, of_parameters = torch.zeros_like(x), [torch.zeros_like(p) for p in parameters]
    of_state = [torch.zeros_like(t) for t in state if t.is_floating_point()]
    if x.shape[0] == 0 or x.shape[1] == 0:
        return [grad_x, *of_parameters, *(own(g) for g in grad_after)]

    def work(block: Any) -> None:
        for rows in _groups(before):
            start, after = before[rows], [g[rows] for g in grad_after]
            pieces = block.pieces(x.shape[1], int(start.position[0]))
            for n, (first, span, offset) in reversed(list(enumerate(pieces))):
                here = start if n == 0 else _at_segment(start, first, [t[rows, n] for t in saved])
                here = here.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
                part = x[rows, first : first + span].detach().requires_grad_()
                y, end = block.piece(part, here, offset)
                ends = [t for t in end.tensors() if t.is_floating_point()]
                pairs = [(y, grad_y[rows, first : first + span]), *zip(ends, after, strict=True)]
                pairs = [(t, g.to(t.dtype)) for t, g in pairs if t.requires_grad]
                floats = [t for t in here.tensors() if t.is_floating_point()]
                with torch.autocast(x.device.type, enabled=False):  # as a backward is run
                    found = torch.autograd.grad(
                        [t for t, _ in pairs],
                        [part, *leaves, *floats],
                        [g for _, g in pairs],
                        materialize_grads=True,
                    )
                grad_x[rows, first : first + span] = found[0]
                for total, g in zip(of_parameters, found[1 : 1 + len(leaves)], strict=True):
                    total += g
                after = list(found[1 + len(leaves) :])
            for out, g in zip(of_state, after, strict=True):
                out[rows] = g.to(out.dtype)

    with recording(), torch.enable_grad():
        _with(description, autocast, provider, leaves, buffers, work)
    return [grad_x, *of_parameters, *of_state]


def _at_segment(start: Any, first: int, saved: list[Tensor]) -> Any:
    """The state before a segment that begins `first` tokens into the call.

    It has keys and values of the call's start, at which a segment's first piece does not look.
    """
    memory = _like(start.memory, saved)
    position = start.position + first
    return type(start)(memory, memory.rule.weights, start.keys, start.values, position)


def _forward_fake(
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    state: list[Tensor],
    description: str,
    autocast: torch.dtype | None,
    provider: str,
    save: bool,
) -> list[Tensor]:
    # Read off the description: nothing can be built here, where every tensor would be fake.
    config = json.loads(description)["config"]
    reads = MEMORIES[config["memory"]["memory"]].weights
    after = [own_empty(t) for t in state]
    if x.shape[1] != 0 and x.shape[0] != 0:
        # What comes of a Linear has autocast's dtype: the convolution's tail, keys and values.
        linear = parameters[0].dtype if autocast is None else autocast
        for i in (0, -3, -2):
            after[i] = after[i].to(linear)
    saved = []
    if save:
        count = chunk_count(x.shape[1], config["segment"], True)
        memory = state[: len(state) - 3 - reads]
        saved = [t.new_empty(t.shape[0], count, *t.shape[1:]) for t in memory]
    return [own_empty(x), *after, *saved]


def _backward_fake(
    grads: list[Tensor],
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    state: list[Tensor],
    saved: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    floats = [t for t in state if t.is_floating_point()]
    return [own_empty(t) for t in (x, *parameters, *floats)]


implement("memory_as_context", _forward, _forward_fake)
implement("memory_as_context_backward", _backward, _backward_fake)
