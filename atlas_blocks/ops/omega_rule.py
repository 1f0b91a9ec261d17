"""The Omega rule as one node of a compiled graph, forward and backward.

`atlas::omega_rule` and `atlas::omega_rule_backward` are served by a provider, whose name is among
their arguments (see providers.py). Where that is the definition and nothing is compiled, no op is
called: the definition runs under plain autograd. In a graph its loop over chunks would be unrolled;
what of it can be inlined is in omega_inline.py.

B batch, T tokens, H heads, Dk, Dv key and value width, Dphi width after the feature map, c window,
b chunk, N chunks that a call touches at most.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.autocast import no_autocast
from atlas_blocks.derivatives import once_differentiable
from atlas_blocks.functional import rule as rules
from atlas_blocks.functional.features import FeatureMap, PolynomialMap, SketchMap
from atlas_blocks.functional.groups import chunk_count
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.functional.omega_backward import omega_rule_backward
from atlas_blocks.functional.omega_rule import run
from atlas_blocks.functional.rule import Arguments, OmegaState, Rule
from atlas_blocks.functional.walk import MuonChunk
from atlas_blocks.ops import compiled, kept, omega_inline, providers
from atlas_blocks.ops.contract import (
    LIBRARY,
    distinct,
    implement,
    own,
    own_empty,
    recording,
    traced,
    untraced,
)
from atlas_blocks.ops.polynomial_features import is_polynomial


class Settings(NamedTuple):
    """What the ops take besides tensors, in the order of their schemas."""

    momentum: bool
    memory: str
    objective: str
    feature_map: str  # "identity", "polynomial" or "sketch"
    sketch_width: int  # 0 without a sketch
    update: str
    ns_steps: int
    ns_every: int
    chunk_size: int
    errors: str
    decay_to: str
    packed: bool = False  # whether there is cu_seqlens


SETTINGS = (
    "bool momentum, str memory, str objective, str feature_map, int sketch_width, str update, "
    "int ns_steps, int ns_every, int chunk_size, str errors, str decay_to, bool packed"
)
# tensors: q, k, v, alpha, eta, gamma, [theta], weights, feature tensors, state, [cu_seqlens] (see
# `unflatten`). The bounds are read and checked in the op's body.
# -> y, the state's tensors and, with `save`, what the backward takes as `saved`: the memory at the
# start of every chunk as `functional.omega_rule.run` describes it, the same for every provider that
# `saves` (nothing for others).
LIBRARY.define(f"omega_rule(Tensor[] tensors, {SETTINGS}, str provider, bool save) -> Tensor[]")
# grads: of y and of the state's tensors but its position. -> those of all floating tensors.
LIBRARY.define(
    "omega_rule_backward(Tensor[] grads, Tensor[] tensors, Tensor[] saved, "
    f"{SETTINGS}, str provider) -> Tensor[]"
)


@dataclass(frozen=True)
class Call:
    """What a provider's `supports` learns of a call. No lengths: one graph serves all of them."""

    device: str  # the device's type
    dtype: torch.dtype  # of q and y
    dtypes: frozenset[torch.dtype]  # of all floating tensors but a sketch's signs
    state_dtype: torch.dtype  # of the state and of the definition's arithmetic
    heads: int
    key_width: int
    value_width: int
    feature_width: int  # Dphi
    weight_shapes: tuple[tuple[int, int], ...]  # [dout, din] of every weight
    rule: Rule  # with its window and chunk
    feature_map: str  # as in Settings
    degree: int  # p of the feature map, 0 for the identity
    momentum: bool
    chunks: str  # tokens of "one" chunk, of "whole" ones from a chunk's start, of "any", a "token"
    needs_grad: bool
    packed: bool
    traced: bool  # by torch.compile, and so where a graph can take the rule in
    # The device's number: `supports` is asked with it as the current device.
    index: int | None = field(default=None, kw_only=True)


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
    errors: str = "chunk",
    decay_to: str = "zero",
    state: OmegaState | None = None,
    cu_seqlens: Tensor | None = None,
    place: int | None = None,
    provider: str = "auto",
) -> tuple[Tensor, OmegaState]:
    """`functional.omega_rule` by a provider: same arguments, results and errors.

    place: of the first token in its chunk, state.position modulo chunk_size, where it is known. A
    compiled graph can then take the rule in with a state too, if the tokens are of one chunk, or
    begin one; nothing else looks at it.
    provider: who computes it, "definition" or such as "triton"; "auto" leaves it to `use_provider`,
    or takes the first of the device that supports the call. Raises ValueError where the one asked
    for cannot serve. One graph node when compiled; bounds of packed documents are then read when
    it runs, which on a GPU waits for them: they may be on the CPU instead.
    """
    window = gamma.shape[-1] if isinstance(gamma, Tensor) and gamma.ndim == 4 else 1
    rule = Rule(memory, objective, update, ns_steps, ns_every, chunk_size, errors, window, decay_to)
    a = Arguments(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state, cu_seqlens)
    a = rules.checked(a)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(a))
    chosen = _choose(provider, providers.context(), *facts_of(a, needs_grad, traced(), place))
    if chosen == providers.DEFINITION and not torch.compiler.is_compiling():
        return run(a)
    if chosen == omega_inline.NAME:
        if 0 not in q.shape[:2]:
            return omega_inline.run(a, place)
        chosen = providers.DEFINITION  # of no token there is nothing to inline
    tensors, settings = flatten(a)
    if needs_grad:
        momentum = theta is not None
        results = 1 + len(weights) * sum(OmegaState.groups(rule, momentum).values())
        results += len(OmegaState.REST)
        y, *after = _OmegaRule.apply(settings, chosen, results, *distinct(tensors))
    else:
        y, *after = torch.ops.atlas.omega_rule.default(tensors, *settings, chosen, False)
    return y, _state(after, rule, theta is not None)


