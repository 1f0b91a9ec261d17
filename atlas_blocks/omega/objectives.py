"""What a write makes smaller: l(M(x), v), and its gradient (specification section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atlas_blocks.names import add_to


@dataclass(frozen=True)
class Objective:
    """One loss l(y, v) of what a memory reads, y = M(x), and what it should read.

    loss: y, v [..., Dv] -> [...]. The token-by-token reference differentiates it; all else takes
    `error`. error: y, v -> dl/dy [..., Dv]. Where it looks at y it must be of y - v alone: the
    residual of a deep memory is taken off both.
    reads: whether `error` looks at y. correctable: whether it is y - v itself, which is what errors
    can be corrected for (specification 9b).
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    reads: bool = True
    correctable: bool = False


OBJECTIVES: dict[str, Objective] = {
    "l2": Objective(
        lambda y, v: 0.5 * (y - v).square().sum(-1), torch.sub, reads=True, correctable=True
    ),
    "dot": Objective(lambda y, v: -(y * v).sum(-1), lambda y, v: -v, reads=False),
}


def register_objective(name: str, objective: Objective) -> None:
    """Let rules and layers have `objective=name`. Raises ValueError for a name that is taken."""
    add_to("objective", OBJECTIVES, name, objective)
