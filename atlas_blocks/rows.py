"""Rows of a batch by what users index with, as their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atlas_blocks import check

KINDS = "a slice, a mask of bool [B], or row numbers"


def chosen(index: Any, count: int) -> Tensor:
    """Row numbers int64 [n] of a batch of `count`: of a number, of a list or tensor of numbers
    (negative ones count from the end) or of a mask.

    Raises ValueError for anything else, and for a number outside of the batch, which on a device
    other than the CPU is not looked at.
    """
    if isinstance(index, int) and not isinstance(index, bool):
        index = [index]
    found = _as_tensor(index)
    if found.dim() != 1:
        check.fail("index", KINDS, f"shape {list(found.shape)}")
    if found.dtype == torch.bool:
        if found.shape[0] != count:
            check.fail("index", f"a mask of bool [{count}]", f"bool {list(found.shape)}")
        return found.nonzero().squeeze(1)
    if found.numel() == 0:
        return found.to(torch.int64)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.uint8:
        check.fail("index", KINDS, found.dtype)  # torch takes uint8 for a mask
    found = found.to(torch.int64)
    if found.device.type == "cpu" and type(found) is Tensor and not torch.compiler.is_compiling():
        low, high = found.min().item(), found.max().item()
        if low < -count or high >= count:
            check.fail("index", f"rows from {-count} to {count - 1}", low if low < -count else high)
    return torch.where(found < 0, found + count, found)


def _as_tensor(index: Any) -> Tensor:
    if isinstance(index, Tensor):
        return index
    if isinstance(index, bool) or not (isinstance(index, Sequence) or hasattr(index, "__array__")):
        check.fail("index", KINDS, repr(index))
    if isinstance(index, (str, tuple)):  # torch takes a tuple for several axes
        check.fail("index", KINDS, repr(index))
    try:
        return torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        check.fail("index", KINDS, repr(index))
        raise
