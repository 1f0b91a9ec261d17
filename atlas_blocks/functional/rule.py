"""What `omega_rule` and its reference share: the settings, the state and the checks at the door.

B batch, T tokens, H heads, Dk key width, Dv value width, Dphi = width after the feature map,
c window, b chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.functional.documents import check_packed
from atlas_blocks.functional.features import FeatureMap
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.state import State


@dataclass(frozen=True)
class Rule:
    """The settings that define the function. See `omega_rule` for each."""

    memory: str
    objective: str
    update: str
    ns_steps: int
    ns_every: int
    chunk_size: int
    errors: str
    window: int
    decay_to: str = "zero"

    def __post_init__(self) -> None:
        check.choice("memory", self.memory, MEMORIES)
        check.choice("objective", self.objective, ("l2", "dot"))
        check.choice("update", self.update, ("gd", "muon"))
        check.at_least("ns_steps", self.ns_steps, 0)
        check.at_least("ns_every", self.ns_every, 1)
        check.at_least("chunk_size", self.chunk_size, 1)
        check.choice("errors", self.errors, ("chunk", "online"))
        check.at_least("window", self.window, 1)
        check.choice("decay_to", self.decay_to, ("zero", "initial"))
        if self.errors == "online" and self.update != "gd":
            check.fail("errors", f'"chunk" with update={self.update!r}', "'online'")

    @property
    def corrects(self) -> bool:
        """Whether errors are corrected for what the chunk has written: those of "dot" cannot be."""
        return self.errors == "online" and self.objective == "l2"

    @property
    def limits(self) -> bool:
        """Whether a token's own step is limited: a matrix memory's gradient of "dot" never sees
        the memory, so that no step of it feeds back."""
        return self.errors == "online" and (self.objective == "l2" or self.memory != "matrix")

    @property
    def rewinds(self) -> bool:
        """Whether a call that begins inside a chunk does that chunk again from its start.

        Muon goes on from where it stands instead, as the steps of a chunk are dear; what does not
        depend on where its chunks lie begins one at every call.
        """
        free = self.objective == "dot" or (self.corrects and self.window == 1)
        return self.update == "gd" and not (self.memory == "matrix" and free)

    @property
    def history(self) -> int:
        """How many past tokens the rule looks at again: the window's halo, a begun chunk's."""
        return self.window - 1 + (self.chunk_size - 1 if self.rewinds else 0)

    @property
    def keeps_start(self) -> bool:
        """Whether the state holds the memory at the chunk's start."""
        return self.rewinds or self.update == "muon"

    def place(self, position: int) -> int:
        """Where in its chunk a call at this position begins."""
        return position % self.chunk_size if self.keeps_start else 0

    def steps_at(self, position: int) -> bool:
        """Whether a Muon step is taken at this position of the chunk (specification section 7)."""
        return position % self.ns_every == self.ns_every - 1 or position == self.chunk_size - 1


class OmegaState(State):
    """The rule's state after some tokens (specification section 11); its size never grows.

    weights: M, a tuple of [B, H, dout, din]. momentum: S of the same shapes, () without momentum.
    chunk_start: M^(0) of the chunk that the next token belongs to, () where the rule does not
    depend on where chunks lie; momentum_start: S^(0) likewise, where the rule rewinds.
    keys, values: the last n = `Rule.history` tokens [B, n, H, Dk | Dv], zero before the sequence
    begins. alpha, eta, theta [B, n, H], gamma [B, n, H, c]: their gates where the rule rewinds,
    else n = 0 (theta also without momentum). scale: [B, H], `omega.online.running_scale` at the
    start of that chunk where the rule rewinds, else after the last token. position: int64 [B], on
    the device of the inputs that began the sequence.
    """

    REST: ClassVar[tuple[str, ...]] = (
        "keys", "values", "alpha", "eta", "theta", "gamma", "scale", "position",
    )  # fmt: skip
    EXACT = ("weights", "momentum", "chunk_start", "momentum_start", *REST)

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    chunk_start: tuple[Tensor, ...]
    momentum_start: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor
    gamma: Tensor
    scale: Tensor
    position: Tensor

    @staticmethod
    def groups(rule: Rule, momentum: bool) -> dict[str, bool]:
        """Which of the four groups of weights a state of this rule has."""
        return {
            "weights": True,
            "momentum": momentum,
            "chunk_start": rule.keeps_start,
            "momentum_start": momentum and rule.rewinds,
        }

    @classmethod
    def aligned(cls, states: Sequence[OmegaState]) -> Sequence[OmegaState]:
        """Positions brought to one device: they stay where they are when a state moves."""
        device = states[0].position.device
        return [s.replace(position=s.position.to(device)) for s in states]


