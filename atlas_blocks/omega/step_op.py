"""One token of the Omega rule, its state updated in place: decoding, also inside a CUDA graph.

`atlas::omega_rule_step` is the rule of op.py for T = 1 without gradients. Its schema says
that it writes to the state.

B batch, H heads, Dk, Dv key and value width, c window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.autocast import no_autocast
from atlas_blocks.graph import providers
from atlas_blocks.graph.contract import LIBRARY, implement, own, traced, untraced
from atlas_blocks.omega import inline
from atlas_blocks.omega.arguments import Arguments, validate
from atlas_blocks.omega.definition import run
from atlas_blocks.omega.feature_maps import FeatureMap
from atlas_blocks.omega.one_token import one_token
from atlas_blocks.omega.op import (
    SETTINGS,
    OmegaCall,
    Settings,
    call_of,
    facts_of,
    flatten,
    unflatten,
)
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState, state_dtype

# tensors: q, k, v, alpha, eta, gamma, [theta], without the axis of tokens, [M_0 where decay leads
# there], feature tensors.
# state: `OmegaState.tensors()`. -> y.
LIBRARY.define(
    f"omega_rule_step(Tensor[] tensors, Tensor(a!)[] state, {SETTINGS}, str provider) -> Tensor"
)


@dataclass(frozen=True)
class StepCall(OmegaCall):
    """What a provider's `supports` learns of a step: the call of one token, and more."""

    position_device: str  # of state.position, such as "cuda:0"
    state_device: str  # of everything else


def omega_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    gamma: Tensor,
    rule: Rule,
    feature_map: FeatureMap | None = None,
    weights: Sequence[Tensor] | None = None,
    state: OmegaState,
    provider: str = "auto",
) -> Tensor:
    """`functional.omega_rule` for one token of every row, with the state updated in place.

    q, k: [B, H, Dk]; v: [B, H, Dv]; alpha, eta, theta: [B, H]; gamma: [B, H, c]: one token of those
    of `functional.omega_rule`, whose other arguments these are. weights: M_0, which only
    decay_to="initial" looks at; what the memory begins with is in the state.
    state: of an earlier call or `omega.state.initial_state`; every one of its tensors is
    written. Rows may stand at different positions. Its tensors must be contiguous, share no memory
    and have the dtype in which the rule computes, as those of
    `state.clone()` are and do.
    provider: as of `ops.omega_rule`. Where state.position is on a GPU, no provider waits for the
    device and each allocates the same memory at every call, so that a CUDA graph can hold the step,
    captured after one call to warm up.

    Returns y [B, H, Dv] in the dtype of q. Raises ValueError naming a bad argument, and for one
    that requires a gradient while gradients are recorded: the step has none.
    """
    check.tensor("q", q, "[B, H, Dk]", (None, None, None))
    batch, heads, _ = q.shape
    check.tensor("k", k, "[B, H, Dk]", q.shape, device=q.device)
    check.tensor("v", v, "[B, H, Dv]", (batch, heads, None), device=q.device)
    for name, gate in (("alpha", alpha), ("eta", eta), ("theta", theta)):
        if gate is not None or name != "theta":
            check.tensor(name, gate, "[B, H]", (batch, heads), device=q.device)
    if not isinstance(rule, Rule):
        check.fail("rule", "a Rule", type(rule).__name__)
    shape = (batch, heads, rule.window)
    check.tensor("gamma", gamma, "[B, H, rule.window]", shape, device=q.device)
    if not isinstance(state, OmegaState):
        check.fail("state", "an OmegaState", type(state).__name__)
    if rule.decay_to == "initial" and weights is None:
        check.fail("weights", 'M_0, with decay_to="initial"', None)
    count = rule.structure.weights
    if len(state.weights) != count:
        expected = f"{count} tensors for memory={rule.memory!r}"
        check.fail("state.weights", expected, f"{len(state.weights)} of them")
    a = Arguments(
        q=q.unsqueeze(1),
        k=k.unsqueeze(1),
        v=v.unsqueeze(1),
        alpha=alpha.unsqueeze(1),
        eta=eta.unsqueeze(1),
        theta=None if theta is None else theta.unsqueeze(1),
        gamma=gamma.unsqueeze(1),
        weights=_shapes(state.weights) if weights is None else weights,
        feature_map=feature_map,
        rule=rule,
        state=state,
    )
    validate(*a)
    _check_state(a, state)
    if torch.is_grad_enabled():
        _check_gradients(a, state)
    tensors, settings = flatten(a._replace(state=None))
    facts = facts_of(a, False, traced())
    devices = (str(state.position.device), str(q.device))
    chosen = _choose(provider, providers.context(), devices, *facts)
    if chosen == inline.NAME:
        if batch:
            y, after = inline.trace(a)
            for old, new in zip(state.tensors(), after.tensors(), strict=True):
                old.copy_(new)
            return y.squeeze(1)
        chosen = providers.DEFINITION  # of no row there is nothing to inline
    first = 6 + settings.momentum
    rest = tensors[first if rule.decay_to == "initial" else first + count :]
    tensors = [t.squeeze(1) for t in tensors[:first]] + rest
    return torch.ops.atlas.omega_rule_step.default(
        tensors, state.tensors(), *settings.flat(), chosen
    )


