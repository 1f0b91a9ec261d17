"""FLOPs of the ops for torch.utils.flop_counter: matrix products, 2 m n k each.

The terms of the dual form (specification section 6), in the order the definition computes them.
Position and the bounds of packed documents are data: a call is taken to begin at the start of a
chunk and to be of one document. Not counted, as in torch's own formulas: everything that is not a
matrix product, such as gates and GELU.

L tokens of a chunk, E keys it sees; T, Dk, Dv, Dphi as in omega_rule.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from atlas_blocks.functional.features import sketch_sizes
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.functional.newton_schulz import backward_flops as newton_schulz_backward_flops
from atlas_blocks.functional.newton_schulz import forward_flops as newton_schulz_flops
from atlas_blocks.ops.omega_rule import Settings

Shape = Sequence[int]


def register_flop_formulas() -> None:
    """Let torch's FLOP counters count the ops, whoever serves them; a second call does nothing.

    The definition outside of torch.compile is counted without it. Done when a provider is first
    imported, and not with this library, since torch's counter imports Triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ops = torch.ops.atlas
    if ops.omega_rule in flop_registry:
        return

    def forward(tensors: list[Shape], *rest: Any, out_shape: Any = None) -> int:
        return forward_flops(tensors, Settings(*rest[:-2]))

    def backward(grads: Any, tensors: Any, saved: Any, *rest: Any, out_shape: Any = None) -> int:
        return backward_flops(tensors, Settings(*rest[:-1]))

    def walk(tensors: Any, *rest: Any, out_shape: Any = None) -> int:
        return walk_flops(tensors, *rest[:-1])

    def walk_backward(
        grads: Any, tensors: Any, results: Any, key: Any, *rest: Any, out_shape: Any = None
    ) -> int:
        return walk_backward_flops(tensors, *rest[:-1])

    def none(*shapes: Any, out_shape: Any = None) -> int:
        """Monomials are elementwise products."""
        return 0

    def newton_schulz(s: Shape, steps: int, *rest: Any, out_shape: Any = None) -> int:
        return math.prod(s[:-2]) * newton_schulz_flops(s[-2], s[-1], steps)

    def newton_schulz_backward(
        grad: Shape, s: Shape, steps: int, *rest: Any, out_shape: Any = None
    ) -> int:
        return math.prod(s[:-2]) * newton_schulz_backward_flops(s[-2], s[-1], steps)

    register_flop_formula(ops.omega_rule)(forward)
    register_flop_formula(ops.omega_rule_backward)(backward)
    register_flop_formula(ops.omega_walk)(walk)
    register_flop_formula(ops.omega_walk_backward)(walk_backward)
    register_flop_formula(ops.newton_schulz)(newton_schulz)
    register_flop_formula(ops.newton_schulz_backward)(newton_schulz_backward)
    register_flop_formula([ops.polynomial_features, ops.polynomial_features_backward])(none)


def forward_flops(tensors: Sequence[Shape], settings: Settings) -> int:
    """Of the forward, for the shapes of the op's tensors."""
    batch, length, heads, _ = tensors[0]
    chunk, window = settings.chunk_size, tensors[5][-1]
    weights = tensors[6 + settings.momentum :][: MEMORIES[settings.memory].weights]
    shapes = [(w[1], w[2]) for w in weights]
    dots = _dots_width(tensors, settings)
    whole, tail = divmod(length, chunk)
    spans = whole * _chunk_flops(settings, shapes, dots, tensors[2][-1], chunk, window)
    spans += _chunk_flops(settings, shapes, dots, tensors[2][-1], tail, window) if tail else 0
    return _all_feature_flops(tensors, settings) + batch * heads * spans


