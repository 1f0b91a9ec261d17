"""Memory structures M and the rank-one factors of their gradients (specification sections 3, 4).

G = batch x heads, n tokens, Dphi key width, Dv value width. A memory is a list of weights; every
weight's gradient of one token's loss is an outer product left (x) right, so that nothing of the
size of the weight is ever formed per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# linear(i, x): weight i applied to x [G, n, din]; lets one definition serve fixed and per-token
# weights alike.
Linear = Callable[[int, Tensor], Tensor]
Factor = tuple[Tensor, Tensor]
Weights = Sequence[Tensor]


def gelu_slope(z: Tensor, times: Tensor) -> Tensor:
    """times * d/dz of the exact GELU at z."""
    return torch.ops.aten.gelu_backward(times, z)


# Added to the tangent kernels of the deep memories. Near M^(0) = 0 the kernel vanishes, as if
# writes did nothing, while all weights are written at once and jump: without it retentions below
# 0.99 with long momentum end in NaN; at 0.1 and above the memory dies out at ordinary gates.
TANGENT_FLOOR = 0.03


def spectral_bound(w: Tensor) -> Tensor:
    """||W W^T||_F >= ||W||_2^2, the Schatten-4 norm squared: [..., dout, din] -> [..., 1, 1]."""
    gram = w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w
    return torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class Memory:
    """One structure: how many weights, how it reads, its gradient factors, its tangent kernel.

    forward(linear, x): M(x) without the residual.
    factors(weights, x, error): [(left, right)] a weight; error(y) is dl/dM(x), given y = M(x)
    without the residual.
    tangent(weights, x, h, gram): a bound on the tangent kernel between the n tokens x, [G, n, n],
    from the right factor h of W_1 and gram = |x x^T|.
    residual: whether r(x), the un-lifted key, is added where Dk = Dv.
    """

    weights: int
    residual: bool
    forward: Callable[[Linear, Tensor], Tensor]
    factors: Callable[[Weights, Tensor, Callable[[Tensor], Tensor]], list[Factor]]
    tangent: Callable[[Weights, Tensor, Tensor, Tensor], Tensor]


# --- matrix: M(x) = W x -----------------------------------------------------------------------


def _matrix_forward(linear: Linear, x: Tensor) -> Tensor:
    return linear(0, x)


def _matrix_factors(weights: Weights, x: Tensor, error: Callable[[Tensor], Tensor]) -> list[Factor]:
    (w,) = weights
    return [(error(x @ w.mT), x)]


def _matrix_tangent(weights: Weights, x: Tensor, h: Tensor, gram: Tensor) -> Tensor:
    return gram


# --- mlp: M(x) = r(x) + W1 gelu(W2 x) ---------------------------------------------------------


def _mlp_forward(linear: Linear, x: Tensor) -> Tensor:
    return linear(0, F.gelu(linear(1, x)))


def _mlp_factors(weights: Weights, x: Tensor, error: Callable[[Tensor], Tensor]) -> list[Factor]:
    w1, w2 = weights
    z = x @ w2.mT
    h = F.gelu(z)
    e = error(h @ w1.mT)
    return [(e, h), (gelu_slope(z, times=e @ w1), x)]


def _mlp_tangent(weights: Weights, x: Tensor, h: Tensor, gram: Tensor) -> Tensor:
    return (h @ h.mT).abs() + (spectral_bound(weights[0]) + TANGENT_FLOOR) * gram


# --- gated_mlp (Atlas++): M(x) = r(x) + W1 (gelu(W2 x) * W3 x) --------------------------------


def _gated_forward(linear: Linear, x: Tensor) -> Tensor:
    return linear(0, F.gelu(linear(1, x)) * linear(2, x))


def _gated_factors(weights: Weights, x: Tensor, error: Callable[[Tensor], Tensor]) -> list[Factor]:
    w1, w2, w3 = weights
    z, u = x @ w2.mT, x @ w3.mT
    s = F.gelu(z)
    h = s * u
    e = error(h @ w1.mT)
    back = e @ w1
    return [(e, h), (gelu_slope(z, times=back * u), x), (back * s, x)]


def _gated_tangent(weights: Weights, x: Tensor, h: Tensor, gram: Tensor) -> Tensor:
    w1, w2, w3 = weights
    z, u = x @ w2.mT, x @ w3.mT
    s = F.gelu(z)
    # |sum_j W1_j a_j b_j W1_j^T| <= ||W1||^2 max|a| max|b| for the two inner weights.
    gate = gelu_slope(z, times=u).abs().amax(-1, keepdim=True)
    value = s.abs().amax(-1, keepdim=True)
    inner = gate @ gate.mT + value @ value.mT
    return (h @ h.mT).abs() + (spectral_bound(w1) * inner + TANGENT_FLOOR) * gram


MEMORIES: dict[str, Memory] = {
    "matrix": Memory(1, False, _matrix_forward, _matrix_factors, _matrix_tangent),
    "mlp": Memory(2, True, _mlp_forward, _mlp_factors, _mlp_tangent),
    "gated_mlp": Memory(3, True, _gated_forward, _gated_factors, _gated_tangent),
}


def weight_shapes(memory: str, din: int, dout: int, hidden: int) -> list[tuple[int, int]]:
    """[dout, din] of every weight, in the order W_1, W_2, ...; `hidden` is unused by "matrix"."""
    inner = [(hidden, din)] * (MEMORIES[memory].weights - 1)
    return [(dout, hidden), *inner] if inner else [(dout, din)]