def describe(a: Arguments, needs_grad: bool) -> Call:
    """What providers learn of a call with these arguments, outside of torch.compile."""
    return call_of(*facts_of(a, needs_grad))


def facts_of(
    a: Arguments, needs_grad: bool, traced: bool = False, place: int | None = None
) -> tuple:
    """`Call` as plain values: Dynamo hands no dataclass to a function that it does not trace."""
    rule, phi = a.rule, a.feature_map
    signs = phi.signs if isinstance(phi, SketchMap) else None

    # operator.index: a graph serves one width, where sizes are symbolic.
    def sizes(*shape: int) -> tuple[int, ...]:
        return tuple(operator.index(n) for n in shape)

    return (
        (a.q.device.type, a.q.device.index),
        tuple(t.dtype for t in _tensors(a) if t.is_floating_point() and t is not signs),
        _state_dtype(a),
        sizes(a.q.shape[2], a.q.shape[3], a.v.shape[3]),
        tuple(sizes(*w.shape[1:]) for w in a.weights),
        (rule.memory, rule.objective, rule.update, rule.ns_steps, rule.ns_every),
        (rule.chunk_size, rule.errors, operator.index(rule.window), rule.decay_to),
        _kind(phi),
        0 if phi is None else operator.index(phi.coefficients.shape[0]) - 1,
        a.theta is not None,
        omega_inline.chunks_of(a, place),
        needs_grad,
        a.cu_seqlens is not None,
        traced,
    )


def call_of(
    device: tuple[str, int | None],
    dtypes: tuple[torch.dtype, ...],
    state_dtype: torch.dtype,
    widths: tuple[int, int, int],
    shapes: tuple[tuple[int, int], ...],
    how: tuple[str, str, str, int, int],
    size: tuple[int, str, int, str],
    feature_map: str,
    degree: int,
    momentum: bool,
    chunks: str,
    needs_grad: bool,
    packed: bool,
    traced: bool,
) -> Call:
    return Call(
        device=device[0],
        dtype=dtypes[0],
        dtypes=frozenset(dtypes),
        state_dtype=state_dtype,
        heads=widths[0],
        key_width=widths[1],
        value_width=widths[2],
        feature_width=shapes[-1][1],
        weight_shapes=shapes,
        rule=Rule(*how, *size),
        feature_map=feature_map,
        degree=degree,
        momentum=momentum,
        chunks=chunks,
        needs_grad=needs_grad,
        packed=packed,
        traced=traced,
        index=device[1],
    )


@untraced
def _choose(provider: str, context: str, *facts: Any) -> str:
    """Not traced: providers are imported here, may look at the device, and warn."""
    call = call_of(*facts)
    chosen = providers.choose("omega_rule", provider, context, call.device, call)
    if chosen == omega_inline.NAME:
        from atlas_blocks.ops.flops import register_flop_formulas

        register_flop_formulas()
    return chosen


def _kind(phi: FeatureMap | None) -> str:
    """As in `Settings`; of a map of somebody's own, a subclass too, the name of its class."""
    if phi is None:
        return "identity"
    if is_polynomial(phi):
        return "polynomial"
    return "sketch" if type(phi) is SketchMap else type(phi).__name__


