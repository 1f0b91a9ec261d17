"""The Omega rule as one node of a compiled graph, forward and backward.

Outside torch.compile the definition runs under plain autograd. Inside, a loop over chunks would be
unrolled, so the rule is an op: `atlas::omega_rule`, and `atlas::omega_rule_backward`, which runs
the definition again and differentiates it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.functional import rule as rules
from atlas_blocks.functional.features import FeatureMap, PolynomialMap, SketchMap
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.functional.omega_rule import omega_rule as definition
from atlas_blocks.functional.rule import OmegaState, Rule

# Tensors travel as one list: q, k, v, alpha, eta, gamma, [theta], weights, feature tensors, state.
_SETTINGS = (
    "bool momentum, str memory, str objective, str feature_map, int sketch_width, str update, "
    "int ns_steps, int ns_every, int chunk_size, bool write_discount"
)
_RULE_FIELDS = (
    "memory",
    "objective",
    "update",
    "ns_steps",
    "ns_every",
    "chunk_size",
    "write_discount",
)
_LIBRARY = torch.library.Library("atlas", "FRAGMENT")
_LIBRARY.define(f"omega_rule(Tensor[] tensors, {_SETTINGS}) -> Tensor[]")
_LIBRARY.define(f"omega_rule_backward(Tensor[] grads, Tensor[] tensors, {_SETTINGS}) -> Tensor[]")


def omega_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
    weights: Sequence[Tensor],
    memory: str = "matrix",
    objective: str = "l2",
    feature_map: FeatureMap | None = None,
    update: str = "gd",
    ns_steps: int = 5,
    ns_every: int = 1,
    chunk_size: int = 64,
    write_discount: bool = False,
    state: OmegaState | None = None,
) -> tuple[Tensor, OmegaState]:
    """`functional.omega_rule`: same arguments, results and errors; one graph node when compiled."""
    if not torch.compiler.is_compiling():
        return definition(
            q,
            k,
            v,
            alpha=alpha,
            eta=eta,
            theta=theta,
            gamma=gamma,
            weights=weights,
            memory=memory,
            objective=objective,
            feature_map=feature_map,
            update=update,
            ns_steps=ns_steps,
            ns_every=ns_every,
            chunk_size=chunk_size,
            write_discount=write_discount,
            state=state,
        )
    rule = Rule(
        memory, objective, update, ns_steps, ns_every, chunk_size, write_discount, gamma.shape[-1]
    )
    rules.validate(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state)
    tensors, settings = flatten(
        q, k, v, alpha, eta, theta, gamma, weights, rule, feature_map, state
    )
    y, *after = _OmegaRule.apply(settings, *tensors)
    return y, _state(after, len(weights), theta is not None)


def flatten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
    weights: Sequence[Tensor],
    rule: Rule,
    feature_map: FeatureMap | None,
    state: OmegaState | None,
) -> tuple[list[Tensor], tuple]:
    """The arguments as the op's one list of tensors, and its settings in order."""
    kind, width, features = "identity", 0, []
    if isinstance(feature_map, PolynomialMap):
        kind, features = "polynomial", [feature_map.coefficients]
    elif isinstance(feature_map, SketchMap):
        kind, width = "sketch", feature_map.width
        features = [feature_map.coefficients, feature_map.buckets, feature_map.signs]
    momentum = [] if theta is None else [theta]
    tensors = [q, k, v, alpha, eta, gamma, *momentum, *weights, *features]
    if state is not None:
        # Cloned: M^(0) may be M itself, and one tensor may not stand for two inputs.
        start = tuple(w.clone() for w in state.chunk_start)
        tensors += dataclasses.replace(state, chunk_start=start).tensors()
    settings = (len(momentum) == 1, rule.memory, rule.objective, kind, width, rule.update)
    settings += (rule.ns_steps, rule.ns_every, rule.chunk_size, rule.write_discount)
    return tensors, settings


