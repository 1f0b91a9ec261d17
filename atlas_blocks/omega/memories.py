"""Memory structures M and the rank-one factors of their gradients (specification sections 3, 4).

G = batch x heads, n tokens, Dphi key width, Dv value width. A memory is a list of weights; every
weight's gradient of one token's loss is an outer product left (x) right, so that nothing of the
size of the weight is ever formed per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.names import add_to

# linear(i, x): weight i applied to x [G, n, din]; lets one definition serve fixed and per-token
# weights alike.
Apply = Callable[[int, Tensor], Tensor]
Factor = tuple[Tensor, Tensor]
Weights = Sequence[Tensor]
Elementwise = Callable[[Tensor], Tensor]


def gelu_slope(z: Tensor) -> Tensor:
    """d/dz of the exact GELU at z."""
    return torch.ops.aten.gelu_backward(torch.ones_like(z), z)


# Under the roots of sizes, so that zero errors have finite values and gradients.
TINY = 1e-12


class Linearised(NamedTuple):
    """A memory around fixed weights, at n keys x.

    read: M(x) without the residual [G, n, Dv]. factors(e): [(left, right)] a weight, given the
    errors e = dl/dM(x). along(S): the derivative of `read` along S, a list of the weights' shapes.
    """

    read: Tensor
    factors: Callable[[Tensor], list[Factor]]
    along: Callable[[Weights], Tensor]


@dataclass(frozen=True)
class Memory:
    """One structure: how many weights, how it reads, and what becomes of it nearby.

    forward(linear, x): M(x) without the residual.
    linearise(weights, x): see `Linearised`.
    residual: whether r(x), the un-lifted key, is added where Dk = Dv. linear: whether M(x) = W x,
    whose gradients do not depend on the memory but by the error.
    """

    weights: int
    residual: bool
    forward: Callable[[Apply, Tensor], Tensor]
    linearise: Callable[[Weights, Tensor], Linearised]
    linear: bool = False


# --- matrix: M(x) = W x -----------------------------------------------------------------------


def _matrix_forward(linear: Apply, x: Tensor) -> Tensor:
    return linear(0, x)


def _matrix_linearise(weights: Weights, x: Tensor) -> Linearised:
    (w,) = weights
    return Linearised(x @ w.mT, lambda e: [(e, x)], lambda s: x @ s[0].mT)


# --- deep memories: an elementwise activation s, and its slope ds/dz ---------------------------


def mlp(activation: Elementwise, slope: Elementwise) -> Memory:
    """M(x) = r(x) + W1 s(W2 x)."""

    def forward(linear: Apply, x: Tensor) -> Tensor:
        return linear(0, activation(linear(1, x)))

    def linearise(weights: Weights, x: Tensor) -> Linearised:
        w1, w2 = weights
        z = x @ w2.mT
        h, ds = activation(z), slope(z)

        def factors(e: Tensor) -> list[Factor]:
            return [(e, h), (ds * (e @ w1), x)]

        def along(s: Weights) -> Tensor:
            return h @ s[0].mT + (ds * (x @ s[1].mT)) @ w1.mT

        return Linearised(h @ w1.mT, factors, along)

    return Memory(2, True, forward, linearise)


def gated_mlp(activation: Elementwise, slope: Elementwise) -> Memory:
    """M(x) = r(x) + W1 (s(W2 x) * W3 x) (Atlas++)."""

    def forward(linear: Apply, x: Tensor) -> Tensor:
        return linear(0, activation(linear(1, x)) * linear(2, x))

    def linearise(weights: Weights, x: Tensor) -> Linearised:
        w1, w2, w3 = weights
        z, u = x @ w2.mT, x @ w3.mT
        s, ds = activation(z), slope(z)
        h = s * u

        def factors(e: Tensor) -> list[Factor]:
            back = e @ w1
            return [(e, h), (ds * u * back, x), (back * s, x)]

        def along(d: Weights) -> Tensor:
            dh = ds * u * (x @ d[1].mT) + s * (x @ d[2].mT)
            return h @ d[0].mT + dh @ w1.mT

        return Linearised(h @ w1.mT, factors, along)

    return Memory(3, True, forward, linearise)


MEMORIES: dict[str, Memory] = {
    "matrix": Memory(1, False, _matrix_forward, _matrix_linearise, linear=True),
    "mlp": mlp(F.gelu, gelu_slope),
    "gated_mlp": gated_mlp(F.gelu, gelu_slope),
}


def register_memory(name: str, memory: Memory) -> None:
    """Let rules and layers have `memory=name`: `mlp` or `gated_mlp` of another activation, or a
    structure of one's own.

    Its first weight is the outermost, [Dv, hidden], applied last; all others are [hidden, Dphi] and
    applied to the key; with one weight alone it is [Dv, Dphi]. Raises ValueError for a name that is
    taken, and for a memory of which `linearise` does not say what `forward` does, at a few keys.
    """
    if not isinstance(memory, Memory):
        check.fail("memory", "a Memory", type(memory).__name__)
    check.at_least("memory.weights", memory.weights, 1)
    _check_memory(memory)
    add_to("memory", MEMORIES, name, memory)


def _check_memory(memory: Memory) -> None:
    """`linearise` against the derivatives of `forward`, in float64."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inner = [normal(4, 5) for _ in range(memory.weights - 1)]
    weights = [normal(3, 4 if inner else 5), *inner]
    x, e, along = normal(1, 6, 5), normal(1, 6, 3), [normal(*w.shape) for w in weights]
    last: list[Tensor] = []

    def read(at: Weights) -> Tensor:
        def linear(i: int, z: Tensor) -> Tensor:
            y = z @ at[i].mT
            last[:] = [y]
            return y

        return memory.forward(linear, x)

    with torch.enable_grad():
        leaves = [w.clone().requires_grad_() for w in weights]
        y = read(leaves)
        check.agree("memory.forward", "W_1 applied last", y, last[0])
        gradients = torch.autograd.grad((y * e).sum(), leaves)
    found = memory.linearise(weights, x)
    check.agree("memory.linearise read", "what forward gives", found.read, y)
    factors = found.factors(e)
    if len(factors) != memory.weights:
        check.fail("memory.linearise factors", f"a pair for {memory.weights} weights", len(factors))
    for i, ((left, right), gradient) in enumerate(zip(factors, gradients, strict=True)):
        name = f"memory.linearise factors[{i}]"
        check.agree(name, "left and right of the weight's gradient", (left.mT @ right)[0], gradient)
        if i:
            check.agree(name, "the key as right factor", right, x.expand_as(right))
    step = 1e-6
    ahead = read([w + step * s for w, s in zip(weights, along, strict=True)])
    behind = read([w - step * s for w, s in zip(weights, along, strict=True)])
    slope = (ahead - behind) / (2 * step)
    check.agree("memory.linearise along", "the derivative of forward", found.along(along), slope)
    if memory.linear:
        if inner:
            check.fail("memory.linear", "False, with more weights than one", True)
        w_x = x @ weights[0].mT
        check.agree("memory.linear", "False, as M(x) is not W x", y, w_x)


