"""Exact phi* token by token on a growing list of coefficients: slow, obvious, the tests' oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.kernel_attention.walk import FLOOR


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
    errors: str = "chunk",
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

    def own(i: int) -> Tensor:
        """kappa(i, i) [B, H, 1]."""
        return kernel(k[:, i : i + 1], k[:, i])[:, 0]

    def to_come(i: int, j: int) -> Tensor:
        """m_i(j), what key i's gates foretell of the windows from the j-th on [B, H, 1]."""
        return (eta[:, i] * gamma[:, i, :, j:].sum(-1))[..., None]

    online = objective == "l2" and errors == "online"
    outputs = []
    rows = v[:, :0]  # a_i of the keys so far
    sizes = v[:, :0, :, :1]  # the same rule on |1 - z(k_i)|
    window = gamma.shape[-1]
    u: dict[int, Tensor] = {}  # v_i - M(k_i) of the keys that the chunk sees, as it sees them

    def error(t: int, i: int) -> Tensor:
        """v_i - M(k_i), M the memory at the chunk's start or, online, the one before token t, with
        what windows begun will still write of earlier keys; for "dot" v_i.
        """
        if objective == "dot":
            return v[:, i]
        at = rows if online else start
        found = v[:, i] - (kernel(k[:, : at.shape[1]], k[:, i]) * at).sum(1)
        for s in range(max(0, t - window + 1), i) if online else ():
            pend = to_come(s, t - s) / (to_come(s, 0) * own(s)).clamp(min=1)
            found = found - pend * kernel(k[:, s : s + 1], k[:, i])[:, 0] * u[s]
        return found

    for t in range(q.shape[1]):
        lags = [j for j in range(window) if j <= t]
        if t % chunk_size == 0:
            start, u = rows, {}
            for i in range(max(0, t - window + 1), t):
                u[i] = error(t, i)
        u[t] = error(t, t)
        strength = eta[:, t]
        if online:
            scales = [torch.where(gamma[:, t, :, j] > 0, own(t - j)[..., 0], 0.0) for j in lags]
            limit = to_come(t, 0)[..., 0] * torch.stack(scales).amax(0)
            strength = strength / limit.clamp(min=1)
        # Decay, with a place for the token's own key; then the window's writes.
        rows = F.pad(alpha[:, t, None, :, None] * rows, (0, 0, 0, 0, 0, 1))
        sizes = F.pad(alpha[:, t, None, :, None] * sizes, (0, 0, 0, 0, 0, 1))
        for j in lags:
            i = t - j
            here = (torch.arange(t + 1) == i)[:, None, None]
            weight = here * (strength * gamma[:, t, :, j])[:, None, :, None]
            rows = rows + weight * u[i][:, None]
            sizes = sizes + weight * u[i][:, None, :, -1:].abs()
        near = kernel(k[:, : t + 1], q[:, t])
        read, p = (near * rows).sum(1), (near * sizes).sum(1)
        y, z = read[..., :-1], read[..., -1:]
        if normalise:
            below = torch.maximum(z, FLOOR * p)
            y = torch.where(below > 0, y / torch.where(below > 0, below, 1.0), 0.0)
        outputs.append(y)
    return torch.stack(outputs, 1)
