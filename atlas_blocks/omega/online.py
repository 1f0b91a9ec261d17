"""Online errors: each key's error as the rule at b = 1 would have seen it (specification 9b).

All errors of a chunk are taken at M^(0), so equal or similar keys would add up their steps. Here
what the chunk has written of a key before, and what windows already begun will still write of it,
is taken off its error: a unit-triangular system per chunk, the UT transform of the delta rule
generalised to windows, momentum and deep memories.

N chunks, G = B H, L tokens of a chunk, E = c - 1 + L keys that it sees, the halo's first; c window.
Matrices are [..., key or token t, key s]. Leading axes may be left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.omega.record import Record

# A momentum decay above this counts as this in what a token will have written, to keep it finite.
MAX_THETA = 0.999


@dataclass(frozen=True)
class Chunk(Record):
    """What limits and corrects a chunk's writes once kappa is known, and needs no memory."""

    mass: Tensor  # m_i, what key i will have been written in all  [N, G, E]
    held: Tensor  # whether the window of t weighs key i  [N, G, L, E]
    weight: Tensor  # sum_j gamma[t, j]  [N, G, L]
    theta: Tensor | None  # [N, G, L]
    momentum: Tensor | None  # Theta  [N, G, L, L]
    squares: Tensor  # |phi(k_i)|^2  [N, G, E]
    gram: Tensor | None  # phi(k) . phi(k), where errors are corrected  [N, G, E, E]
    # m_s(t - s) for 1 <= t - s < c, with a window; in the halo's rows of the first own token
    pending: Tensor | None  # [N, G, E, E]
    decay: Tensor  # A  [N, G, L, L]
    abar: Tensor | None  # running product of alpha, where errors are corrected  [N, G, L, 1]


@dataclass(frozen=True)
class Correction(Record):
    """What takes the errors at M^(0) to the online ones. Halo rows of `faded` and `carried` leave
    the bare errors."""

    system: Tensor  # kappa N; below the diagonal it counts  [N, G, E, E]
    faded: Tensor  # abar before each key's token  [N, G, E, 1]
    carried: Tensor | None  # P thbar before it  [N, G, E, 1]


def masses(eta: Tensor, theta: Tensor | None, gamma: Tensor) -> Tensor:
    """m_i(j) = eta_i sum_{l >= j} gamma[i, l] / (1 - theta_i), j = 0..c-1: what windows from the
    j-th after key i on will write of it. eta, theta [..., E], gamma [..., E, c] -> [..., E, c]."""
    tails = gamma.flip(-1).cumsum(-1).flip(-1)
    strength = eta if theta is None else eta / (1 - theta.clamp(max=MAX_THETA))
    return strength.unsqueeze(-1) * tails


def pending_matrix(masses: Tensor) -> Tensor:
    """[t, s] = m_s(t - s) for 1 <= t - s < c, else 0: [..., E, c] -> [..., E, E]."""
    keys, window = masses.shape[-2:]
    later = F.pad(masses[..., 1:], (1, 0))
    # Rows one longer than the matrix, laid end to end: each starts one place further right.
    width = keys + window - 1
    rows = F.pad(later, (0, keys)).flatten(-2)[..., : keys * width]
    return rows.unflatten(-1, (keys, width))[..., :keys].mT


def window_scale(own: Tensor, x: Chunk) -> Tensor:
    """w_t = sum_j gamma[t, j] max_{i in the window of t} kappa(i, i), the most that G_t takes of a
    key's error: [..., E] -> [..., L]."""
    # By index: amax looks for its value again in the backward, where a compiler may have computed
    # it once more and rounded it otherwise.
    return x.weight * torch.where(x.held, own.unsqueeze(-2), 0.0).max(-1).values


def chunk_scale(window: Tensor, x: Chunk) -> Tensor:
    """What the chunk's own tokens bring to `running_scale`. window: w [..., L] -> [..., L]."""
    return window if x.momentum is None else (x.momentum @ window.unsqueeze(-1)).squeeze(-1)


def running_scale(in_chunk: Tensor, thbar: Tensor | None, before: Tensor) -> Tensor:
    """scale_t = theta_t scale_{t-1} + w_t, the most that S_t takes of a key's error. in_chunk:
    `chunk_scale` [..., L]; thbar: [..., L, 1]; before: at the chunk's start [...]."""
    if thbar is None:
        return in_chunk
    return in_chunk + thbar.squeeze(-1) * before.unsqueeze(-1)


def scales_before(last: Tensor, keep: Tensor, before: Tensor) -> Tensor:
    """The running scale at the start of each of N chunks [N, G]. last: `chunk_scale` of their last
    tokens, keep: their products of theta [N, G]; before: at the start of the first [G]."""
    found = [before]
    for own, kept in zip(last.unbind(), keep.unbind(), strict=True):
        found.append(own + kept * found[-1])
    return torch.stack(found[:-1])


def limited(eta: Tensor, x: Chunk, window: Tensor, scale: Tensor) -> Tensor:
    """eta^_t = eta_t / max(1, eta_t (1 + theta_t) scale_t, eta_t w_t / (1 - theta_t)): no key is
    written more than whole, by what S_t holds and hands on, or in all by this token. [..., L]."""
    if x.theta is not None:
        lasting = window / (1 - x.theta.clamp(max=MAX_THETA))
        scale = torch.maximum(lasting, (1 + x.theta) * scale)
    return eta / (eta * scale).clamp(min=1)


def correction(
    x: Chunk, kappa: Tensor, own: Tensor, written: Tensor, carried: Tensor | None
) -> Correction:
    """The chunk's system, given what is written of each key, B [..., L, E], and of S^(0),
    [..., L, 1], by the limited write strengths. kappa: [..., E, E]; own: [..., E].

        N[t, s] = B[t-1, s] + pend(t, s),   B = P C

    What is pending has not been written yet, and so does not fade with the memory.
    """
    assert x.abar is not None
    halo = kappa.shape[-1] - written.shape[-2]
    # Nothing has been written of the halo before the chunk, nor has anything faded.
    written = F.pad(_before(written), (0, 0, halo, 0))
    faded = F.pad(_before(x.abar, first=1.0), (0, 0, halo, 0), value=1.0)
    if x.pending is not None:
        written = written + x.pending / (x.mass * own).clamp(min=1).unsqueeze(-2)
    if carried is not None:
        carried = F.pad(_before(carried), (0, 0, halo, 0))
    return Correction(kappa * written, faded, carried)


def corrected(
    x: Correction, read: Tensor, along: Tensor | None, initial: Tensor | None, target: Tensor
) -> Tensor:
    """E = (I + system)^{-1} e. Of each key [..., E, Dv]: read, what M^(0) reads; along, its
    derivative along S^(0); initial, what M_0 reads, where decay leads there; target, what it
    should be."""
    e = x.faded * read - target
    if initial is not None:
        e = torch.addcmul(e, 1 - x.faded, initial)
    if x.carried is not None and along is not None:
        e = torch.addcmul(e, x.carried, along, value=-1)
    # Transposed, because LAPACK goes by columns: else both would be copied.
    return torch.linalg.solve_triangular(
        x.system.mT, e.mT, upper=True, left=False, unitriangular=True
    ).mT


def _before(x: Tensor, first: float = 0.0) -> Tensor:
    """Row t - 1 in the place of row t, `first` in the first: [..., L, n]."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)
