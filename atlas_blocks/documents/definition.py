"""Packed documents: sequences laid end to end in one row, each of which runs as if alone.

N documents, T tokens of all of them, n tokens of the past. bounds: int [N + 1], rising from 0 to T:
document r has the tokens from bounds[r] to bounds[r + 1] - 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from atlas_blocks import check


def check_packed(cu_seqlens: Tensor, name: str, x: Tensor) -> None:
    """Raise ValueError where these cannot be the bounds of `x` [1, T, ...]; their values are not
    looked at, which on a GPU would have to be waited for."""
    check.tensor("cu_seqlens", cu_seqlens, "[N + 1]", (None,), (torch.int32, torch.int64))
    if x.shape[0] != 1:
        check.fail(name, "a batch of 1 with cu_seqlens", x.shape[0])


def document_bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    """The bounds as numbers. Raises ValueError where they do not rise strictly from 0 to length."""
    bounds = cu_seqlens.tolist()
    rising = all(a < b for a, b in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or not rising:
        check.fail("cu_seqlens", f"strictly rising bounds from 0 to T = {length}", bounds)
    return bounds


def document_of(bounds: Tensor, length: int) -> Tensor:
    """The document of every token [T]."""
    tokens = torch.arange(length, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds, tokens, right=True) - 1


def with_past(past: Tensor, x: Tensor, bounds: Tensor, document: Tensor) -> Tensor:
    """past [N, n, ...] and x [1, T, ...] -> [1, N n + T, ...]: before each document its past.

    document: `document_of` every token.
    """
    (count, n), length = past.shape[:2], x.shape[1]
    if n == 0:
        return x
    device = x.device
    before = bounds[:-1, None] + (torch.arange(count * n, device=device)).view(count, n)
    after = torch.arange(length, device=device) + (document + 1) * n
    place = torch.cat([before.flatten(), after])
    tokens = torch.cat([past.flatten(0, 1).to(x.dtype), x[0]])
    return torch.zeros_like(tokens).index_copy(0, place, tokens).unsqueeze(0)


def last_tokens(stream: Tensor, n: int, bounds: Tensor) -> Tensor:
    """The last n tokens of every document of a stream that `with_past` made -> [N, n, ...]."""
    count = bounds.shape[0] - 1
    index = torch.arange(count * n, device=stream.device).view(count, n)
    return stream[0, bounds[1:, None] + index]
