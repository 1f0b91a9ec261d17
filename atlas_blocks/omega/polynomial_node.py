"""The exact polynomial features as one node of a traced graph: tracing would go through the tables
of monomials.

D width before the map, p degree.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from atlas_blocks.graph import op_pair
from atlas_blocks.omega.feature_maps import (
    FeatureMap,
    PolynomialMap,
    polynomial_features,
    polynomial_width,
)

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def _features(tensors: Sequence[Tensor]) -> list[Tensor]:
    x, coefficients = tensors
    return [polynomial_features(x, coefficients)]


def _fake(tensors: Sequence[Tensor]) -> list[Tensor]:
    x, coefficients = tensors
    # operator.index: a graph serves one width and degree, where sizes are symbolic.
    dim, degree = operator.index(x.shape[-1]), operator.index(coefficients.shape[0]) - 1
    return [x.new_empty(*x.shape[:-1], polynomial_width(dim, degree))]


_node = op_pair.define_pair("polynomial_features", "", _features, _fake)


class _PolynomialNode(PolynomialMap):
    def __call__(self, x: Tensor) -> Tensor:
        return _node([x, self.coefficients])[0]


def as_node(feature_map: FeatureMap | None) -> FeatureMap | None:
    """The same feature map, a polynomial as one node."""
    if is_polynomial(feature_map):
        return _PolynomialNode(feature_map.coefficients)
    return feature_map


def is_polynomial(feature_map: object) -> TypeIs[PolynomialMap]:
    """Whether it is this library's own; what a subclass makes of it is another function."""
    return type(feature_map) in (PolynomialMap, _PolynomialNode)
