"""What becomes of S_t before it is taken off the memory: U(S) (specification sections 5, 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from atlas_blocks.names import add_to
from atlas_blocks.newton_schulz.definition import orthogonalise

# S [..., dout, din] of every weight, and the rule's `ns_steps` -> U(S).
Direction = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Update:
    """M_t = alpha_t M_{t-1} - eta_t U(S_t).

    direction: U, differentiable in S; None is U(S) = S, of which whole chunks have a closed form.
    eta_init: what a layer's write strength starts at where nothing else is said.
    """

    direction: Direction | None
    eta_init: float


UPDATES: dict[str, Update] = {
    "gd": Update(None, eta_init=0.5),
    # Steps of spectral size 1, whatever the error.
    "muon": Update(orthogonalise, eta_init=0.05),
}


def register_update(name: str, update: Update) -> None:
    """Let rules and layers have `update=name`. Raises ValueError for a name that is taken."""
    add_to("update", UPDATES, name, update)
