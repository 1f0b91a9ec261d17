"""The Omega rule as one node of a compiled graph, forward and backward.

`atlas::omega_rule` and `atlas::omega_rule_backward` are served by a provider, whose name is among
their arguments (see graph/providers.py). Where that is the definition and nothing is compiled, no
op is called: the definition runs under plain autograd. In a graph its loop over chunks would be
unrolled; what of it can be inlined is in inline.py.

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
from atlas_blocks.graph import providers, saved_graphs
from atlas_blocks.graph.contract import (
    LIBRARY,
    distinct,
    implement,
    own,
    own_empty,
    recording,
    traced,
    untraced,
)
from atlas_blocks.omega import inline
from atlas_blocks.omega.arguments import Arguments, checked, first_state
from atlas_blocks.omega.backward import omega_rule_backward
from atlas_blocks.omega.compiled_chunk import compiled_stepwise_chunk as compiled_stepwise_chunk
from atlas_blocks.omega.definition import run
from atlas_blocks.omega.feature_maps import (
    FEATURE_MAPS,
    FeatureMap,
    SketchMap,
    map_of,
    name_of_map,
    parts_of,
    tensors_of_map,
)
from atlas_blocks.omega.groups import chunk_count
from atlas_blocks.omega.polynomial_node import is_polynomial
from atlas_blocks.omega.rule import SCHEMA as RULE_SCHEMA
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState, state_dtype
from atlas_blocks.omega.walk import StepwiseChunk


class Settings(NamedTuple):
    """What the ops take besides tensors. In a graph they are the plain values of `flat`."""

    momentum: bool
    packed: bool  # whether there is cu_seqlens
    feature_map: str  # its name in `FEATURE_MAPS`, or "identity"
    feature_sizes: tuple[int, ...]  # what it is made of besides tensors
    rule: Rule

    def flat(self) -> tuple[Any, ...]:
        """As the ops' schemas have them."""
        return *self[:3], list(self.feature_sizes), *self.rule.values()

    @classmethod
    def of(
        cls, momentum: bool, packed: bool, feature_map: str, feature_sizes: list[int], *rule: Any
    ) -> Settings:
        """The reverse of `flat`."""
        return cls(momentum, packed, feature_map, tuple(feature_sizes), Rule(*rule))


SETTINGS = f"bool momentum, bool packed, str feature_map, int[] feature_sizes, {RULE_SCHEMA}"
# tensors: q, k, v, alpha, eta, gamma, [theta], weights, feature tensors, state, [cu_seqlens] (see
# `unflatten`). The bounds are read and checked in the op's body.
# -> y, the state's tensors and, with `save`, what the backward takes as `saved`: the memory at the
# start of every chunk as `definition.run` describes it, the same for every provider that
# `saves` (nothing for others).
LIBRARY.define(f"omega_rule(Tensor[] tensors, {SETTINGS}, str provider, bool save) -> Tensor[]")
# grads: of y and of the state's tensors but its position. -> those of all floating tensors.
LIBRARY.define(
    "omega_rule_backward(Tensor[] grads, Tensor[] tensors, Tensor[] saved, "
    f"{SETTINGS}, str provider) -> Tensor[]"
)


@dataclass(frozen=True)
class OmegaCall:
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
    feature_map: str  # as in Settings; of a class that is not registered, its name
    degree: int  # p of a polynomial, else 0
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
    rule: Rule,
    feature_map: FeatureMap | None = None,
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
    a = Arguments(q, k, v, alpha, eta, theta, gamma, weights, feature_map, rule, state, cu_seqlens)
    a = checked(a)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(a))
    chosen = _choose(provider, providers.context(), *facts_of(a, needs_grad, traced(), place))
    if chosen == providers.DEFINITION and not torch.compiler.is_compiling():
        return run(a)
    if chosen == inline.NAME:
        if 0 not in q.shape[:2]:
            return inline.trace(a, place)
        chosen = providers.DEFINITION  # of no token there is nothing to inline
    tensors, settings = flatten(a)
    if needs_grad:
        momentum = theta is not None
        results = 1 + len(weights) * sum(OmegaState.groups(rule, momentum).values())
        results += len(OmegaState.REST)
        y, *after = _OmegaRule.apply(settings.flat(), chosen, results, *distinct(tensors))
    else:
        y, *after = torch.ops.atlas.omega_rule.default(tensors, *settings.flat(), chosen, False)
    return y, _state(after, rule, theta is not None)


def describe(a: Arguments, needs_grad: bool) -> OmegaCall:
    """What providers learn of a call with these arguments, outside of torch.compile."""
    return call_of(*facts_of(a, needs_grad))


