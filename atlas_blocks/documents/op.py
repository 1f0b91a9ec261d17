"""The bounds of packed documents, checked: in a compiled graph a node of its own.

Tracing cannot look at them, and blocks that need no other op would run on any numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atlas_blocks.documents.definition import document_bounds
from atlas_blocks.graph.contract import LIBRARY, implement

# -> the bounds on the CPU, where to read them again costs no wait, int64.
LIBRARY.define("document_bounds(Tensor cu_seqlens, SymInt length) -> Tensor")


def checked_bounds(cu_seqlens: Tensor, length: int) -> Tensor:
    """cu_seqlens [N + 1] -> the same on the CPU. Raises ValueError, in a compiled graph when it
    runs, where they do not rise strictly from 0 to `length`."""
    return torch.ops.atlas.document_bounds.default(cu_seqlens, length)


def _document_bounds(cu_seqlens: Tensor, length: int) -> Tensor:
    return torch.tensor(document_bounds(cu_seqlens, length), device="cpu")


def _fake(cu_seqlens: Tensor, length: int) -> Tensor:
    return torch.empty(cu_seqlens.shape, dtype=torch.int64, device="cpu")


implement("document_bounds", _document_bounds, _fake)
