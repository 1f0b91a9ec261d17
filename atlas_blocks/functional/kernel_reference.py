"""Exact phi* token by token on a growing list of coefficients: slow, obvious, the tests' oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.functional.kernel_walk import FLOOR
from atlas_blocks.functional.rule import write_mass


def kernel_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor | None = None,
    eta: Tensor | None = None,
    gamma: Tensor | None = None,
    objective: str = "dot",
    scale: float | None = None,
    normalise: bool = True,
    chunk_size: int = 64,
    write_discount: bool = False,
) -> Tensor:
    """y of `kernel_attention` for a fresh sequence, T >= 1, computed as its definition reads."""
    ones = torch.ones_like(q[..., 0])
    alpha, eta = ones if alpha is None else alpha, ones if eta is None else eta
    gamma = ones[..., None] if gamma is None else gamma
    sharpness = q.shape[-1] ** -0.5 if scale is None else scale
    v = torch.cat([v, ones[..., None]], -1)  # the last column is z's rule, on values of 1

    def kernel(keys: Tensor, x: Tensor) -> Tensor:
        """[B, S, H, D], [B, H, D] -> [B, S, H, 1]."""
        return torch.exp(sharpness * (keys * x[:, None]).sum(-1, keepdim=True))

    outputs = []
    rows = v[:, :0]  # a_i of the keys so far
    sizes = v[:, :0, :, :1]  # the same rule on |1 - z(k_i)|
    masses = eta[:, :0]
    for t in range(q.shape[1]):
        place = t % chunk_size
        if place == 0:
            start = rows
        strength = eta[:, t]
        lags = [j for j in range(gamma.shape[-1]) if j <= t]
        if write_discount:
            mass = write_mass(eta[:, t], None, gamma[:, t, :, : len(lags)])
            similar = kernel(k[:, t - place : t], k[:, t])[..., 0] * masses[:, t - place : t]
            own = kernel(k[:, t : t + 1], k[:, t])[:, 0, :, 0]
            strength = strength * torch.exp(-similar.sum(1)) / (mass * own).clamp(min=1)
            masses = torch.cat([masses, mass[:, None]], 1)
        # Decay, with a place for the token's own key; then the window's writes.
        rows = F.pad(alpha[:, t, None, :, None] * rows, (0, 0, 0, 0, 0, 1))
        sizes = F.pad(alpha[:, t, None, :, None] * sizes, (0, 0, 0, 0, 0, 1))
        for j in lags:
            i = t - j
            u = v[:, i]
            if objective == "l2":
                u = u - (kernel(k[:, : start.shape[1]], k[:, i]) * start).sum(1)
            here = (torch.arange(t + 1) == i)[:, None, None]
            weight = here * (strength * gamma[:, t, :, j])[:, None, :, None]
            rows = rows + weight * u[:, None]
            sizes = sizes + weight * u[:, None, :, -1:].abs()
        near = kernel(k[:, : t + 1], q[:, t])
        read, p = (near * rows).sum(1), (near * sizes).sum(1)
        y, z = read[..., :-1], read[..., -1:]
        if normalise:
            below = torch.maximum(z, FLOOR * p)
            y = torch.where(below > 0, y / torch.where(below > 0, below, 1.0), 0.0)
        outputs.append(y)
    return torch.stack(outputs, 1)
