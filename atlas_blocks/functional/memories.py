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


# Under the roots of the higher orders below, so that their gradients stay finite at 0.
BOUND_FLOOR, SECOND_FLOOR, THIRD_FLOOR = 1e-12, 1e-5, 1e-8


def spectral_bound(w: Tensor) -> Tensor:
    """||W W^T||_F >= ||W||_2^2, the Schatten-4 norm squared: [..., dout, din] -> [..., 1, 1]."""
    gram = w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w
    return torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True) + BOUND_FLOOR


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _largest(x: Tensor) -> Tensor:
    # By its index: amax looks for it again by its value in the backward, where a compiler may have
    # computed x once more and rounded it otherwise; nothing is found then, and 0 / 0 the gradient.
    return x.abs().max(-1, keepdim=True).values


@dataclass(frozen=True)
class Memory:
    """One structure: how many weights, how it reads, its gradient factors, its tangent kernel.

    forward(linear, x): M(x) without the residual.
    factors(weights, x, error): [(left, right)] a weight; error(y) is dl/dM(x), given y = M(x)
    without the residual.
    tangent(weights, x, outer): f [G, n, r], from which kappa of the write discount between two of
    the n tokens is |h . h'| + (f . f') |x . x'|; outer is the factors (error e, hidden h) of W_1.
    It is a bound on the tangent kernel plus its higher orders: all weights of a deep memory are
    written at once, and where |e| is large against them the products of their changes outweigh the
    changes. A step eta changes M(x) by at most eta K1 |e| + (eta K2)^2 |e| + (eta K3)^3 |e|; kappa
    is K1 + K2 + K3, the latter two with each token's share of them. None for a matrix memory,
    whose kappa is |x . x'|.
    residual: whether r(x), the un-lifted key, is added where Dk = Dv.
    """

    weights: int
    residual: bool
    forward: Callable[[Linear, Tensor], Tensor]
    factors: Callable[[Weights, Tensor, Callable[[Tensor], Tensor]], list[Factor]]
    tangent: Callable[[Weights, Tensor, Factor], Tensor] | None


# --- matrix: M(x) = W x -----------------------------------------------------------------------


def _matrix_forward(linear: Linear, x: Tensor) -> Tensor:
    return linear(0, x)


def _matrix_factors(weights: Weights, x: Tensor, error: Callable[[Tensor], Tensor]) -> list[Factor]:
    (w,) = weights
    return [(error(x @ w.mT), x)]


# --- mlp: M(x) = r(x) + W1 gelu(W2 x) ---------------------------------------------------------


def _mlp_forward(linear: Linear, x: Tensor) -> Tensor:
    return linear(0, F.gelu(linear(1, x)))


def _mlp_factors(weights: Weights, x: Tensor, error: Callable[[Tensor], Tensor]) -> list[Factor]:
    w1, w2 = weights
    z = x @ w2.mT
    h = F.gelu(z)
    e = error(h @ w1.mT)
    return [(e, h), (gelu_slope(z, times=e @ w1), x)]


def _mlp_tangent(weights: Weights, x: Tensor, outer: Factor) -> Tensor:
    e, h = outer
    w = spectral_bound(weights[0]).sqrt()
    # (dW1 applied to dh): eta^2 |e| |h| ||W1|| |e|.
    second = (_norm(e) * _norm(h) * w + SECOND_FLOOR) ** (1 / 4)
    return torch.cat([w.expand_as(second), second], -1)


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


def _gated_tangent(weights: Weights, x: Tensor, outer: Factor) -> Tensor:
    e, h = outer
    w1, w2, w3 = weights
    z, u = x @ w2.mT, x @ w3.mT
    s = F.gelu(z)
    w = spectral_bound(w1).sqrt()
    norm_e, norm_h = _norm(e), _norm(h)
    # The largest |dh / d(W2 x)|, |dh / d(W3 x)| and |W3 x| of any hidden unit.
    gate, value, upper = _largest(gelu_slope(z, times=u)), _largest(s), _largest(u)
    # dW1 with either inner change, and the two inner changes with one another; then all three.
    pairs = norm_h * (gate * upper + value.square()) * w + w**3 * gate * value
    second = (norm_e * pairs + SECOND_FLOOR) ** (1 / 4)
    third = (norm_e.square() * norm_h * gate * value * w.square() + THIRD_FLOOR) ** (1 / 6)
    return torch.cat([w * gate, w * value, second, third], -1)


MEMORIES: dict[str, Memory] = {
    "matrix": Memory(1, False, _matrix_forward, _matrix_factors, None),
    "mlp": Memory(2, True, _mlp_forward, _mlp_factors, _mlp_tangent),
    "gated_mlp": Memory(3, True, _gated_forward, _gated_factors, _gated_tangent),
}


def weight_shapes(memory: str, din: int, dout: int, hidden: int) -> list[tuple[int, int]]:
    """[dout, din] of every weight, in the order W_1, W_2, ...; `hidden` is unused by "matrix"."""
    inner = [(hidden, din)] * (MEMORIES[memory].weights - 1)
    return [(dout, hidden), *inner] if inner else [(dout, din)]