class Arguments(NamedTuple):
    """The arguments of `omega_rule`, in the order of `validate`."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor | None
    gamma: Tensor
    weights: Sequence[Tensor]
    feature_map: FeatureMap | None
    rule: Rule
    state: OmegaState | None
    cu_seqlens: Tensor | None = None

    @property
    def sequences(self) -> int:
        """Rows of the batch, or packed documents."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
    weights: Sequence[Tensor],
    feature_map: FeatureMap | None,
    rule: Rule,
    state: OmegaState | None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Raise ValueError for the first argument that does not fit; bounds are read where they are
    used (`documents.document_bounds`)."""
    check.tensor("q", q, "[B, T, H, Dk]", (None, None, None, None))
    batch, length, heads, dk = q.shape
    if cu_seqlens is not None:
        check_packed(cu_seqlens, "q", q)
    check.tensor("k", k, "[B, T, H, Dk]", q.shape, device=q.device)
    check.tensor("v", v, "[B, T, H, Dv]", (batch, length, heads, None), device=q.device)
    for name, gate in (("alpha", alpha), ("eta", eta), ("theta", theta)):
        if gate is not None or name != "theta":
            check.tensor(name, gate, "[B, T, H]", (batch, length, heads), device=q.device)
    check.tensor("gamma", gamma, "[B, T, H, c]", (batch, length, heads, None), device=q.device)
    dv = v.shape[-1]
    width = dk if feature_map is None else feature_map.width_of(dk)
    count = MEMORIES[rule.memory].weights
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        got = f"{len(weights)} of them" if isinstance(weights, (list, tuple)) else type(weights)
        check.fail("weights", f"a list of {count} tensors for memory={rule.memory!r}", got)
    hidden = weights[0].shape[-1] if weights[0].ndim == 3 else None
    check.tensor(
        "weights[0]",
        weights[0],
        "[H, Dv, hidden]" if count > 1 else "[H, Dv, Dphi]",
        (heads, dv, None if count > 1 else width),
        device=q.device,
    )
    for i in range(1, count):
        check.tensor(
            f"weights[{i}]",
            weights[i],
            "[H, hidden, Dphi]",
            (heads, hidden, width),
            device=q.device,
        )
    if state is None:
        return
    if not isinstance(state, OmegaState):
        check.fail("state", "an OmegaState or None", type(state).__name__)
    batch = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = [(batch, *w.shape) for w in weights]
    for name, there in OmegaState.groups(rule, theta is not None).items():
        group, wanted = getattr(state, name), shapes if there else []
        if [tuple(t.shape) for t in group] != wanted:
            check.fail(f"state.{name}", f"shapes {wanted}", [list(t.shape) for t in group])
    n, window = rule.history, rule.window
    gates = n if rule.rewinds else 0
    decays = gates if theta is not None else 0
    check.tensor("state.keys", state.keys, "[B, n, H, Dk]", (batch, n, heads, dk))
    check.tensor("state.values", state.values, "[B, n, H, Dv]", (batch, n, heads, dv))
    check.tensor("state.alpha", state.alpha, "[B, n, H]", (batch, gates, heads))
    check.tensor("state.eta", state.eta, "[B, n, H]", (batch, gates, heads))
    check.tensor("state.theta", state.theta, "[B, n, H]", (batch, decays, heads))
    check.tensor("state.gamma", state.gamma, "[B, n, H, c]", (batch, gates, heads, window))
    check.tensor("state.scale", state.scale, "[B, H]", (batch, heads))
    check.tensor("state.position", state.position, "[B]", (batch,), (torch.int64,))


def checked(a: Arguments) -> Arguments:
    """The same with a state in the dtype of the arithmetic. Raises ValueError as `validate` does
    and for a state on another device or of less than float32."""
    validate(*a)
    return a if a.state is None else a._replace(state=a.state.fitted(a.q, a.v))


def initial_state(
    q: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    rule: Rule,
    momentum: bool,
    sequences: int | None = None,
) -> OmegaState:
    """M = M_0, S = 0, nothing seen, of so many sequences (None: the batch of q); float32, or
    float64 where an input is."""
    batch, _, heads, dk = q.shape
    batch = batch if sequences is None else sequences
    dtype = state_dtype(q, v, *weights)

    def start() -> tuple[Tensor, ...]:
        # Cloned: a state that is carried on may not change with the parameters that it began as.
        return tuple(w.to(dtype).expand(batch, *w.shape).clone() for w in weights)

    def zero() -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(w) for w in found)

    found = start()
    there = OmegaState.groups(rule, momentum)
    n = rule.history
    gates = n if rule.rewinds else 0

    def past(length: int, *width: int) -> Tensor:
        return q.new_zeros(batch, length, heads, *width, dtype=dtype)

    return OmegaState(
        weights=found,
        momentum=zero() if momentum else (),
        chunk_start=start() if there["chunk_start"] else (),
        momentum_start=zero() if there["momentum_start"] else (),
        keys=past(n, dk),
        values=past(n, v.shape[-1]),
        alpha=past(gates),
        eta=past(gates),
        theta=past(gates if momentum else 0),
        gamma=past(gates, rule.window),
        scale=q.new_zeros(batch, heads, dtype=dtype),
        position=torch.zeros(batch, dtype=torch.int64, device=q.device),
    )


def first_state(a: Arguments) -> OmegaState:
    """The state before the first token."""
    return initial_state(a.q, a.v, a.weights, a.rule, a.theta is not None, a.sequences)


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is, else float32: state and decays are never below float32."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