def facts_of(
    a: Arguments, needs_grad: bool, traced: bool = False, place: int | None = None
) -> tuple:
    """`OmegaCall` as plain values: Dynamo hands no dataclass to a function that it does not
    trace."""
    phi = a.feature_map
    signs = phi.signs if isinstance(phi, SketchMap) else None
    coefficients = getattr(phi, "coefficients", None)

    # operator.index: a graph serves one width, where sizes are symbolic.
    def sizes(*shape: int) -> tuple[int, ...]:
        return tuple(operator.index(n) for n in shape)

    return (
        (a.q.device.type, a.q.device.index),
        tuple(t.dtype for t in _tensors(a) if t.is_floating_point() and t is not signs),
        _state_dtype(a),
        sizes(a.q.shape[2], a.q.shape[3], a.v.shape[3]),
        tuple(sizes(*w.shape[1:]) for w in a.weights),
        a.rule.values(),
        _kind(phi),
        0 if coefficients is None else operator.index(coefficients.shape[0]) - 1,
        a.theta is not None,
        inline.chunks_of(a, place),
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
    rule: tuple[Any, ...],
    feature_map: str,
    degree: int,
    momentum: bool,
    chunks: str,
    needs_grad: bool,
    packed: bool,
    traced: bool,
) -> OmegaCall:
    return OmegaCall(
        device=device[0],
        dtype=dtypes[0],
        dtypes=frozenset(dtypes),
        state_dtype=state_dtype,
        heads=widths[0],
        key_width=widths[1],
        value_width=widths[2],
        feature_width=shapes[-1][1],
        weight_shapes=shapes,
        rule=Rule(*rule),
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
    return providers.choose("omega_rule", provider, context, call.device, call)


def _kind(phi: FeatureMap | None) -> str:
    return "polynomial" if is_polynomial(phi) else name_of_map(phi)


def _tensors(a: Arguments) -> list[Tensor]:
    """Every tensor among the arguments, in the order of the ops. Those of a feature map that is not
    registered are not known."""
    kind = _kind(a.feature_map)
    features = parts_of(a.feature_map, kind)[0] if _is_known(kind) else []
    momentum = [] if a.theta is None else [a.theta]
    state = [] if a.state is None else a.state.tensors()
    packed = [] if a.cu_seqlens is None else [a.cu_seqlens]
    gates = [a.alpha, a.eta, a.gamma, *momentum]
    return [a.q, a.k, a.v, *gates, *a.weights, *features, *state, *packed]


def _is_known(kind: str) -> bool:
    return kind == "identity" or kind in FEATURE_MAPS


def flatten(a: Arguments) -> tuple[list[Tensor], Settings]:
    """The arguments as the ops take them. Raises ValueError for a feature map that is not
    registered: a node is given tensors, and would compute another function of them."""
    kind = _kind(a.feature_map)
    if not _is_known(kind):
        known = ", ".join(sorted({"identity", *FEATURE_MAPS}))
        expected = f"one of {known} where the rule is a node of a graph (register_feature_map)"
        check.fail("feature_map", expected, kind)
    if a.state is not None:
        # Cloned: M^(0) may be M itself, and one tensor may not stand for two inputs.
        start, s = (
            tuple(w.clone() for w in group)
            for group in (a.state.chunk_start, a.state.momentum_start)
        )
        state = a.state.replace(chunk_start=start, momentum_start=s)
        a = a._replace(state=state)
    sizes = tuple(parts_of(a.feature_map, kind)[1])
    packed = a.cu_seqlens is not None
    return _tensors(a), Settings(a.theta is not None, packed, kind, sizes, a.rule)


def unflatten(tensors: Sequence[Tensor], s: Settings) -> Arguments:
    """The arguments whose `flatten` these are."""
    parts = iter(tensors)
    q, k, v, alpha, eta, gamma = (next(parts) for _ in range(6))
    theta = next(parts) if s.momentum else None
    weights = [next(parts) for _ in range(s.rule.structure.weights)]
    features = [next(parts) for _ in range(tensors_of_map(s.feature_map))]
    feature_map = map_of(s.feature_map, features, s.feature_sizes)
    rest = list(parts)
    cu_seqlens = rest.pop() if s.packed else None
    state = _state(rest, s.rule, s.momentum) if rest else None
    return Arguments(
        q, k, v, alpha, eta, theta, gamma, weights, feature_map, s.rule, state, cu_seqlens
    )


def _state(tensors: Sequence[Tensor], rule: Rule, momentum: bool) -> OmegaState:
    """The state whose `tensors()` these are."""
    parts, count = iter(tensors), rule.structure.weights
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
        ctx: Any, settings: tuple, provider: str, results: int, *tensors: Tensor
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
    """Zeros for the memory at the start of every chunk, as `definition.run` fills."""
    batch, length, heads, _ = a.q.shape
    documents = 1 if a.cu_seqlens is None else a.sequences
    chunks = chunk_count(length, a.rule.chunk_size, a.state is not None, documents)
    groups = 1 if a.theta is None else 2
    shapes = [w.shape[1:] for _ in range(groups) for w in a.weights]
    dtype = _state_dtype(a)
    return [a.q.new_zeros(batch, chunks, heads, *shape, dtype=dtype) for shape in [*shapes, ()]]


def _state_dtype(a: Arguments) -> torch.dtype:
    weights = a.weights if a.state is None else a.state.weights
    return state_dtype(a.q, a.v, *weights)


def definition_forward(
    tensors: list[Tensor],
    settings: Settings,
    save: bool,
    stepwise: StepwiseChunk | None = None,
) -> list[Tensor]:
    """The op's body: the definition; stepwise: who does a chunk of an update that is not linear.

    What a short call saves for its backward (graph/saved_graphs.py) is under the last of the chunk
    starts.
    """
    a = unflatten(tensors, settings)
    stepwise = stepwise or _stepwise_on(a.q.device)
    starts = starts_like(a) if save else []

    def results(tensors: Sequence[Tensor]) -> list[Tensor]:
        y, state = run(unflatten(tensors, settings), starts if save else None, stepwise)
        return [y, *state.tensors()]

    if save and saved_graphs.serves(a.q, _largest(a)):
        wanted = [t.is_floating_point() for t in tensors]
        return [*saved_graphs.keep(results, tensors, wanted, starts[-1])[0], *starts]
    with torch.no_grad():
        return [*(own(t) for t in results(tensors)), *starts]


def _largest(a: Arguments) -> int:
    """Numbers in what the rule computes for all tokens: features, or where each has a step the sums
    of gradients that it is taken of."""
    batch, length, heads, _ = a.q.shape
    shapes = [w.shape[1:] for w in a.weights]
    each = shapes[-1][1] if a.rule.linear else sum(map(math.prod, shapes))
    return batch * length * heads * each


def definition_backward(
    grads: list[Tensor],
    tensors: list[Tensor],
    saved: list[Tensor],
    settings: Settings,
    stepwise: StepwiseChunk | None = None,
) -> list[Tensor]:
    """The body of the op's backward."""
    found = saved_graphs.gradients(saved[-1], grads)
    if found is not None:
        return [own(g) for g in found]
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in leaves if t.requires_grad]
    a = unflatten(leaves, settings)
    stepwise = stepwise or _stepwise_on(a.q.device)
    found = omega_rule_backward(a, wanted, saved, grads, stepwise)
    return [own(g) for g in found]


