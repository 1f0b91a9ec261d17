"""What the blocks' parameters are made of: a Linear, and values put into a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.autocast import autocast_dtype
from atlas_blocks.data import there
from atlas_blocks.derivatives import transformed


class Linear(nn.Linear):
    """nn.Linear that a model may tell how to start, and that names an input of another dtype.

    std: of its normal weights, with biases at zero; None: nn.Linear's own start.
    """

    std: float | None = None

    def reset_parameters(self) -> None:
        if self.std is None:
            super().reset_parameters()
            return
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError for x of another dtype than the weights', but under autocast."""
        own = self.weight.dtype
        if x.dtype != own and autocast_dtype(x) is None:
            check.fail("x", f"dtype {own}, that of the weights, or torch.autocast", x.dtype)
        return super().forward(x)


class GroupedLinear(nn.Module):
    """One Linear without bias for each of several groups of rows: weight [groups, out, in].

    std: as of Linear.
    """

    std: float | None = None

    def __init__(self, groups: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width_out, width_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.std is not None:
            nn.init.normal_(self.weight, std=self.std)
        else:
            bound = 1 / math.sqrt(self.weight.shape[2])
            nn.init.uniform_(self.weight, -bound, bound)

    def serves(self, x: Tensor) -> bool:
        """Whether `forward` computes for an x of this dtype and device: grouped_mm takes rows of
        whole 16 bytes, no float64, bfloat16 alone on a GPU, traced or for shapes, and no vmap nor
        forward mode (torch 2.13)."""
        dtype = autocast_dtype(x) or x.dtype
        floats = (torch.bfloat16, torch.float32, torch.float16)
        if x.is_cuda or torch.compiler.is_compiling() or not there(x):
            floats = (torch.bfloat16,)
        aligned = all(size * dtype.itemsize % 16 == 0 for size in self.weight.shape[1:])
        return dtype in floats and aligned and not transformed()

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [R, in], sorted by group; ends int32 [groups], where each ends -> [R, out]."""
        dtype = autocast_dtype(rows) or rows.dtype
        return F.grouped_mm(rows.to(dtype), self.weight.to(dtype).mT, offs=ends)


@torch.no_grad()
def fill(parameter: Tensor, values: Sequence[float]) -> None:
    """Put values [n] into a parameter [n], also where it is sharded over ranks."""
    row = torch.tensor(values, dtype=parameter.dtype, device=parameter.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor, Replicate

        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            everywhere = [Replicate()] * mesh.ndim
            row = DTensor.from_local(row, mesh, everywhere, run_check=False)
    parameter.copy_(row)
