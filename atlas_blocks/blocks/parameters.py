"""What the blocks' parameters are made of: a Linear, and values put into a parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atlas_blocks import check


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
        if x.dtype != own and not torch.is_autocast_enabled(x.device.type):
            check.fail("x", f"dtype {own}, that of the weights, or torch.autocast", x.dtype)
        return super().forward(x)


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
