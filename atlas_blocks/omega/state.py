"""What the Omega rule carries from one call to the next.

B batch, H heads, Dk key width, Dv value width, c window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from atlas_blocks.omega.rule import Rule
from atlas_blocks.state import State


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
    EXACT = ("weights", "momentum", "chunk_start", "momentum_start", *REST[:-1])

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


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any tensor is, else float32: state and decays are never below float32."""
    double = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
