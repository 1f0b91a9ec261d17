"""The settings that make the Omega rule one function: everything but tensors.

c window, b chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from atlas_blocks import check
from atlas_blocks.omega.memories import MEMORIES, Memory
from atlas_blocks.omega.objectives import OBJECTIVES, Objective
from atlas_blocks.omega.updates import UPDATES, Direction


@dataclass(frozen=True)
class Rule:
    """What a memory is, what is written into it, and how (ATLAS Eq. 9-14, 32-33).

        G_t = sum_{j < c} gamma[t, j] grad_M l(M^(0); phi(k_{t-j}), v_{t-j})
        S_t = theta_t S_{t-1} + G_t
        M_t = alpha_t M_{t-1} - eta_t U(S_t)
        y_t = M_t(phi(q_t))

    M^(0) is the memory just before t's chunk of `chunk_size` tokens, counted from the start of the
    sequence: the chunk is part of the function, not a tuning knob.

    memory: M, a name of `MEMORIES`: "matrix" W x; "mlp" r(x) + W1 gelu(W2 x); "gated_mlp"
    r(x) + W1 (gelu(W2 x) * W3 x); r(x) is the key itself where Dk = Dv, else absent.
    objective: l, a name of `OBJECTIVES`: "l2" 1/2 |M(x) - v|^2, or "dot" -<M(x), v>.
    update: U, a name of `UPDATES`: "gd" U(S) = S, or "muon" U(S) = Newton-Schulz of `ns_steps`
    steps. Updates but "gd" are taken only at every `ns_every`-th token of the chunk and at its
    last.
    chunk_size: b. window: c, the last axis of gamma.
    errors: "chunk" takes every key's error at M^(0), as the paper writes it; equal or similar keys
    of a chunk then add up their steps, and the memory may diverge. "online", for "gd", corrects
    each error for what the chunk has written before and limits a token's own step, so that the
    rule is close to that of chunks of one token, or equal to it (a matrix memory, c = 1), and
    bounded (specification 9b).
    decay_to: what retention below 1 leaves: "zero", as in the paper, or "initial", M_0:
    M_t = alpha_t M_{t-1} + (1 - alpha_t) M_0 - eta_t U(S_t), so that hidden units of a deep memory
    stay alive.
    Raises ValueError naming the bad field.
    """

    memory: str = "matrix"
    objective: str = "l2"
    update: str = "gd"
    ns_steps: int = 5
    ns_every: int = 1
    chunk_size: int = 64
    errors: str = "chunk"
    window: int = 1
    decay_to: str = "zero"

    def __post_init__(self) -> None:
        check.choice("memory", self.memory, MEMORIES)
        check.choice("objective", self.objective, OBJECTIVES)
        check.choice("update", self.update, UPDATES)
        check.at_least("ns_steps", self.ns_steps, 0)
        check.at_least("ns_every", self.ns_every, 1)
        check.at_least("chunk_size", self.chunk_size, 1)
        check.choice("errors", self.errors, ("chunk", "online"))
        check.at_least("window", self.window, 1)
        check.choice("decay_to", self.decay_to, ("zero", "initial"))
        if self.errors == "online" and not self.linear:
            check.fail("errors", f'"chunk" with update={self.update!r}', "'online'")

    def values(self) -> tuple[Any, ...]:
        """The fields' values: `Rule(*rule.values())` is the same rule."""
        return tuple(getattr(self, name) for name in NAMES)

    @property
    def structure(self) -> Memory:
        """M: the entry of `memory`."""
        return MEMORIES[self.memory]

    @property
    def criterion(self) -> Objective:
        """l: the entry of `objective`."""
        return OBJECTIVES[self.objective]

    @property
    def direction(self) -> Direction | None:
        """U, None for U(S) = S."""
        return UPDATES[self.update].direction

    @property
    def linear(self) -> bool:
        """Whether U(S) = S, so that the memory after a whole chunk is linear in its gradients."""
        return self.direction is None

    @property
    def corrects(self) -> bool:
        """Whether errors are corrected for what the chunk has written."""
        return self.errors == "online" and self.criterion.correctable

    @property
    def limits(self) -> bool:
        """Whether a token's own step is limited: a matrix memory's gradient of "dot" never sees
        the memory, so that no step of it feeds back."""
        sees = self.criterion.reads or not self.structure.linear
        return self.errors == "online" and sees

    @property
    def rewinds(self) -> bool:
        """Whether a call that begins inside a chunk does that chunk again from its start.

        Steps of U go on from where they stand instead, as those of a chunk are dear; what does not
        depend on where its chunks lie begins one at every call.
        """
        free = not self.criterion.reads or (self.corrects and self.window == 1)
        return self.linear and not (self.structure.linear and free)

    @property
    def history(self) -> int:
        """How many past tokens the rule looks at again: the window's halo, a begun chunk's."""
        return self.window - 1 + (self.chunk_size - 1 if self.rewinds else 0)

    @property
    def keeps_start(self) -> bool:
        """Whether the state holds the memory at the chunk's start."""
        return self.rewinds or not self.linear

    def place(self, position: int) -> int:
        """Where in its chunk a call at this position begins."""
        return position % self.chunk_size if self.keeps_start else 0

    def steps_at(self, position: int) -> bool:
        """Whether a step of U is taken at this position of the chunk (specification section 7)."""
        return position % self.ns_every == self.ns_every - 1 or position == self.chunk_size - 1


NAMES = tuple(field.name for field in fields(Rule))
# The fields as an op's schema has them; annotations are strings here.
SCHEMA = ", ".join(f"{field.type} {field.name}" for field in fields(Rule))
