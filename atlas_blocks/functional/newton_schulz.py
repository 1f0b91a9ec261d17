"""Newton-Schulz orthogonalisation: the inner optimizer's update for Muon (specification section 7).

... any batch shape, m rows, n columns, k steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atlas_blocks import check

Polynomial = tuple[float, float, float]
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
GRAM_STEPS = 5


def newton_schulz(
    s: Tensor,
    *,
    steps: int = 5,
    coefficients: str = "jordan",
    backward: str = "exact",
) -> Tensor:
    """Bring every singular value of S near 1, keeping its singular vectors (ATLAS Eq. 32, NS_k).

        X_0 = S / (||S||_F + 1e-7);   X <- a X + (b A + c A A) X,  A = X X^T,  `steps` times

    s: [..., m, n], float64, float32 or bfloat16 (computed in float32). Returns the same shape and
    dtype. The smaller of m, n is taken as rows; long matrices iterate on their Gram matrix.
    A zero S gives zero and a zero gradient.
    coefficients: "jordan" (one triple) or "polar_express" (a triple a step).
    backward: "exact" recomputes the iterates, so that only S is kept for the backward;
    "straight_through" differentiates the normalisation alone.
    Raises ValueError for fewer than two axes, an unknown name or a negative number of steps.
    """
    if not isinstance(s, Tensor) or s.ndim < 2:
        check.fail("s", "a tensor [..., m, n]", getattr(s, "shape", type(s).__name__))
    check.at_least("steps", steps, 0)
    check.choice("coefficients", coefficients, COEFFICIENTS)
    check.choice("backward", backward, ("exact", "straight_through"))
    x = s.to(torch.promote_types(s.dtype, torch.float32))
    if backward == "straight_through":
        unit = normalise(x)
        out = unit + (iterate(unit.detach(), steps, coefficients) - unit.detach())
    elif torch.is_grad_enabled() and x.requires_grad:
        out = checkpoint(
            orthogonalise, x, steps, coefficients, use_reentrant=False, preserve_rng_state=False
        )
    else:
        out = orthogonalise(x, steps, coefficients)
    return out.to(s.dtype)


def orthogonalise(s: Tensor, steps: int, coefficients: str = "jordan") -> Tensor:
    """`newton_schulz` in plain autograd, in the dtype of s [..., m, n]."""
    return iterate(normalise(s), steps, coefficients)


def normalise(s: Tensor) -> Tensor:
    """S / (||S||_F + eps), with value and gradient zero where S is zero."""
    norm = torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True)
    return s * torch.where(norm > 0, 1 / (norm + EPS), 0)


def iterate(x: Tensor, steps: int, coefficients: str) -> Tensor:
    """The polynomial iteration on X [..., m, n] of Frobenius norm at most 1."""
    if x.shape[-2] > x.shape[-1]:
        return iterate(x.mT, steps, coefficients).mT
    table = polynomials(steps, coefficients)
    flat = x.reshape(-1, *x.shape[-2:])
    if in_gram_space(*x.shape[-2:]):
        for i in range(0, steps, GRAM_STEPS):
            flat = _gram_steps(flat, table[i : i + GRAM_STEPS])
    else:
        for a, b, c in table:
            gram = flat @ flat.mT
            flat = torch.baddbmm(
                flat, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), flat, beta=a
            )
    return flat.reshape(x.shape)


def polynomials(steps: int, coefficients: str = "jordan") -> list[Polynomial]:
    """(a, b, c) of every step."""
    table = COEFFICIENTS[coefficients]
    return [table[min(i, len(table) - 1)] for i in range(steps)]


def in_gram_space(m: int, n: int) -> bool:
    """A wide X costs 3 products of width n a step, its Gram matrix 4 of width m."""
    return n > 1.5 * m


def flops(m: int, n: int, steps: int) -> int:
    """Of all matrix products of `orthogonalise` for one [m, n]."""
    m, n = min(m, n), max(m, n)
    if not in_gram_space(m, n):
        return steps * (4 * m * m * n + 2 * m**3)
    groups = [min(GRAM_STEPS, steps - i) for i in range(0, steps, GRAM_STEPS)]
    # X X^T and P X once a group; a step squares the Gram matrix, and all but the last pass it on.
    return sum(4 * m * m * n + 2 * m**3 * (k + (k - 1) + 2 * (k - 1)) for k in groups)


def _gram_steps(x: Tensor, table: list[Polynomial]) -> Tensor:
    """NS_k(X) = P_k(X X^T) X: the steps' polynomials commute, so only the Gram matrix iterates."""
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    gram = x @ x.mT
    product = None
    for i, (a, b, c) in enumerate(table):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * eye
        product = p if product is None else p @ product
        if i + 1 < len(table):
            gram = p @ gram @ p
    return x if product is None else product @ x
