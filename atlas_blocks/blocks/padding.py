"""Padded batches: their tokens run as packed documents, so that padding is never seen.

B rows, T places of each, N tokens that are there in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.state import State


class Padding(NamedTuple):
    """Where the tokens of a padded batch lie, and the documents that they are.

    index: their places among all B * T [N]. cu_seqlens: the bounds of the documents among them;
    rows: those with a token, each a document unless rows are packed, and those without.
    """

    index: Tensor
    cu_seqlens: Tensor
    rows: tuple[list[int], list[int]]

    @staticmethod
    def of(real: Tensor, starts: Tensor | None = None) -> Padding:
        """Of a batch whose tokens are where `real` bool [B, T] is True, each row one document, or
        those that begin at the marks `starts` [B, T]."""
        filled = real.any(1).tolist()
        rows = [i for i, f in enumerate(filled) if f], [i for i, f in enumerate(filled) if not f]
        if starts is None:
            starts = real & (real.cumsum(1) == 1)
        cu_seqlens = torch.cat([starts[real].nonzero()[:, 0], real.sum()[None]])
        return Padding(real.flatten().nonzero()[:, 0], cu_seqlens, rows)

    def packed(self, x: Tensor) -> Tensor:
        """x [B, T, ...] -> its tokens [1, N, ...]."""
        return x.flatten(0, 1)[self.index][None]

    def padded(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """y [1, N, ...] -> [B, T, ...] where shape is (B, T), zeros where there is no token."""
        whole = y.new_zeros(shape[0] * shape[1], *y.shape[2:])
        return whole.index_copy(0, self.index, y[0]).unflatten(0, shape)


def checked_mask(mask: Tensor, x: Tensor) -> bool:
    """Whether a mask [B, T] of x [B, T, ...] leaves anything out. Raises ValueError for none."""
    check.tensor("mask", mask, "[B, T]", tuple(x.shape[:2]), (torch.bool,), x.device)
    return not bool(mask.all())


def run_padded(call: Any, x: Tensor, state: Any, padding: Padding) -> tuple[Tensor, Any]:
    """`call(x, state, cu_seqlens) -> y, state` over a batch each of whose rows is one document.

    x: [B, T, ...]. state: of B rows, or None. Returns y [B, T, ...], zeros where there is no
    token, and the state of B rows; that of a row without tokens is as it was.
    """
    some, none = padding.rows

    def of(rows: list[int]) -> Any:
        # Blocks without a state among others have one without tensors.
        return state[rows] if state is not None and state.tensors() else state

    y, parts = None, []
    if some:
        y, after = call(padding.packed(x), of(some), padding.cu_seqlens)
        parts.append(after)
    if none:
        nothing, idle = call(x[none, :0], of(none), None)
        parts.append(idle)
        y = nothing.reshape(1, 0, *nothing.shape[2:]) if y is None else y
    assert y is not None
    whole = padding.padded(y, x.shape[:2])
    if parts[0] is None or not parts[0].tensors():
        return whole, parts[0]
    order = [*some, *none]
    return whole, State.cat(parts)[sorted(range(len(order)), key=order.__getitem__)]
