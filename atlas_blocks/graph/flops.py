"""Formulas for torch.utils.flop_counter: each op brings its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Shape = Sequence[int]
Formula = Callable[..., int]

_formulas: dict[str, Formula] = {}


def count_by(op: str, formula: Formula) -> None:
    """Let `formula` count the op of this name: it takes the op's arguments, shapes for tensors, and
    `out_shape`."""
    _formulas[op] = formula
    register_flop_formulas.cache_clear()


@functools.cache
def register_flop_formulas() -> None:
    """Let torch's FLOP counters count the ops, whoever serves them; a second call does nothing.

    The definition outside of torch.compile is counted without it. Done when a provider is first
    chosen, and not with this library, since torch's counter imports Triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _formulas.items():
        op = getattr(torch.ops.atlas, name)
        if op not in flop_registry:
            register_flop_formula(op)(formula)
    solve = torch.ops.aten.linalg_solve_triangular
    if solve not in flop_registry:  # torch has none of its own
        register_flop_formula(solve)(_triangular)
    grouped = torch.ops.aten._grouped_mm
    if grouped not in flop_registry:
        register_flop_formula(grouped)(_grouped)


def _grouped(a: Shape, b: Shape, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Of rows in groups times a matrix for each, or of columns in groups times rows in groups."""
    return 2 * math.prod(a) * b[-1]


def _triangular(a: Shape, b: Shape, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """Half of what a square matrix's product would be."""
    return math.prod(b) * a[-1]
