"""The contract of every block: `y, state = block(x, state=None)`.

B batch, T tokens, N packed documents.
"""

from __future__ import annotations

import abc
from collections import defaultdict
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.state import State


class Block(nn.Module, abc.ABC):
    """A causal sequence block whose state is an argument and a result.

    A subclass sets `self.dim` and the class of its state, and computes `mix(x, state)`; this class
    checks the input, runs packed documents apart and detaches the state.
    """

    dim: int
    state_type: ClassVar[type[State] | None] = None  # None: stateless

    @abc.abstractmethod
    def mix(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x [B, T, dim], state of this block or None -> y [B, T, dim], state after token T."""

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        cu_seqlens: Tensor | None = None,
        detach_state: bool = True,
    ) -> tuple[Tensor, Any]:
        """Run the block over a sequence or a further piece of one.

        x: [B, T, dim], any T >= 0. state: what the last call returned (None: a fresh sequence);
        feeding a sequence in any split gives the same outputs and final state as one call.
        cu_seqlens: int [N + 1], document boundaries 0 = c_0 < ... < c_N = T of a packed x with
        B = 1: every document runs as if alone, and `state` (in and out) has a batch of N.
        detach_state: False keeps the returned state in the autograd graph.
        Returns y [B, T, dim] and the state. Raises ValueError on a wrong shape, dtype or state.
        """
        check.tensor("x", x, "[B, T, dim]", (None, None, self.dim))
        if state is not None and (
            self.state_type is None or not isinstance(state, self.state_type)
        ):
            kind = "" if self.state_type is None else f"{self.state_type.__name__} or "
            check.fail("state", f"{kind}None", type(state).__name__)
        if cu_seqlens is not None:
            y, state = self._run_packed(x, state, cu_seqlens)
        else:
            if state is not None and (n := state.tensors()[0].shape[0]) != x.shape[0]:
                check.fail("state", f"a batch of {x.shape[0]} (that of x)", n)
            y, state = self.mix(x, state)
        return y, state.detach() if detach_state and state is not None else state

    def _run_packed(self, x: Tensor, state: Any, cu_seqlens: Tensor) -> tuple[Tensor, Any]:
        bounds = document_bounds(cu_seqlens, x)
        starts, lengths = bounds[:-1], [b - a for a, b in pairwise(bounds)]
        if state is not None and (n := state.tensors()[0].shape[0]) != len(starts):
            check.fail("state", f"a batch of {len(starts)} (documents in cu_seqlens)", n)
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


def document_bounds(cu_seqlens: Tensor, x: Tensor) -> list[int]:
    """Checked document boundaries as a list. Raises ValueError where they do not fit x."""
    check.tensor("cu_seqlens", cu_seqlens, "[N + 1]", (None,), (torch.int32, torch.int64))
    bounds = cu_seqlens.tolist()
    rising = all(a < b for a, b in pairwise(bounds))
    if x.shape[0] != 1:
        check.fail("x", "a batch of 1 with cu_seqlens", x.shape[0])
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != x.shape[1] or not rising:
        check.fail("cu_seqlens", f"strictly rising bounds from 0 to T = {x.shape[1]}", bounds)
    return bounds