def _tensors(a: Arguments) -> list[Tensor]:
    """Every tensor among the arguments, in the order of the ops."""
    phi, features = a.feature_map, []
    if phi is not None:
        features = [phi.coefficients]
    if isinstance(phi, SketchMap):
        features += [phi.buckets, phi.signs]
    momentum = [] if a.theta is None else [a.theta]
    state = [] if a.state is None else a.state.tensors()
    packed = [] if a.cu_seqlens is None else [a.cu_seqlens]
    gates = [a.alpha, a.eta, a.gamma, *momentum]
    return [a.q, a.k, a.v, *gates, *a.weights, *features, *state, *packed]


def flatten(a: Arguments) -> tuple[list[Tensor], Settings]:
    """The arguments as the ops take them. Raises ValueError for a feature map that is none of this
    library's: a node is given tensors, and would compute another function of them."""
    kind = _kind(a.feature_map)
    if kind not in ("identity", "polynomial", "sketch"):
        expected = "a PolynomialMap, a SketchMap or None where the rule is a node of a graph"
        check.fail("feature_map", expected, kind)
    if a.state is not None:
        # Cloned: M^(0) may be M itself, and one tensor may not stand for two inputs.
        start, s = (
            tuple(w.clone() for w in group)
            for group in (a.state.chunk_start, a.state.momentum_start)
        )
        state = a.state.replace(chunk_start=start, momentum_start=s)
        a = a._replace(state=state)
    rule, phi = a.rule, a.feature_map
    return _tensors(a), Settings(
        momentum=a.theta is not None,
        memory=rule.memory,
        objective=rule.objective,
        feature_map=kind,
        sketch_width=phi.width if isinstance(phi, SketchMap) else 0,
        update=rule.update,
        ns_steps=rule.ns_steps,
        ns_every=rule.ns_every,
        chunk_size=rule.chunk_size,
        errors=rule.errors,
        decay_to=rule.decay_to,
        packed=a.cu_seqlens is not None,
    )


def unflatten(tensors: Sequence[Tensor], settings: Settings) -> Arguments:
    """The arguments whose `flatten` these are."""
    s, parts = settings, iter(tensors)
    q, k, v, alpha, eta, gamma = (next(parts) for _ in range(6))
    theta = next(parts) if s.momentum else None
    count = MEMORIES[s.memory].weights
    weights = [next(parts) for _ in range(count)]
    feature_map: FeatureMap | None = None
    if s.feature_map == "polynomial":
        feature_map = PolynomialMap(next(parts))
    elif s.feature_map == "sketch":
        feature_map = SketchMap(next(parts), next(parts), next(parts), s.sketch_width)
    rest = list(parts)
    cu_seqlens = rest.pop() if s.packed else None
    rule = Rule(
        memory=s.memory,
        objective=s.objective,
        update=s.update,
        ns_steps=s.ns_steps,
        ns_every=s.ns_every,
        chunk_size=s.chunk_size,
        errors=s.errors,
        decay_to=s.decay_to,
        window=operator.index(gamma.shape[-1]),
    )
    state = _state(rest, rule, s.momentum) if rest else None
    return Arguments(
        q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state, cu_seqlens
    )


def _state(tensors: Sequence[Tensor], rule: Rule, momentum: bool) -> OmegaState:
    """The state whose `tensors()` these are."""
    parts, count = iter(tensors), MEMORIES[rule.memory].weights
    groups: dict[str, Any] = {
        name: tuple(next(parts) for _ in range(count if there else 0))
        for name, there in OmegaState.groups(rule, momentum).items()
    }
    groups.update(zip(OmegaState.REST, parts, strict=True))
    return OmegaState(**groups)


