"""The normalisations of every block, none of them in less than float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with one eps for all dtypes; y has the dtype of the weight, so that under
    autocast it is float32."""

    def __init__(self, dim: int, eps: float = 2.0**-23) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(self.weight.dtype)
        y = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return y.to(self.weight.dtype)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm of the last axis with a learned scale [D], in the dtype of x."""
    wide = _wide(scale.dtype)
    return F.rms_norm(x.to(wide), (x.shape[-1],), scale.to(wide), eps=1e-6).to(x.dtype)


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last axis, in the dtype of x.

    In float32 at least: 1e-6 is lost in float16. Zeros stay zeros, with a gradient of at most 1e3.
    """
    wide = x.to(_wide(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