def arguments(tensors: list[Tensor], state: list[Tensor], settings: Settings) -> Arguments:
    """The op's arguments as those of `omega_rule`, T = 1."""
    first, count = 6 + settings.momentum, settings.rule.structure.weights
    streams = [t.unsqueeze(1) for t in tensors[:first]]
    weights = _shapes(state[:count]) if settings.rule.decay_to == "zero" else []
    return unflatten([*streams, *weights, *tensors[first:], *state], settings)


def no_backward(*arguments: Any) -> list[Tensor]:
    """The backward of every provider of the step."""
    raise NotImplementedError("omega_rule_step has no gradient; omega_rule has")


def _shapes(weights: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """In place of M_0, of which nothing but the shape is looked at where there is a state."""
    return [w.new_empty(()).expand(w.shape[1:]) for w in weights]


def describe_step(a: Arguments) -> StepCall:
    """What providers learn of a step with these arguments, those of `arguments`."""
    assert a.state is not None
    return _step_call((str(a.state.position.device), str(a.q.device)), *facts_of(a, False))


def _step_call(devices: tuple[str, str], *facts: Any) -> StepCall:
    plain = call_of(*facts)
    known: dict[str, Any] = {f.name: getattr(plain, f.name) for f in fields(plain)}
    return StepCall(**known, position_device=devices[0], state_device=devices[1])


@untraced
def _choose(provider: str, context: str, devices: tuple[str, str], *facts: Any) -> str:
    """Not traced: providers are imported here, may look at the device, and warn."""
    call = _step_call(devices, *facts)
    return providers.choose("omega_rule_step", provider, context, call.device, call)


def _named(state: OmegaState) -> Iterator[tuple[str, Tensor]]:
    for name in ("weights", "momentum", "chunk_start", "momentum_start"):
        for i, t in enumerate(getattr(state, name)):
            yield f"state.{name}[{i}]", t
    for name in OmegaState.REST:
        yield f"state.{name}", getattr(state, name)


def _check_state(a: Arguments, state: OmegaState) -> None:
    """What being written in place asks of a state beyond what `omega_rule` asks."""
    dtype = state_dtype(a.q, a.v, *state.weights)
    for name, t in _named(state):
        if name != "state.position" and (t.dtype, t.device) != (dtype, a.q.device):
            check.fail(name, f"{dtype} on {a.q.device}", f"{t.dtype} on {t.device}")
        if not t.is_contiguous():
            strides = f"strides {list(t.stride())}"
            check.fail(name, "a contiguous tensor (state.clone() has them)", strides)
    if torch.compiler.is_compiling():
        return  # no addresses in a graph
    spans = []
    for name, t in _named(state):
        if t.numel():
            first = t.storage_offset() * t.element_size()
            last = first + t.numel() * t.element_size()
            spans.append((t.untyped_storage()._cdata, first, last, name))
    spans.sort()
    for (storage, _, last, name), (other, first, _, second) in pairwise(spans):
        if storage == other and first < last:
            check.fail(
                second,
                "memory of its own, as every tensor of state.clone() has",
                f"that of {name}",
            )


def _check_gradients(a: Arguments, state: OmegaState) -> None:
    names = ("q", "k", "v", "alpha", "eta", "theta", "gamma")
    named = [(name, getattr(a, name)) for name in names]
    named += [(f"weights[{i}]", w) for i, w in enumerate(a.weights)]
    if a.feature_map is not None:
        named += [(f"feature_map.{name}", part) for name, part in vars(a.feature_map).items()]
    for name, t in (*named, *_named(state)):
        if isinstance(t, Tensor) and t.requires_grad:
            expected = "no gradient wanted (torch.no_grad() around the step; omega_rule has one)"
            check.fail(name, expected, "requires_grad=True")


# --- the op -----------------------------------------------------------------------------------


def _definition(tensors: list[Tensor], state: list[Tensor], settings: Settings) -> Tensor:
    a = arguments(tensors, state, settings)
    assert a.state is not None
    # The position is read where that does not wait for a device.
    step = run if a.state.position.device.type == "cpu" else one_token
    y, after = step(a)
    # Copies first: what comes after may be what was before, as M^(0) at a chunk's first token.
    for old, new in zip(state, [own(t) for t in after.tensors()], strict=True):
        old.copy_(new)
    return own(y.squeeze(1))


def _step(tensors: list[Tensor], state: list[Tensor], *rest: Any) -> Tensor:
    *settings, provider = rest
    with torch.no_grad(), no_autocast(tensors[0]):
        # A kernel's writes are not seen otherwise.
        torch.autograd.graph.increment_version(state)
        serve = providers.find("omega_rule_step", provider).forward
        return serve(tensors, state, Settings.of(*settings))


def _step_fake(tensors: list[Tensor], state: list[Tensor], *rest: Any) -> Tensor:
    return tensors[0].new_empty(tensors[2].shape)


providers.define(
    "omega_rule_step",
    _definition,
    no_backward,
    triton=providers.lazily("atlas_blocks.kernels.decode", automatic_on=("cuda",)),
    inline=providers.lazily("atlas_blocks.omega.inline", automatic_on=("cpu",), special=True),
)
implement("omega_rule_step", _step, _step_fake)
