"""Gates: a number in (0, top) for every token and head, learned of it or always the same.

B batch, T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks.blocks.parameters import Linear, fill


class GateLogits(nn.Module):
    """h [..., rank] -> logits [..., width], `start` whatever h is before training.

    No nn.Linear: what initialises every Linear of a model would move where a gate starts.
    """

    def __init__(self, rank: int, start: list[float]) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(len(start), rank))
        self.bias = nn.Parameter(torch.empty(len(start)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        fill(self.bias, self.start)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight, self.bias)


class Gate(nn.Sequential):
    """x [B, T, dim] -> top * sigmoid(W_2 W_1 x + bias) [B, T, width], `init` before training."""

    def __init__(self, dim: int, rank: int, init: list[float], top: float = 1.0) -> None:
        start = [math.log(y / (top - y)) for y in init]
        super().__init__(Linear(dim, rank, bias=False), GateLogits(rank, start))
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        # Decays need float32 whatever autocast makes of the Linears.
        logits = super().forward(x)
        return self.top * torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


class FixedGate(nn.Module):
    """x [B, T, dim] -> the same constants for every token [B, T, width]."""

    row: Tensor

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values
        # What is always made anew from `values` needs no place in a checkpoint.
        self.register_buffer("row", torch.empty(len(values)), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Half precision would lose 1 - alpha.
        dtype = torch.promote_types(self.row.dtype, torch.float32)
        self.row = torch.tensor(self.values, dtype=dtype, device=self.row.device)

    def _apply(self, fn: Any, recurse: bool = True) -> FixedGate:
        super()._apply(fn, recurse)
        self.reset_parameters()
        return self

    def forward(self, x: Tensor) -> Tensor:
        row = self.row.to(torch.promote_types(x.dtype, torch.float32))
        return row.expand(*x.shape[:-1], -1)
