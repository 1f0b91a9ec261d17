"""The normalisations of every block, none of them in less than float32.

Each has the derivative of its formula, but for a row that is exactly zero, as padding may be: there
it is 1 (times the scale), not 1 / sqrt(eps), which norms in series would multiply to 3e27 in four
blocks. No other row comes near that: what a norm leaves small has been smaller by that factor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """In float32 at least, as the dtype of the scale is."""
    wide = _wide(scale.dtype)
    x = x.to(wide)
    # A zero stays one under any factor, and only its gradient sees it.
    x = x * torch.where(x.any(-1, keepdim=True), 1.0, eps**0.5).to(wide)
    return F.rms_norm(x, (x.shape[-1],), scale.to(wide), eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with one eps for all dtypes; y has the dtype of the weight, so that under
    autocast it is float32."""

    def __init__(self, dim: int, eps: float = 2.0**-23) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return _rms_norm(x, self.weight, self.eps).to(self.weight.dtype)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm of the last axis with a learned scale [D], in the dtype of x."""
    return _rms_norm(x, scale, 1e-6).to(x.dtype)


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last axis, in the dtype of x.

    In float32 at least: 1e-6 is lost in float16. Zeros stay zeros.
    """
    wide = x.to(_wide(x.dtype))
    square = wide.square().sum(-1, keepdim=True)
    return (wide * torch.where(square == 0, 1.0, torch.rsqrt(square + 1e-6))).to(x.dtype)