class _OmegaRule(torch.autograd.Function):
    """Both directions are ops, so that a pass can lower each."""

    @staticmethod
    def forward(ctx: Any, settings: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        outputs = torch.ops.atlas.omega_rule.default(list(tensors), *settings)
        ctx.mark_non_differentiable(outputs[-1])  # the position
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)
        found = torch.ops.atlas.omega_rule_backward.default(
            list(grads[:-1]), tensors, *ctx.settings
        )
        floats = [t.is_floating_point() for t in tensors]
        gradients = iter(found)
        return None, *(next(gradients) if is_float else None for is_float in floats)


def _state(tensors: Sequence[Tensor], count: int, momentum: bool) -> OmegaState:
    """The state whose `tensors()` these are; `count` weights."""
    parts = iter(tensors)

    def group(size: int) -> tuple[Tensor, ...]:
        return tuple(next(parts) for _ in range(size))

    weights, momenta, starts = group(count), group(count if momentum else 0), group(count)
    keys, values, writes, scale, position = parts
    return OmegaState(weights, momenta, starts, keys, values, writes, scale, position)


def _arguments(tensors: Sequence[Tensor], *settings: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """The op's flat arguments -> q, k, v and the keyword arguments of the definition."""
    momentum, memory, objective, kind, width, update, *rest = settings
    ns_steps, ns_every, chunk_size, write_discount = rest
    parts = iter(tensors)
    q, k, v, alpha, eta, gamma = (next(parts) for _ in range(6))
    theta = next(parts) if momentum else None
    count = MEMORIES[memory].weights
    weights = [next(parts) for _ in range(count)]
    feature_map: FeatureMap | None = None
    if kind == "polynomial":
        feature_map = PolynomialMap(next(parts))
    elif kind == "sketch":
        feature_map = SketchMap(next(parts), next(parts), next(parts), width)
    state = list(parts)
    return [q, k, v], {
        "alpha": alpha,
        "eta": eta,
        "theta": theta,
        "gamma": gamma,
        "weights": weights,
        "memory": memory,
        "objective": objective,
        "feature_map": feature_map,
        "update": update,
        "ns_steps": ns_steps,
        "ns_every": ns_every,
        "chunk_size": chunk_size,
        "write_discount": write_discount,
        "state": _state(state, count, momentum) if state else None,
    }


def _run(tensors: Sequence[Tensor], *settings: Any) -> list[Tensor]:
    """The definition on the op's flat arguments -> y and the state's tensors."""
    qkv, keywords = _arguments(tensors, *settings)
    y, state = definition(*qkv, **keywords)
    return [y, *state.tensors()]


def _own(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _forward(tensors: list[Tensor], *settings: Any) -> list[Tensor]:
    with torch.no_grad():
        # Cloned: an op may not return its inputs or two views of one tensor.
        return [_own(t) for t in _run(tensors, *settings)]


def _backward(grads: list[Tensor], tensors: list[Tensor], *settings: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in leaves if t.requires_grad]
    with torch.enable_grad():
        outputs = _run(leaves, *settings)[:-1]
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True
        )
    return [_own(g) for g in found]


def _forward_fake(tensors: list[Tensor], *settings: Any) -> list[Tensor]:
    (q, _, v), a = _arguments(tensors, *settings)
    state = a["state"]
    if state is None:
        rule = Rule(
            **{name: a[name] for name in _RULE_FIELDS},
            window=a["gamma"].shape[-1],
        )
        state = rules.initial_state(q, v, a["weights"], rule, a["theta"] is not None)
    empty = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in state.tensors()]
    return [q.new_empty(v.shape), *empty]


def _backward_fake(grads: list[Tensor], tensors: list[Tensor], *settings: Any) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in tensors
        if t.is_floating_point()
    ]


for _name, _implementation, _fake in (
    ("omega_rule", _forward, _forward_fake),
    ("omega_rule_backward", _backward, _backward_fake),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atlas::{_name}", _fake, lib=_LIBRARY)