def tangent_kernel(
    factors: Sequence[Factor], errors: Tensor, squares: Tensor, gram: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """kappa(s, t) = sum_w c_s c_t (R_s . R_t) between n keys, c = |L| / |e|, and kappa(i, i).

    The share of a key's error that a write of another's takes away, for a unit step (9b). factors:
    for these errors e [G, n, Dv]; squares, gram: |x_i|^2 [G, n] and x_s . x_t [G, n, n] of the
    inner weights' R = x. No kappa without a gram.
    """
    (_, h), *inner = factors
    scale = (errors.square().sum(-1, keepdim=True) + TINY).rsqrt()
    own, kappa = h.square().sum(-1), None if gram is None else h @ h.mT
    for left, _ in inner:
        c = ((left * scale).square().sum(-1, keepdim=True) + TINY).sqrt()
        own = own + c.squeeze(-1).square() * squares
        if kappa is not None and gram is not None:
            kappa = kappa + (c * c.mT) * gram
    return kappa, own


def weight_shapes(memory: str, din: int, dout: int, hidden: int) -> list[tuple[int, int]]:
    """[dout, din] of every weight, in the order W_1, W_2, ...; `hidden` is unused by "matrix"."""
    inner = [(hidden, din)] * (MEMORIES[memory].weights - 1)
    return [(dout, hidden), *inner] if inner else [(dout, din)]
