"""FLOPs of the ops for torch.utils.flop_counter: matrix products, 2 m n k each.

An op's are those of its definition, which is run on tensors without data to be counted. Position
and the bounds of packed documents are data: a call is taken to begin a sequence and to be of one
document. Not counted, as in torch's own formulas: everything that is not a matrix product or a
triangular solve, such as gates and GELU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.functional import walk
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.functional.newton_schulz import backward_flops as newton_schulz_backward_flops
from atlas_blocks.functional.newton_schulz import forward_flops as newton_schulz_flops
from atlas_blocks.functional.omega_backward import omega_rule_backward
from atlas_blocks.functional.omega_rule import run
from atlas_blocks.functional.rule import Arguments
from atlas_blocks.ops import omega_inline
from atlas_blocks.ops.contract import recording
from atlas_blocks.ops.omega_rule import Settings, starts_like, unflatten

Shape = Sequence[int]
Shapes = tuple[tuple[int, ...], ...]


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
        return forward_flops(_shapes(tensors), Settings(*rest[:-2]))

    def backward(grads: Any, tensors: Any, saved: Any, *rest: Any, out_shape: Any = None) -> int:
        return backward_flops(_shapes(tensors), Settings(*rest[:-1]))

    def walked(tensors: Any, *rest: Any, out_shape: Any = None) -> int:
        return walk_flops(_shapes(tensors), *rest[:-1])

    def walk_backward(
        grads: Any, tensors: Any, results: Any, key: Any, *rest: Any, out_shape: Any = None
    ) -> int:
        return walk_backward_flops(_shapes(tensors), *rest[:-1])

    def none(*shapes: Any, out_shape: Any = None) -> int:
        """Monomials are elementwise products."""
        return 0

    def newton_schulz(s: Shape, steps: int, *rest: Any, out_shape: Any = None) -> int:
        return math.prod(s[:-2]) * newton_schulz_flops(s[-2], s[-1], steps)

    def newton_schulz_backward(
        grad: Shape, s: Shape, steps: int, *rest: Any, out_shape: Any = None
    ) -> int:
        return math.prod(s[:-2]) * newton_schulz_backward_flops(s[-2], s[-1], steps)

    def triangular(a: Shape, b: Shape, *rest: Any, out_shape: Any = None, **options: Any) -> int:
        """Half of what a square matrix's product would be."""
        return math.prod(b) * a[-1]

    register_flop_formula(ops.omega_rule)(forward)
    register_flop_formula(ops.omega_rule_backward)(backward)
    register_flop_formula(ops.omega_walk)(walked)
    register_flop_formula(ops.omega_walk_backward)(walk_backward)
    register_flop_formula(ops.newton_schulz)(newton_schulz)
    register_flop_formula(ops.newton_schulz_backward)(newton_schulz_backward)
    register_flop_formula([ops.polynomial_features, ops.polynomial_features_backward])(none)
    solve = torch.ops.aten.linalg_solve_triangular
    if solve not in flop_registry:  # torch has none of its own
        register_flop_formula(solve)(triangular)


@functools.lru_cache(maxsize=256)
def forward_flops(shapes: Shapes, settings: Settings) -> int:
    """Of the forward, for the shapes of the op's tensors."""
    a = _arguments(shapes, settings)
    with torch.no_grad():
        return _counted(lambda: run(a))


@functools.lru_cache(maxsize=256)
def backward_flops(shapes: Shapes, settings: Settings) -> int:
    """Of the definition's backward, which computes the forward once more."""
    a = _arguments(shapes, settings, wanted=True)
    leaves = [t for t in _floating(a) if t.requires_grad]
    with torch.no_grad():
        y, state = run(a)
    grads = [torch.ones_like(t) for t in [y, *state.tensors()[:-1]]]
    return _counted(lambda: omega_rule_backward(a, leaves, starts_like(a), grads))


def walk_flops(shapes: Shapes, *settings: Any) -> int:
    """Of `omega_walk`, for the shapes of its tensors."""
    with torch.no_grad():
        return _counted(lambda: _walked(shapes, settings))


def walk_backward_flops(shapes: Shapes, *settings: Any) -> int:
    """Of its backward: the walk again, and its gradients."""

    def both() -> None:
        outputs, leaves = _walked(shapes, settings)
        outputs = [t for t in outputs if t.requires_grad]
        ones = [torch.ones_like(t) for t in outputs]
        torch.autograd.grad(outputs, leaves, ones, allow_unused=True)

    with torch.enable_grad():
        return _counted(both)


def _counted(call: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    # Formulas are asked for below autograd, whose part it is to say what a backward computes.
    with recording(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _shapes(tensors: Sequence[Shape]) -> Shapes:
    return tuple(tuple(int(n) for n in shape) for shape in tensors)


def _empty(shape: Shape, wanted: bool) -> Tensor:
    return torch.empty(shape, device="meta").requires_grad_(wanted)


def _arguments(shapes: Shapes, settings: Settings, wanted: bool = False) -> Arguments:
    """Of a sequence's beginning, without data."""
    count = 6 + settings.momentum + MEMORIES[settings.memory].weights
    features = {"identity": 0, "polynomial": 1, "sketch": 3}[settings.feature_map]
    tensors = [_empty(shape, wanted) for shape in shapes[: count + features]]
    if settings.feature_map == "sketch":  # the buckets
        tensors[count + 1] = torch.empty(shapes[count + 1], dtype=torch.int64, device="meta")
        tensors[count + 2].requires_grad_(False)
    return unflatten(tensors, settings._replace(packed=False))


def _floating(a: Arguments) -> list[Tensor]:
    gates = [a.alpha, a.eta, a.gamma, *([] if a.theta is None else [a.theta])]
    phi = [] if a.feature_map is None else [a.feature_map.coefficients]
    return [a.q, a.k, a.v, *gates, *a.weights, *phi]


def _walked(shapes: Shapes, settings: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the walk returns, and its leaves."""
    leaves = [_empty(shape, torch.is_grad_enabled()) for shape in shapes]
    rule, write, start = omega_inline.unflatten(leaves, *settings)
    if write.online is not None:
        held = write.online.held > 0
        write = replace(write, online=replace(write.online, held=held))
    ends, after = walk.walk_ends(rule, write.unbind(), start, None)
    return omega_inline.outputs(ends, after), leaves
