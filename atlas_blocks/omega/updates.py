"""What becomes of S_t before it is taken off the memory: U(S) (specification sections 5, 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.names import add_to
from atlas_blocks.newton_schulz.definition import orthogonalise

# S [..., dout, din] of every weight, and the rule's `ns_steps` -> U(S).
Direction = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Update:
    """M_t = alpha_t M_{t-1} - eta_t U(S_t).

    direction: U, differentiable in S, which torch.compile can trace into one graph; None is
    U(S) = S, of which whole chunks have a closed form.
    eta_init: what a layer's write strength starts at where nothing else is said.
    """

    direction: Direction | None
    eta_init: float


UPDATES: dict[str, Update] = {
    "gd": Update(None, eta_init=0.5),
    # Steps of spectral size 1, whatever the error.
    "muon": Update(orthogonalise, eta_init=0.1),
}


def register_update(name: str, update: Update) -> None:
    """Let rules and layers have `update=name`. Raises ValueError for a name that is taken, and for
    an update whose direction is of another shape than S or whose eta_init is not in (0, 1)."""
    if not isinstance(update, Update):
        check.fail("update", "an Update", type(update).__name__)
    check.between("update.eta_init", update.eta_init, 1e-6, 1 - 1e-6)
    if update.direction is not None:
        s = torch.eye(3, 4).expand(2, 3, 4)
        found = update.direction(s, 2)
        if not isinstance(found, Tensor) or found.shape != s.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            check.fail("update.direction", "U(S) of the shape of S, [..., dout, din]", got)
    add_to("update", UPDATES, name, update)
