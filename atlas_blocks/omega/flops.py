"""FLOPs of the rule's ops for torch.utils.flop_counter: matrix products, 2 m n k each.

An op's are those of its definition, which is run on tensors without data to be counted. Position
and the bounds of packed documents are data: a call is taken to begin a sequence and to be of one
document. Not counted, as in torch's own formulas: everything that is not a matrix product or a
triangular solve, such as gates and GELU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.graph.contract import recording
from atlas_blocks.graph.flops import Shape, count_by
from atlas_blocks.omega import inline, walk
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.backward import omega_rule_backward
from atlas_blocks.omega.definition import run
from atlas_blocks.omega.feature_maps import name_of_map, parts_of, tensors_of_map
from atlas_blocks.omega.op import Settings, starts_like, unflatten

Shapes = tuple[tuple[int, ...], ...]


def _forward(tensors: list[Shape], *rest: Any, out_shape: Any = None) -> int:
    return rule_flops(_shapes(tensors), Settings.of(*rest[:-2]))


def _backward(grads: Any, tensors: Any, saved: Any, *rest: Any, out_shape: Any = None) -> int:
    return rule_backward_flops(_shapes(tensors), Settings.of(*rest[:-1]))


def _walk(tensors: Any, *rest: Any, out_shape: Any = None) -> int:
    return walk_flops(_shapes(tensors), *rest[:-1])


def _walk_backward(
    grads: Any, tensors: Any, results: Any, key: Any, *rest: Any, out_shape: Any = None
) -> int:
    return walk_backward_flops(_shapes(tensors), *rest[:-1])


def _none(*shapes: Any, out_shape: Any = None) -> int:
    """Monomials are elementwise products."""
    return 0


@functools.lru_cache(maxsize=256)
def rule_flops(shapes: Shapes, settings: Settings) -> int:
    """Of the forward, for the shapes of the op's tensors."""
    a = _arguments(shapes, settings)
    with torch.no_grad():
        return _counted(lambda: run(a))


@functools.lru_cache(maxsize=256)
def rule_backward_flops(shapes: Shapes, settings: Settings) -> int:
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
    count = 6 + settings.momentum + settings.rule.structure.weights
    features = tensors_of_map(settings.feature_map)
    tensors = [_empty(shape, wanted) for shape in shapes[: count + features]]
    if settings.feature_map not in ("identity", "polynomial", "sketch"):
        # A map of somebody's has tensors of which the shapes alone are known: it is not counted.
        plain = settings._replace(packed=False, feature_map="identity", feature_sizes=())
        width = tensors[count - 1].shape[-1]
        return unflatten(tensors[:count], plain)._replace(feature_map=_Uncounted(width))
    if settings.feature_map == "sketch":  # the buckets
        tensors[count + 1] = torch.empty(shapes[count + 1], dtype=torch.int64, device="meta")
        tensors[count + 2].requires_grad_(False)
    return unflatten(tensors, settings._replace(packed=False))


@dataclass(frozen=True)
class _Uncounted:
    """A feature map as wide as another, without its work."""

    width: int

    def __call__(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True).expand(*x.shape[:-1], self.width)

    def width_of(self, dim: int) -> int:
        return self.width


def _floating(a: Arguments) -> list[Tensor]:
    gates = [a.alpha, a.eta, a.gamma, *([] if a.theta is None else [a.theta])]
    known = not isinstance(a.feature_map, _Uncounted)
    phi = parts_of(a.feature_map, name_of_map(a.feature_map))[0] if known else []
    return [t for t in (a.q, a.k, a.v, *gates, *a.weights, *phi) if t.is_floating_point()]


def _walked(shapes: Shapes, settings: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the walk returns, and its leaves."""
    leaves = [_empty(shape, torch.is_grad_enabled()) for shape in shapes]
    rule, write, start = inline.unflatten_walk(leaves, *settings)
    if write.online is not None:
        held = write.online.held > 0
        write = replace(write, online=replace(write.online, held=held))
    ends, after = walk.walk_ends(rule, write.unbind(), start, None)
    return inline.outputs(ends, after), leaves


count_by("omega_rule", _forward)
count_by("omega_rule_backward", _backward)
count_by("omega_walk", _walk)
count_by("omega_walk_backward", _walk_backward)
count_by("polynomial_features", _none)
count_by("polynomial_features_backward", _none)