class _OmegaRule(torch.autograd.Function):
    """Both directions are ops, so that a pass can lower each."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, provider: str, results: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        # results: how many outputs are y and the state; what follows is saved.
        outputs = torch.ops.atlas.omega_rule.default(list(tensors), *settings, provider, True)
        ctx.settings, ctx.provider, ctx.inputs = settings, provider, len(tensors)
        ctx.save_for_backward(*tensors, *outputs[results:])
        ctx.mark_non_differentiable(outputs[results - 1])  # the position
        return tuple(outputs[:results])

    @staticmethod
    @once_differentiable  # second derivatives are the definition's
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # a checkpoint hands them out once
        tensors, saved = kept[: ctx.inputs], kept[ctx.inputs :]
        found = torch.ops.atlas.omega_rule_backward.default(
            list(grads[:-1]), list(tensors), list(saved), *ctx.settings, ctx.provider
        )
        gradients = iter(found)
        inputs = (next(gradients) if t.is_floating_point() else None for t in tensors)
        return None, None, None, *inputs


# --- the ops: what each provider does, and what a fake tensor becomes -------------------------


def starts_like(a: Arguments) -> list[Tensor]:
    """Zeros for the memory at the start of every chunk, as `functional.omega_rule.run` fills."""
    batch, length, heads, _ = a.q.shape
    documents = 1 if a.cu_seqlens is None else a.sequences
    chunks = chunk_count(length, a.rule.chunk_size, a.state is not None, documents)
    groups = 1 if a.theta is None else 2
    shapes = [w.shape[1:] for _ in range(groups) for w in a.weights]
    dtype = _state_dtype(a)
    return [a.q.new_zeros(batch, chunks, heads, *shape, dtype=dtype) for shape in [*shapes, ()]]


def _state_dtype(a: Arguments) -> torch.dtype:
    weights = a.weights if a.state is None else a.state.weights
    return rules.state_dtype(a.q, a.v, *weights)


def definition_forward(
    tensors: list[Tensor],
    settings: Settings,
    save: bool,
    muon: MuonChunk | None = None,
) -> list[Tensor]:
    """The op's body: the definition, whose chunks `muon` does where that is the update.

    What a short call keeps for its backward (kept.py) is under the last of the chunk starts.
    """
    a = unflatten(tensors, settings)
    muon = muon or _muon_on(a.q.device)
    starts = starts_like(a) if save else []

    def results(tensors: Sequence[Tensor]) -> list[Tensor]:
        y, state = run(unflatten(tensors, settings), starts if save else None, muon)
        return [y, *state.tensors()]

    if save and kept.serves(a.q, _largest(a)):
        wanted = [t.is_floating_point() for t in tensors]
        return [*kept.keep(results, tensors, wanted, starts[-1])[0], *starts]
    with torch.no_grad():
        return [*(own(t) for t in results(tensors)), *starts]


def _largest(a: Arguments) -> int:
    """Numbers in what the rule computes for all tokens: features, or with Muon the sums of
    gradients that every token's step is taken of."""
    batch, length, heads, _ = a.q.shape
    shapes = [w.shape[1:] for w in a.weights]
    each = sum(map(math.prod, shapes)) if a.rule.update == "muon" else shapes[-1][1]
    return batch * length * heads * each


def definition_backward(
    grads: list[Tensor],
    tensors: list[Tensor],
    saved: list[Tensor],
    settings: Settings,
    muon: MuonChunk | None = None,
) -> list[Tensor]:
    """The body of the op's backward."""
    found = kept.gradients(saved[-1], grads)
    if found is not None:
        return [own(g) for g in found]
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in leaves if t.requires_grad]
    a = unflatten(leaves, settings)
    muon = muon or _muon_on(a.q.device)
    found = omega_rule_backward(a, wanted, saved, grads, muon)
    return [own(g) for g in found]


def _muon_on(device: torch.device) -> MuonChunk | None:
    """Compiled on a CPU, where a chunk is many small operations."""
    return compiled.muon_chunk if device.type == "cpu" else None


def _forward(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *settings, provider, save = rest
    serve = providers.find("omega_rule", provider).forward
    with no_autocast(tensors[0]):
        return serve(tensors, Settings(*settings), save)


def _backward(
    grads: list[Tensor], tensors: list[Tensor], saved: list[Tensor], *rest: Any
) -> list[Tensor]:
    *settings, provider = rest
    serve = providers.find("omega_rule", provider).backward
    with no_autocast(tensors[0]), recording():
        return serve(grads, tensors, saved, Settings(*settings))


def _forward_fake(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *settings, provider, save = rest
    a = unflatten(tensors, Settings(*settings))
    state = rules.first_state(a) if a.state is None else a.state
    saved = starts_like(a) if save and providers.find("omega_rule", provider).saves else []
    return [a.q.new_empty(a.v.shape), *(own_empty(t) for t in state.tensors()), *saved]


def _backward_fake(
    grads: list[Tensor], tensors: list[Tensor], saved: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [own_empty(t) for t in tensors if t.is_floating_point()]


providers.define("omega_rule", definition_forward, definition_backward)
implement("omega_rule", _forward, _forward_fake)
implement("omega_rule_backward", _backward, _backward_fake)
