"""Newton-Schulz orthogonalisation: the inner optimizer's update for Muon (specification section 7).

    X_0 = S / (||S||_F + eps);   X <- P X,  P = a I + b A + c A A,  A = X X^T;   k times

The gradient needs no iterate to be kept, and nothing run backwards. With S = U diag(s) V^T the
result is U diag(f(s)) V^T, the gradient of sum_i F(s_i) with F' = f. The Jacobian of the iteration
is thus a Hessian: symmetric, so that its product with an incoming gradient G is the iteration's
derivative along G, computed beside the iterates from the first to the last:

    D_0 = G;   D <- P D + P' X,  P' = b A' + c (A' A + A A'),  A' = D X^T + X D^T

... any batch shape, m rows, n columns, k steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.autocast import no_autocast
from atlas_blocks.derivatives import transformed

# Polynomials x -> a x + b x^3 + c x^5 on the singular values, one triple a step; the last repeats.
COEFFICIENTS = {
    # K. Jordan et al., "Muon", 2024.
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # Amsel et al., "The Polar Express", arXiv 2505.16932: minimax for each step in turn.
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
}
EPS = 1e-7
# In the Gram space rounding errors of A grow by a^2 a step, so X is formed anew after this many.
_GRAM_STEPS = 5
# Entries that a CPU's core takes at a time: so many stay in its cache between products. (256
# matrices [64, 64] in one go: 0.5 of a large product's rate; so: 0.7 to 0.8.)
_AT_A_TIME = 2**16

GRADIENTS = ("exact", "straight_through")


def newton_schulz(
    s: Tensor,
    *,
    steps: int = 5,
    coefficients: str = "jordan",
    gradient: str = "exact",
) -> Tensor:
    """Bring every singular value of S near 1, keeping its singular vectors (ATLAS Eq. 32, NS_k).

        X_0 = S / (||S||_F + 1e-7);   X <- a X + (b A + c A A) X,  A = X X^T,  `steps` times

    s: [..., m, n], float64, float32 or bfloat16 (computed in float32). Returns the same shape and
    dtype. The smaller of m, n is taken as rows; long matrices iterate on their Gram matrix.
    A zero S gives zero and a zero gradient.
    coefficients: "jordan" (one triple) or "polar_express" (a triple a step).
    gradient: "exact", for which only S is kept; "straight_through" differentiates the
    normalisation alone.
    Raises ValueError for fewer than two axes, an unknown name or a negative number of steps.
    """
    check_iteration(s, steps, coefficients, gradient)
    x = s.to(torch.promote_types(s.dtype, torch.float32))
    differentiated = steps if gradient == "exact" else 0
    return _NewtonSchulz.apply(x, steps, coefficients, differentiated).to(s.dtype)


def check_iteration(s: Tensor, steps: int, coefficients: str, gradient: str) -> None:
    """ValueError for arguments that `newton_schulz` does not take."""
    if not isinstance(s, Tensor) or s.ndim < 2:
        check.fail("s", "a tensor [..., m, n]", getattr(s, "shape", type(s).__name__))
    check.at_least("steps", steps, 0)
    check.choice("coefficients", coefficients, COEFFICIENTS)
    check.choice("gradient", gradient, GRADIENTS)


def orthogonalise(s: Tensor, steps: int, coefficients: str = "jordan") -> Tensor:
    """`newton_schulz` with its exact gradient, in the dtype of s [..., m, n]."""
    if transformed():
        return forward(s, steps, coefficients)
    return _NewtonSchulz.apply(s, steps, coefficients, steps)


def triples(steps: int, coefficients: str) -> list[tuple[float, float, float]]:
    """(a, b, c) of every step."""
    table = COEFFICIENTS[coefficients]
    return [table[min(i, len(table) - 1)] for i in range(steps)]


class _NewtonSchulz(torch.autograd.Function):
    """The gradient is that of the first `differentiated` steps."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, steps: int, coefficients: str, differentiated: int) -> Tensor:
        ctx.save_for_backward(s)
        ctx.options = (differentiated, coefficients)
        return forward(s, steps, coefficients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In bfloat16, as inside an autocast region, the iteration's derivative would grow for ever.
        with no_autocast(grads[0]):
            return backward(grads[0], *ctx.saved_tensors, *ctx.options), None, None, None


def forward(s: Tensor, steps: int, coefficients: str) -> Tensor:
    """The iteration from S [..., m, n], in its dtype."""
    if s.shape[-2] > s.shape[-1]:
        return forward(s.mT, steps, coefficients).mT
    parts = []
    for (x,) in _at_a_time(s):
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x = x * torch.where(norm > 0, 1 / (norm + EPS), 0)
        parts.append(_iterate(x, steps, coefficients))
    return torch.cat(parts).reshape(s.shape)


def backward(grad: Tensor, s: Tensor, steps: int, coefficients: str) -> Tensor:
    """The gradient of S from that of `forward`, itself differentiable."""
    if s.shape[-2] > s.shape[-1]:
        return backward(grad.mT, s.mT, steps, coefficients).mT
    parts = []
    for x, d in _at_a_time(s, grad):
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        scale = torch.where(norm > 0, 1 / (norm + EPS), 0)
        x = x * scale
        d = _derivative(x, d, steps, coefficients)
        # What points along S changes the norm, too. Divided first: x / |S| is never small.
        along = (x * d).sum((-2, -1), keepdim=True)
        parts.append(scale * d - x / torch.where(norm > 0, norm, 1) * along)
    return torch.cat(parts).reshape(s.shape)


def _at_a_time(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The matrices [..., m, n] of each, some [N, m, n] at a time."""
    flat = [t.reshape(-1, *t.shape[-2:]) for t in tensors]
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        yield tuple(flat)
        return
    entries = _AT_A_TIME * torch.get_num_threads()
    count = max(1, entries // max(1, flat[0][:1].numel()))
    yield from zip(*(t.split(count) for t in flat), strict=True)


def _iterate(x: Tensor, steps: int, coefficients: str) -> Tensor:
    """The steps from X_0 [N, m, n]."""
    polynomials = triples(steps, coefficients)
    if _in_gram_space(*x.shape[-2:]):
        for i in range(0, steps, _GRAM_STEPS):
            x = _gram_steps(x, polynomials[i : i + _GRAM_STEPS])
        return x
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _derivative(x: Tensor, d: Tensor, steps: int, coefficients: str) -> Tensor:
    """Of `_iterate` at X_0 = x along d [N, m, n]."""
    polynomials = triples(steps, coefficients)
    if _in_gram_space(*x.shape[-2:]):
        for i in range(0, steps, _GRAM_STEPS):
            group = polynomials[i : i + _GRAM_STEPS]
            x, d = _gram_derivative(x, d, group, last=i + _GRAM_STEPS >= steps)
        return d
    for i, (a, b, c) in enumerate(polynomials):
        gram, along = x @ x.mT, _symmetric(d @ x.mT)
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        slope = _symmetric(torch.baddbmm(along, along, gram, beta=b / 2, alpha=c))
        d = torch.baddbmm(torch.baddbmm(d, p, d, beta=a), slope, x)
        if i + 1 < steps:
            x = torch.baddbmm(x, p, x, beta=a)
    return d


def _symmetric(x: Tensor) -> Tensor:
    return x + x.mT


def _in_gram_space(m: int, n: int) -> bool:
    """A wide X costs 3 products of width n a step, its Gram matrix 4 of width m."""
    return n > 1.5 * m


def _gram_steps(x: Tensor, polynomials: list[tuple[float, float, float]]) -> Tensor:
    """NS_k(X) = P_k(X X^T) X: the steps' polynomials commute, so only the Gram matrix iterates."""
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    gram = x @ x.mT
    product = None
    for i, (a, b, c) in enumerate(polynomials):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * eye
        product = p if product is None else p @ product
        if i + 1 < len(polynomials):
            gram = p @ gram @ p
    return x if product is None else product @ x


def _gram_derivative(
    x: Tensor, d: Tensor, polynomials: list[tuple[float, float, float]], *, last: bool
) -> tuple[Tensor, Tensor]:
    """`_gram_steps` (x itself where it is the last group) and its derivative along d."""
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    gram, along = x @ x.mT, _symmetric(d @ x.mT)
    product = slopes = None
    for i, (a, b, c) in enumerate(polynomials):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * eye
        slope = _symmetric(torch.baddbmm(along, along, gram, beta=b / 2, alpha=c))
        if product is None or slopes is None:
            product, slopes = p, slope
        else:
            product, slopes = p @ product, torch.baddbmm(p @ slopes, slope, product)
        if i + 1 < len(polynomials):
            half = p @ gram
            along = torch.baddbmm(_symmetric(slope @ half), p @ along, p)
            gram = half @ p
    assert product is not None
    assert slopes is not None
    d = torch.baddbmm(product @ d, slopes, x)
    return x if last else product @ x, d


def forward_flops(m: int, n: int, steps: int) -> int:
    """Of all matrix products of `forward` for one [m, n]."""
    m, n = min(m, n), max(m, n)
    if not _in_gram_space(m, n):
        return steps * (4 * m * m * n + 2 * m**3)
    # X X^T and P X once a group; a step squares the Gram matrix, and all but the last pass it on.
    return sum(4 * m * m * n + 2 * m**3 * (k + 3 * (k - 1)) for k in _group_sizes(steps))


def backward_flops(m: int, n: int, steps: int) -> int:
    """Of all matrix products of `backward` for one [m, n]."""
    m, n = min(m, n), max(m, n)
    if not steps:
        return 0
    if not _in_gram_space(m, n):
        return steps * (10 * m * m * n + 4 * m**3) - 2 * m * m * n
    groups = _group_sizes(steps)
    total = sum(8 * m * m * n + 2 * m**3 * (2 * k + 8 * (k - 1)) for k in groups)
    return total + (len(groups) - 1) * 2 * m * m * n


def _group_sizes(steps: int) -> list[int]:
    return [min(_GRAM_STEPS, steps - i) for i in range(0, steps, _GRAM_STEPS)]
