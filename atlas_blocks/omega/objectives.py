"""What a write makes smaller: l(M(x), v), and its gradient (specification section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atlas_blocks import check
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
    """Let rules and layers have `objective=name`. Raises ValueError for a name that is taken, and
    for an objective that is not what it says of itself, at a few vectors."""
    if not isinstance(objective, Objective):
        check.fail("objective", "an Objective", type(objective).__name__)
    generator = torch.Generator().manual_seed(0)
    y, v, other = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64).unbind()
    error = objective.error(y, v)
    check.agree("objective.error", "dl/dy of objective.loss", error, _gradient(objective, y, v))
    if objective.reads:
        shifted = objective.error(y + other, v + other)
        check.agree("objective.error", "one of y - v alone, as it reads y", shifted, error)
    else:
        unread = objective.error(other, v)
        check.agree("objective.reads", "True, as its error looks at y", unread, error)
    if objective.correctable:
        check.agree("objective.correctable", "False, as its error is not y - v", error, y - v)
    add_to("objective", OBJECTIVES, name, objective)


def _gradient(objective: Objective, y: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad():
        at = y.clone().requires_grad_()
        return torch.autograd.grad(objective.loss(at, v).sum(), at)[0]