def _stepwise_on(device: torch.device) -> StepwiseChunk | None:
    """Compiled on a CPU, where a chunk is many small operations."""
    return compiled_stepwise_chunk if device.type == "cpu" else None


def _forward(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *settings, provider, save = rest
    serve = providers.find("omega_rule", provider).forward
    with no_autocast(tensors[0]):
        return serve(tensors, Settings.of(*settings), save)


def _backward(
    grads: list[Tensor], tensors: list[Tensor], saved: list[Tensor], *rest: Any
) -> list[Tensor]:
    *settings, provider = rest
    serve = providers.find("omega_rule", provider).backward
    with no_autocast(tensors[0]), recording():
        return serve(grads, tensors, saved, Settings.of(*settings))


def _forward_fake(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *settings, provider, save = rest
    a = unflatten(tensors, Settings.of(*settings))
    state = first_state(a) if a.state is None else a.state
    saved = starts_like(a) if save and providers.find("omega_rule", provider).saves else []
    return [a.q.new_empty(a.v.shape), *(own_empty(t) for t in state.tensors()), *saved]


def _backward_fake(
    grads: list[Tensor], tensors: list[Tensor], saved: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [own_empty(t) for t in tensors if t.is_floating_point()]


providers.define(
    "omega_rule",
    definition_forward,
    definition_backward,
    # For the rule token by token, of which the other would save one memory a token.
    fla=providers.lazily("atlas_blocks.kernels.delta_rule", automatic_on=("cuda",), special=True),
    triton=providers.lazily("atlas_blocks.kernels.omega_rule", automatic_on=("cuda",)),
    # Only where a graph is traced, and not of every call.
    inline=providers.lazily("atlas_blocks.omega.inline", automatic_on=("cpu",), special=True),
    one_token=providers.lazily("atlas_blocks.omega.row_by_row", special=True),
)
implement("omega_rule", _forward, _forward_fake)
implement("omega_rule_backward", _backward, _backward_fake)
