"""The exact polynomial feature map as an op, forward and backward: see omega_rule.py.

D width before the map, p degree.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.derivatives import once_differentiable
from atlas_blocks.functional.features import FeatureMap, PolynomialMap, polynomial_width
from atlas_blocks.functional.features import polynomial_features as definition
from atlas_blocks.ops import providers
from atlas_blocks.ops.contract import LIBRARY, implement, own, own_empty, recording, untraced

if TYPE_CHECKING:
    from typing_extensions import TypeIs

LIBRARY.define("polynomial_features(Tensor x, Tensor coefficients, str provider) -> Tensor")
# -> the gradients of x and of the coefficients.
LIBRARY.define(
    "polynomial_features_backward(Tensor grad, Tensor x, Tensor coefficients, str provider)"
    " -> Tensor[]"
)


@dataclass(frozen=True)
class Call:
    """What a provider's `supports` learns of a call."""

    device: str  # the device's type
    dtype: torch.dtype  # of x
    width: int  # D
    degree: int
    needs_grad: bool
    index: int | None = None  # the device's number, current while `supports` is asked


def polynomial_features(x: Tensor, coefficients: Tensor, *, provider: str = "auto") -> Tensor:
    """`functional.polynomial_features` by a provider: same arguments, result and errors.

    provider: as of `ops.omega_rule`. Raises ValueError where the one asked for cannot serve. One
    graph node when compiled.
    """
    axes = x.ndim if isinstance(x, Tensor) else 0
    check.tensor("x", x, "[..., D]", max(1, axes) * [None])
    check.tensor("coefficients", coefficients, "[p + 1]", (None,), device=x.device)
    check.at_least("coefficients' length", coefficients.shape[0], 1)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or coefficients.requires_grad)
    # operator.index: a graph serves one width and degree, where sizes are symbolic.
    width, degree = operator.index(x.shape[-1]), operator.index(coefficients.shape[0]) - 1
    facts = (x.device.type, x.dtype, width, degree, needs_grad, x.device.index)
    chosen = _choose(provider, providers.context(), *facts)
    if chosen == providers.DEFINITION and not torch.compiler.is_compiling():
        return definition(x, coefficients)
    if needs_grad:
        return _PolynomialFeatures.apply(chosen, x, coefficients)
    return torch.ops.atlas.polynomial_features.default(x, coefficients, chosen)


class _PolynomialNode(PolynomialMap):
    def __call__(self, x: Tensor) -> Tensor:
        return polynomial_features(x, self.coefficients)


def as_node(feature_map: FeatureMap | None) -> FeatureMap | None:
    """The feature map with polynomials as one node: tracing would go through the tables of
    monomials."""
    if is_polynomial(feature_map):
        return _PolynomialNode(feature_map.coefficients)
    return feature_map


def is_polynomial(feature_map: object) -> TypeIs[PolynomialMap]:
    """Whether it is this library's own; what a subclass makes of it is another function."""
    return type(feature_map) in (PolynomialMap, _PolynomialNode)


@untraced
def _choose(provider: str, context: str, *facts: Any) -> str:
    """Not traced: providers are imported here, may look at the device, and warn."""
    call = Call(*facts)
    return providers.choose("polynomial_features", provider, context, call.device, call)


class _PolynomialFeatures(torch.autograd.Function):
    """Both directions are ops, so that a pass can lower each."""

    @staticmethod
    def forward(ctx: Any, provider: str, x: Tensor, coefficients: Tensor) -> Tensor:
        ctx.provider = provider
        ctx.save_for_backward(x, coefficients)
        return torch.ops.atlas.polynomial_features.default(x, coefficients, provider)

    @staticmethod
    @once_differentiable  # second derivatives are the definition's
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.atlas.polynomial_features_backward.default(
            grads[0], *ctx.saved_tensors, ctx.provider
        )
        return None, *found


def _definition(x: Tensor, coefficients: Tensor) -> Tensor:
    with torch.no_grad():
        return own(definition(x, coefficients))


def _definition_backward(grad: Tensor, x: Tensor, coefficients: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, coefficients)]
    with recording(), torch.enable_grad():
        features = definition(*leaves)
        found = torch.autograd.grad(features, leaves, grad, materialize_grads=True)
    return [own(g) for g in found]


def _forward(x: Tensor, coefficients: Tensor, provider: str) -> Tensor:
    return providers.find("polynomial_features", provider).forward(x, coefficients)


def _backward(grad: Tensor, x: Tensor, coefficients: Tensor, provider: str) -> list[Tensor]:
    return providers.find("polynomial_features", provider).backward(grad, x, coefficients)


def _forward_fake(x: Tensor, coefficients: Tensor, provider: str) -> Tensor:
    degree = operator.index(coefficients.shape[0]) - 1
    return x.new_empty(*x.shape[:-1], polynomial_width(operator.index(x.shape[-1]), degree))


def _backward_fake(grad: Tensor, x: Tensor, coefficients: Tensor, provider: str) -> list[Tensor]:
    return [own_empty(x), own_empty(coefficients)]


providers.define("polynomial_features", _definition, _definition_backward)
implement("polynomial_features", _forward, _forward_fake)
implement("polynomial_features_backward", _backward, _backward_fake)