def backward_flops(tensors: Sequence[Shape], settings: Settings) -> int:
    """Of the definition's backward: each product again, and one for each factor's gradient;
    decay matrices and Newton-Schulz have backwards of their own, and tables of sketches no
    gradient."""
    total = 3 * forward_flops(tensors, settings) - _all_feature_flops(tensors, settings)
    batch, length, heads, _ = tensors[0]
    whole, tail = divmod(length, settings.chunk_size)
    cubes = whole * settings.chunk_size**3 + tail**3
    total += batch * heads * (2 if settings.momentum else 1) * 2 * cubes
    if settings.update == "muon":
        # phi(q) phi(k)^T has no use here, and so no gradient.
        keys = tensors[5][-1] - 1
        pairs = sum(n * (n + keys) for n in (*whole * (settings.chunk_size,), tail))
        total -= 2 * batch * heads * 2 * pairs * _dots_width(tensors, settings)
        total += _newton_schulz_flops(tensors, settings, newton_schulz_backward_flops)
        total -= 2 * _newton_schulz_flops(tensors, settings, newton_schulz_flops)
    if settings.objective == "dot":
        # -<M(k), v> has no use for M(k) itself: its last product is computed, but not its gradient.
        dout, din = tensors[6 + settings.momentum][1:]
        keys = length + -(-length // settings.chunk_size) * (tensors[5][-1] - 1)
        total -= 2 * batch * heads * 2 * keys * dout * din
    return total


def _newton_schulz_flops(
    tensors: Sequence[Shape], settings: Settings, one: Callable[[int, int, int], int]
) -> int:
    """All the steps of Muon, `one(dout, din, steps)` each."""
    batch, length, heads, _ = tensors[0]
    whole, tail = divmod(length, settings.chunk_size)
    taken = whole * sum(_steps(settings, settings.chunk_size)) + sum(_steps(settings, tail))
    weights = tensors[6 + settings.momentum :][: MEMORIES[settings.memory].weights]
    return batch * heads * taken * sum(one(w[1], w[2], settings.ns_steps) for w in weights)


def _dots_width(tensors: Sequence[Shape], settings: Settings) -> int:
    """Of what phi(q) . phi(k) is summed over: polynomial maps know it from q . k."""
    polynomial = settings.feature_map == "polynomial"
    last = 6 + settings.momentum + MEMORIES[settings.memory].weights - 1
    return tensors[0][-1] if polynomial else tensors[last][-1]


def _all_feature_flops(tensors: Sequence[Shape], settings: Settings) -> int:
    """Of the features of all queries and keys, the history's too."""
    batch, length, heads, dk = tensors[0]
    history = max(tensors[5][-1] - 1, settings.chunk_size - 1 if settings.write_discount else 0)
    return batch * heads * (2 * length + history) * _feature_flops(tensors, settings, dk)


def _feature_flops(tensors: Sequence[Shape], settings: Settings, dk: int) -> int:
    """One token's: for degree n the spectra of n count sketches, and their product's way back."""
    if settings.feature_map != "sketch":
        return 0
    # Its coefficients stand after the weights.
    degree = tensors[6 + settings.momentum + MEMORIES[settings.memory].weights][0] - 1
    sizes = sketch_sizes(dk, settings.sketch_width, degree)
    pairs = zip(range(2, degree + 1), sizes, strict=True)
    return sum(2 * (n * dk + size) * 2 * (size // 2 + 1) for n, size in pairs)


def _chunk_flops(
    s: Settings, shapes: list[tuple[int, int]], dots: int, dv: int, span: int, window: int
) -> int:
    """One chunk of L = span tokens. shapes: [dout, din] of every weight; dots: width of q, k in
    phi(q) . phi(k)."""
    L, E, inner = span, window - 1 + span, len(shapes) - 1

    # Without memory: Theta Gam, phi(q) phi(k)^T.
    total = (2 * L * L * E if s.momentum else 0) + 2 * L * E * dots
    if s.write_discount:
        total += 2 * L * L * dots + 2 * L * L  # |phi(k) phi(k)^T|, and its sum rho
    total += _factor_flops(shapes, dv, L, E, s.write_discount)

    for i, (dout, din) in enumerate(shapes):
        write = 2 * dout * E * din  # left^T right over the chunk's keys
        read = 2 * L * dout * din  # a weight applied to every token
        total += write if s.momentum else 0
        if s.update == "gd":
            # W's end, W^(0) z, S^(0) z, the dots R z, and the sum over L. The dots with phi(q) are
            # known.
            total += write + read + (read if s.momentum else 0) + 2 * L * E * dout
            total += 2 * L * E * din if inner and i == 0 else 0
        else:
            steps = sum(_steps(s, span))
            # S_t of the steps, their orthogonalisation, W_t of every token, W_t z_t.
            total += 2 * steps * E * dout * din + steps * newton_schulz_flops(dout, din, s.ns_steps)
            total += 2 * L * steps * dout * din + read
    if s.update == "gd":
        # P C and P thbar, and their last rows by themselves.
        total += (L + 1) * _row_flops(L, E, s.momentum)
    return total


def _factor_flops(
    shapes: list[tuple[int, int]], dv: int, L: int, E: int, write_discount: bool
) -> int:
    """One chunk's gradient factors, and what a deep memory's discount asks of them."""
    phi, hidden, inner = shapes[-1][1], shapes[0][1], len(shapes) - 1
    # M(k) forward, and back through W_1 to the hidden units.
    total = inner * 2 * E * phi * hidden + 2 * E * hidden * dv
    total += 2 * E * dv * hidden if inner else 0
    if write_discount and inner:
        # |h h^T|, |f f^T|, the bound on ||W_1||; the gated memory's hidden units once more.
        total += 2 * L * L * (hidden + (2 if inner == 1 else 4))
        total += 2 * min(dv, hidden) ** 2 * max(dv, hidden)
        total += inner * 2 * E * phi * hidden if inner == 2 else 0
    return total


def _row_flops(L: int, E: int, momentum: bool) -> int:
    """One row of P C and of P thbar."""
    return 2 * L * E + (2 * L if momentum else 0)


def walk_flops(
    tensors: Sequence[Shape], memory: str, objective: str, momentum: bool, discount: bool
) -> int:
    """Of `omega_walk`, for the shapes of its tensors."""
    (count, groups, E, _), L = tensors[0], tensors[2][-1]
    weights = MEMORIES[memory].weights
    first = len(tensors) - 1 - weights * (2 if momentum else 1)
    shapes = [(w[1], w[2]) for w in tensors[first : first + weights]]
    total = _factor_flops(shapes, shapes[0][0], L, E, discount)
    total += sum((4 if momentum else 2) * dout * E * din for dout, din in shapes)
    if discount:
        total += 2 * L * L + _row_flops(L, E, momentum)  # rho, the last rows
    return count * groups * total


def walk_backward_flops(
    tensors: Sequence[Shape], memory: str, objective: str, momentum: bool, discount: bool
) -> int:
    """Of its backward: each product again, and one for each factor's gradient."""
    total = 3 * walk_flops(tensors, memory, objective, momentum, discount)
    if objective == "dot":  # as in `backward_flops`
        count, groups, keys, _ = tensors[0]
        first = len(tensors) - 1 - MEMORIES[memory].weights * (2 if momentum else 1)
        total -= 2 * count * groups * 2 * keys * tensors[first][1] * tensors[first][2]
    return total


def _steps(s: Settings, span: int) -> list[bool]:
    """At which tokens of a chunk Muon takes a step."""
    return [t % s.ns_every == s.ns_every - 1 or t == s.chunk_size - 1 for t in range(span)]
