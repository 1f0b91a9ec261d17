"""The contract of every block: `y, state = block(x, state=None)`.

B batch, T tokens, N packed documents.
"""

from __future__ import annotations

import abc
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.padding import Padding, checked_mask, run_padded
from atlas_blocks.blocks.settings import changed
from atlas_blocks.blocks.sharded import distributed, of_parameters, together
from atlas_blocks.config import Config
from atlas_blocks.documents.definition import check_packed, document_of
from atlas_blocks.documents.op import checked_bounds
from atlas_blocks.state import State


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed x lie, checked once for all blocks that it goes through."""

    cu_seqlens: Tensor  # int64 [N + 1] on the CPU
    bounds: Tensor  # the same on the device of x
    of: Tensor  # the document of every token [T]

    @staticmethod
    def check(cu_seqlens: Tensor, x: Tensor) -> Documents:
        """Raises ValueError where cu_seqlens does not fit x [1, T, dim]: see `Block.forward`."""
        check_packed(cu_seqlens, "x", x)
        cu_seqlens = checked_bounds(cu_seqlens, x.shape[1])
        bounds = cu_seqlens.to(x.device)
        return Documents(cu_seqlens, bounds, document_of(bounds, x.shape[1]))

    @property
    def count(self) -> int:
        """N."""
        return self.cu_seqlens.shape[0] - 1


class Block(nn.Module, abc.ABC):
    """A causal sequence block whose state is an argument and a result.

    A subclass sets `self.dim` and the class of its state, and computes `mix(x, state)`; this class
    checks the input, runs packed documents apart and detaches the state. A subclass that takes
    packed documents in one call has a `mix_packed` of its own, which reads nothing on the host and
    so leaves a compiled graph whole.
    """

    dim: int
    state_type: ClassVar[type[State] | None] = None  # None: stateless

    def extra_repr(self) -> str:
        config = getattr(self, "config", None)
        parts = [str(self.dim), changed(config) if isinstance(config, Config) else ""]
        return ", ".join(part for part in parts if part)

    def tensor_plan(self) -> dict[str, tuple[int, int]] | None:
        """Which parameters ranks may hold parts of, so that the sum of what they give is y.

        name -> (axis, n): along this axis lie n groups, each of all heads (or hidden units), of
        which a rank takes its own; parameters that are not named every rank holds whole. {}: its
        parts have plans of their own. None: the block cannot be taken apart. A block that has
        heads then runs after `take_heads`.
        """
        return None

    def take_heads(self, rank: int, ranks: int) -> None:
        """Compute with this rank's heads alone, once it holds their parameters alone."""

    @abc.abstractmethod
    def mix(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x [B, T, dim], state of this block or None -> y [B, T, dim], state after token T."""

    def mix_packed(self, x: Tensor, state: Any, documents: Documents) -> tuple[Tensor, Any]:
        """x [1, T, dim] and a state of N documents -> y, their states; `mix` for each length.

        A compiled graph breaks here: it would be one for every set of lengths.
        """
        apart: Any = self._apart
        if torch.compiler.is_compiling():
            apart = torch.compiler.disable(apart)
        return apart(x, state, documents)

    def _apart(self, x: Tensor, state: Any, documents: Documents) -> tuple[Tensor, Any]:
        bounds = documents.cu_seqlens.tolist()
        starts, lengths = bounds[:-1], [b - a for a, b in pairwise(bounds)]
        # Documents of equal length share one call; each is a row of its batch.
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, length in enumerate(lengths):
            by_length[length].append(i)
        outputs: dict[int, Tensor] = {}
        states, order = [], []
        for length, docs in by_length.items():
            rows = torch.cat([x[:, starts[i] : starts[i] + length] for i in docs])
            y, after = self.mix(rows, None if state is None else state[docs])
            outputs.update(zip(docs, y.split(1), strict=True))
            states.append(after)
            order += docs
        y = torch.cat([outputs[i] for i in range(len(starts))], dim=1)
        if states[0] is None:
            return y, None
        return y, State.cat(states)[sorted(range(len(order)), key=order.__getitem__)]

    def _masked(
        self, x: Tensor, state: Any, padding: Padding, detach_state: bool
    ) -> tuple[Tensor, Any]:
        if isinstance(state, State) and (n := len(state)) != len(x) and state.tensors():
            check.fail("state", f"a batch of {len(x)} (that of x)", n)

        def call(x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
            # Not by a call of the module, whose hooks (FSDP's) have run already.
            return self.forward(x, state, cu_seqlens=cu_seqlens, detach_state=detach_state)

        return run_padded(call, x, state, padding)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        cu_seqlens: Tensor | Documents | None = None,
        mask: Tensor | None = None,
        detach_state: bool = True,
    ) -> tuple[Tensor, Any]:
        """Run the block over a sequence or a further piece of one.

        x: [B, T, dim], any T >= 0. state: what the last call returned (None: a fresh sequence);
        feeding a sequence in any split gives the same outputs and final state as one call.
        cu_seqlens: int [N + 1], document boundaries 0 = c_0 < ... < c_N = T of a packed x with
        B = 1: every document runs as if alone, and `state` (in and out) has a batch of N. Or what
        `Documents.check` made of them.
        mask: bool [B, T], True where x has a token. What is False is padding, wherever it stands:
        it is neither read, written nor counted, every row gives what it gives alone, and y is 0
        there. A compiled graph breaks at it.
        detach_state: False keeps the returned state in the autograd graph.
        Returns y [B, T, dim] and the state. Raises ValueError on a wrong shape, dtype or state.
        """
        check.tensor("x", x, "[B, T, dim]", (None, None, self.dim))
        if state is not None and (
            self.state_type is None or not isinstance(state, self.state_type)
        ):
            kind = "" if self.state_type is None else f"{self.state_type.__name__} or "
            check.fail("state", f"{kind}None", type(state).__name__)
        if state is not None and not torch.compiler.is_compiling():
            state.check()
        if mask is not None:
            if cu_seqlens is not None:
                check.fail("mask", "none beside cu_seqlens", "both")
            if checked_mask(mask, x):
                return self._masked(x, state, Padding.of(mask), detach_state)
        if state is not None:
            state = state.fitted(x)
        if cu_seqlens is not None and not isinstance(cu_seqlens, Documents):
            cu_seqlens = Documents.check(cu_seqlens, x)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.count
        # Parts without a state leave one without tensors.
        if state is not None and (n := len(state)) != rows and state.tensors():
            what = "that of x" if cu_seqlens is None else "documents in cu_seqlens"
            check.fail("state", f"a batch of {rows} ({what})", n)
        if cu_seqlens is None:
            y, state = self.mix(x, state)
        else:
            y, state = self.mix_packed(x, state, cu_seqlens)
        if x.numel() == 0 and torch.is_grad_enabled():
            y = of_parameters(self, y)
        if state is not None and detach_state:
            state = state.detach()
        elif state is not None and distributed():
            y, state = together(self, y, state)
        return y, state
