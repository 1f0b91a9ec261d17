"""Newton-Schulz with its gradient written out, for backwards that are differentiated no further.

Autograd takes two products for each of the forward's. But A = X X^T and all that is made of it are
symmetric, and a gradient to a symmetric matrix is needed up to its antisymmetric part alone: two
thirds of the products remain. On a CPU a few matrices are taken at a time, so that a step finds
them in the cache.

N matrices, m rows <= n columns, k steps; D gradient of the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_blocks.functional.newton_schulz import (
    GRAM_STEPS,
    Polynomial,
    in_gram_space,
    normalise,
    polynomials,
)

# Entries of X that a CPU takes at a time: a step's few matrices then lie in a core's own cache.
BLOCK = 2**15


def orthogonalise_once(s: Tensor, steps: int) -> Tensor:
    """`newton_schulz.orthogonalise` of s [..., m, n], differentiable once."""
    return _Iterate.apply(normalise(s), steps)


class _Iterate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        ctx.turned = x.shape[-2] > x.shape[-1]
        rows = (x.mT if ctx.turned else x).flatten(0, -3).contiguous()
        ctx.saved, parts, table = [], [], polynomials(steps)
        for part in rows.split(_block(rows)):
            saved: list[Any] = []
            parts.append(_forward(part, table, saved))
            ctx.saved.append(saved)
        ctx.table = table
        y = torch.cat(parts)
        return (y.mT if ctx.turned else y).reshape(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = (grad.mT if ctx.turned else grad).flatten(0, -3).contiguous()
        parts = [
            _backward(part, ctx.table, saved)
            for part, saved in zip(rows.split(_block(rows)), ctx.saved, strict=True)
        ]
        found = torch.cat(parts)
        return (found.mT if ctx.turned else found).reshape(grad.shape), None


def _block(rows: Tensor) -> int:
    """How many matrices of rows [N, m, n] at a time."""
    if rows.is_cuda:
        return max(1, len(rows))
    return max(1, BLOCK // max(1, rows[:1].numel()))


def _forward(x: Tensor, table: list[Polynomial], saved: list[Any]) -> Tensor:
    """NS_k of X [N, m, n]; what the backward needs is added to `saved`."""
    if in_gram_space(*x.shape[-2:]):
        for i in range(0, len(table), GRAM_STEPS):
            x = _gram_forward(x, table[i : i + GRAM_STEPS], saved)
        return x
    for a, b, c in table:
        gram = x @ x.mT
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        saved.append((x, gram, p))
        x = torch.baddbmm(x, p, x, beta=a)
    return x


def _backward(d: Tensor, table: list[Polynomial], saved: list[Any]) -> Tensor:
    """The gradient of X_0 for that of NS_k(X_0)."""
    if in_gram_space(*d.shape[-2:]):
        for i in reversed(range(0, len(table), GRAM_STEPS)):
            d = _gram_backward(d, table[i : i + GRAM_STEPS], saved[i // GRAM_STEPS])
        return d
    for (a, b, c), (x, gram, p) in zip(reversed(table), reversed(saved), strict=True):
        # X' = a X + P X, P = b A + c A A, A = X X^T; dP + dP^T, then dA + dA^T.
        d_p = d @ x.mT
        d_p = d_p + d_p.mT
        d_gram = torch.baddbmm(d_p, d_p, gram, beta=b / 2, alpha=c)
        d_gram = d_gram + d_gram.mT
        d = torch.baddbmm(d, p, d, beta=a).baddbmm_(d_gram, x)
    return d


def _gram_forward(x: Tensor, table: list[Polynomial], saved: list[Any]) -> Tensor:
    """Q X with Q = P_k ... P_1: G <- P G P, P = a I + b G + c G G."""
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    gram, product = x @ x.mT, None
    steps = []
    for i, (a, b, c) in enumerate(table):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c).add_(eye, alpha=a)
        steps.append((gram, p, product))
        product = p if product is None else p @ product
        if i + 1 < len(table):
            gram = p @ gram @ p
    assert product is not None
    saved.append((x, product, steps))
    return product @ x


def _gram_backward(d: Tensor, table: list[Polynomial], saved: Any) -> Tensor:
    x, product, steps = saved
    # dQ, and dG of the step after, which is symmetric.
    d_product, d_next = d @ x.mT, None
    d_gram = torch.zeros_like(product)
    for (_, b, c), (gram, p, before) in zip(reversed(table), reversed(steps), strict=True):
        d_p = d_product
        if before is not None:
            d_p, d_product = d_product @ before, p @ d_product
        if d_next is not None:
            u = d_next @ p
            d_p = torch.baddbmm(d_p, u, gram, alpha=2)  # G P dG has the same symmetric part
            d_next = p @ u
        # d_p now counts for its symmetric part alone: twice that, and then half of it.
        d_p = d_p + d_p.mT
        half = torch.baddbmm(d_p, d_p, gram, beta=b / 4, alpha=c / 2)
        d_gram = half + half.mT
        d_next = d_gram = d_gram if d_next is None else d_gram.add_(d_next)
    return torch.baddbmm(product @ d, d_gram, x, alpha=2)
