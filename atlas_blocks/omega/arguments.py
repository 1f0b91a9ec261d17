"""The arguments of `omega_rule`, checked at the door.

B batch, T tokens, H heads, Dk key width, Dv value width, Dphi = width after the feature map,
c window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.documents.definition import check_packed
from atlas_blocks.omega.feature_maps import FeatureMap
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState, initial_state


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
    if not isinstance(rule, Rule):
        check.fail("rule", "a Rule", type(rule).__name__)
    shape = (batch, length, heads, rule.window)
    check.tensor("gamma", gamma, "[B, T, H, rule.window]", shape, device=q.device)
    dv = v.shape[-1]
    width = dk if feature_map is None else feature_map.width_of(dk)
    count = rule.structure.weights
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


def first_state(a: Arguments) -> OmegaState:
    """The state before the first token."""
    return initial_state(a.q, a.v, a.weights, a.rule, a.theta is not None, a.sequences)
