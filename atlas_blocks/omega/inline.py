"""The Omega rule traced into a compiled graph: only the walk over the chunks' ends is a node.

What needs no memory and what reads it is computed for all chunks at once (omega/chunks.py and
walk.py), without a loop, so the compiler may fuse it with what is around it. Serves a sequence that
begins with a whole chunk, with gradient descent, one that lies within a chunk, and one token at any
place, of which the walk is no node either.

Axes as in omega/chunks.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.autocast import no_autocast
from atlas_blocks.graph import compiled_steps, op_pair
from atlas_blocks.graph.contract import recording
from atlas_blocks.graph.providers import Provider
from atlas_blocks.omega import online, walk
from atlas_blocks.omega.arguments import Arguments, first_state
from atlas_blocks.omega.chunks import Coefficients, Piece, Tokens, Write, cut
from atlas_blocks.omega.definition import next_state, prepare, run_at
from atlas_blocks.omega.one_token import one_token
from atlas_blocks.omega.polynomial_node import as_node
from atlas_blocks.omega.rule import SCHEMA as RULE_SCHEMA
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState
from atlas_blocks.omega.walk import ChunkMemory, Ends, Step

NAME = "inline"
TOKENS = 512  # that one piece of the backward computes again, or one chunk


def _supports(call: Any) -> str | None:
    if not call.traced:
        return "it is chosen where torch.compile traces the rule, and so before there is a node"
    if not call.rule.linear and call.chunks not in ("one", "token"):
        return f"update={call.rule.update!r} reads the memory inside the loop over chunks"
    if call.chunks == "any":
        return "a state may be in the middle of a chunk, and chunks are taken whole"
    if call.packed:
        return "packed documents do not begin with whole chunks"
    return None


def _no_node(*arguments: Any) -> Any:
    raise NotImplementedError("'inline' is no provider of a node: it is traced in its place")


PROVIDER = Provider(NAME, _supports, _no_node, _no_node)


def chunks_of(a: Arguments, place: int | None) -> str:
    """`OmegaCall.chunks` of a call whose first token has this place in its chunk, if it is known.

    One without a state may be of any length, and is not looked at: a graph serves them all.
    """
    if a.state is None:
        return "whole"
    if not a.rule.keeps_start:  # chunks begin with the call
        return "token" if a.q.shape[1] == 1 else "whole"
    if place is None:
        return "token" if a.q.shape[1] == 1 else "any"
    if place + operator.index(a.q.shape[1]) <= a.rule.chunk_size:
        return "one"
    return "whole" if place == 0 else "any"


def trace(a: Arguments, place: int | None = None) -> tuple[Tensor, OmegaState]:
    """`definition.run` of "whole" or "one" of chunks, or of a "token"."""
    rule, (batch, length, heads, _) = a.rule, a.q.shape
    a = a._replace(feature_map=as_node(a.feature_map))
    if chunks_of(a, place) == "token":
        with no_autocast(a.q):
            return one_token(a)
    if place is not None and chunks_of(a, place) == "one":
        assert a.state is not None
        with no_autocast(a.q):
            return run_at(a, a.state.position[:, None], place)
    chunk, state = rule.chunk_size, a.state or first_state(a)
    position = 0 if a.state is None else state.position[:, None]
    a = a._replace(state=state)
    with no_autocast(a.q):
        tokens, memory, history = prepare(a, position)
        count = (length + chunk - 1) // chunk
        piece = Piece(0, chunk, count, 0)
        write, read = cut(
            rule,
            a.feature_map,
            _whole_chunks(tokens, rule, count),
            piece,
            memory.scale,
            _scales_before,
        )
        found = iter(
            _walk(
                [*write.tensors(), *memory.start(), *memory.initial],
                a.theta is not None, *rule.values(),
            )
        )  # fmt: skip
        ends, after = _unflatten_ends(found, rule, a.theta is not None)
        y = walk.read_chunks(rule, read, ends, memory.initial)

    # A chunk longer than it can be: whether the cut leaves it contiguous would be a guard.
    y = F.pad(y.unflatten(0, (batch, heads)), [0, 0, 0, chunk])[:, :, :length].transpose(1, 2)

    # What the next token's chunk starts from: what the last one did, or M after a whole one.
    newest = length // chunk
    *starts, scale = (
        torch.cat([start, end.unsqueeze(0)])[newest]
        for start, end in zip(ends.starts, after.start(), strict=True)
    )
    start, momentum = starts[: len(a.weights)], starts[len(a.weights) :]
    after = after._replace(chunk_start=start, momentum_start=momentum, scale_start=scale)
    return y.to(a.q.dtype), next_state(a, after, history)


def _whole_chunks(x: Tokens, rule: Rule, count: int) -> Tokens:
    """With tokens that change no memory after the last, up to whole chunks."""
    length, n, n_g = count * rule.chunk_size, rule.history, x.alpha.shape[1] - x.q.shape[1]

    def more(t: Tensor, past: int, value: float = 0.0) -> Tensor:
        # A whole chunk, then cut: nothing here may depend on how far the last one is filled.
        whole = F.pad(t, [*(t.ndim - 2) * (0, 0), 0, rule.chunk_size], value=value)
        return whole[:, : past + length]

    return Tokens(
        q_raw=more(x.q_raw, 0),
        k_raw=more(x.k_raw, n),
        q=more(x.q, 0),
        k=more(x.k, n),
        v=more(x.v, n),
        alpha=more(x.alpha, n_g, 1.0),
        eta=more(x.eta, n_g),
        theta=None if x.theta is None else more(x.theta, n_g, 1.0),
        seen=more(x.seen, n_g),
        masses=None if x.masses is None else more(x.masses, n_g),
        weight=None if x.weight is None else more(x.weight, n_g),
        initial=None if x.initial is None else more(x.initial, n),
    )


# --- the op: tensors of `Write`, of `ChunkMemory.start()`, and M_0 if decay leads there ----------


def _waits(rule: Rule) -> bool:
    """Whether limits and corrections wait for the memory."""
    return rule.limits and not rule.structure.linear


def unflatten_walk(tensors: Sequence[Tensor], *how: Any) -> tuple[Rule, Write, ChunkMemory]:
    """The op's rule and records, given its tensors and settings."""
    momentum, *values = how
    rule, parts = Rule(*values), iter(tensors)

    def several(count: int) -> list[Tensor]:
        return [next(parts) for _ in range(count)]

    def optional(there: bool) -> Tensor | None:
        return next(parts) if there else None

    k, target, eta, abar = several(4)
    thbar, thbar_last = optional(momentum), optional(momentum)
    window, window_last = several(2)
    waits = correction = scale = last = None
    if _waits(rule):
        waits = online.Chunk(
            mass=next(parts),
            held=next(parts),
            weight=next(parts),
            theta=optional(momentum),
            momentum=optional(momentum),
            squares=next(parts),
            gram=optional(rule.corrects),
            pending=optional(rule.corrects and rule.window > 1),
            decay=next(parts),
            abar=optional(rule.corrects),
        )
    elif rule.limits:
        if rule.corrects:
            correction = online.Correction(next(parts), next(parts), optional(momentum))
        scale = optional(momentum)
    if waits is None:
        last = Coefficients(next(parts), optional(momentum))
    towards = rule.decay_to == "initial"
    initial = optional(towards and rule.corrects)
    write = Write(
        k, target, eta, abar, thbar, thbar_last, window, window_last, waits, correction, scale,
        last, initial,
    )  # fmt: skip
    count = rule.structure.weights
    weights, s = several(count), several(count if momentum else 0)
    start = ChunkMemory.begin(weights, s, next(parts), several(count if towards else 0))
    return rule, write, start


def _unflatten_ends(
    parts: Iterator[Tensor], rule: Rule, momentum: bool
) -> tuple[Ends, ChunkMemory]:
    count = rule.structure.weights
    both = count * (2 if momentum else 1)
    starts = [next(parts) for _ in range(both + 1)]
    factors = [(next(parts), next(parts)) for _ in range(count)]
    waited = None
    if _waits(rule):
        waited = Coefficients(next(parts), next(parts) if momentum else None)
    weights, s = ([next(parts) for _ in range(n)] for n in (count, both - count))
    return Ends(starts, factors, waited), ChunkMemory.begin(weights, s, next(parts), [])


def outputs(ends: Ends, after: ChunkMemory) -> list[Tensor]:
    """What the op returns."""
    factors = [t for factor in ends.factors for t in factor]
    waited = [] if ends.coefficients is None else ends.coefficients.tensors()
    return [*ends.starts, *factors, *waited, *after.start()]


def _prepare(tensors: Sequence[Tensor], *settings: Any) -> tuple[Rule, Write, ChunkMemory, Step]:
    rule, write, start = unflatten_walk(tensors, *settings)
    start = start.map(compiled_steps.alike)
    sizes = (t.shape[2:] for t in (*write.tensors(), *start.weights))
    return rule, write, start, _compiled_step(compiled_steps.key(rule, write.k, sizes))


def _run(tensors: Sequence[Tensor], *settings: Any) -> list[Tensor]:
    rule, write, start, step = _prepare(tensors, *settings)
    with recording():  # the first call comes under a dispatch mode; a guard would tell them apart
        return outputs(*walk.walk_ends(rule, write.unbind(), start, None, step))


def _differentiate(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], results: Sequence[Tensor], *settings: Any
) -> list[Tensor]:
    """From the last chunks to the first, several at a time computed again from what they start
    with: one by one they would take longer to set out than to compute."""
    rule, write, start, step = _prepare(tensors, *settings)
    weights, count = len(start.weights), len(start.start())
    # As `outputs` lists them: the chunks' starts first, the memory at the end last.
    starts, of_ends, after = results[:count], grads[:-count], list(grads[-count:])
    found, several = [], max(1, TOKENS // rule.chunk_size)
    towards = [torch.zeros_like(t) for t in start.initial]

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.is_floating_point())

    for first in reversed(range(0, write.k.shape[0], several)):
        part = slice(first, first + several)
        xs = write.map(lambda t, part=part: leaf(t[part]))
        begin = [leaf(t[first]) for t in starts]
        initial = [leaf(t) for t in start.initial]
        memory = ChunkMemory.begin(begin[:weights], begin[weights:-1], begin[-1], initial)
        walked = outputs(*walk.walk_ends(rule, xs.unbind(), memory, None, step))
        pairs = zip(walked, [*(t[part] for t in of_ends), *after], strict=True)
        ends, gradients = zip(*(p for p in pairs if p[0].requires_grad), strict=True)
        leaves = [t for t in (*xs.tensors(), *begin, *initial) if t.requires_grad]
        one = torch.autograd.grad(
            ends, leaves, gradients, allow_unused=True, materialize_grads=True
        )
        cuts = len(one) - count - len(initial)
        found.append(one[:cuts])
        after = list(one[cuts : cuts + count])
        towards = [t + g for t, g in zip(towards, one[cuts + count :], strict=True)]
    return [*(torch.cat(gs) for gs in zip(*reversed(found), strict=True)), *after, *towards]


@functools.cache
def _compiled_step(key: compiled_steps.Key) -> Step:
    """`chunk_end`, for a deep memory compiled once for these sizes, whatever the batch and the
    length. A matrix memory's is too little work for what a call of compiled code costs."""
    if isinstance(key.what, Rule) and key.what.structure.linear:
        return walk.chunk_end

    def step(rule: Rule, x: Write, memory: ChunkMemory) -> Any:
        factors, waited, end = walk.chunk_end(rule, x, memory)
        # Laid out as the memory it began with, so that the next chunk is served by what serves it.
        return factors, waited, end.map(Tensor.contiguous)

    return compiled_steps.once(step)


def _fake(tensors: Sequence[Tensor], *settings: Any) -> list[Tensor]:
    _, write, start = unflatten_walk(tensors, *settings)
    count = write.k.shape[0]
    begin = [t.new_empty(count, *t.shape) for t in start.start()]
    factors = [
        write.k.new_empty(*write.k.shape[:-1], width)
        for w in start.weights
        for width in w.shape[1:]
    ]
    end = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in start.start()]
    waited = []
    if write.online is not None:
        # P C and P thbar, of the shapes of C and thbar
        there = (t for t in (write.window, write.thbar) if t is not None)
        waited = [t.new_empty(t.shape) for t in there]
    return [*begin, *factors, *waited, *end]


_walk = op_pair.define_pair(
    "omega_walk",
    f"bool momentum, {RULE_SCHEMA}",
    _run,
    _fake,
    _differentiate,
)

# A loop over the chunks, which tracing would unroll.
_scan = op_pair.define_pair(
    "omega_scales",
    "",
    lambda tensors: [online.scales_before(*tensors)],
    lambda tensors: [torch.empty_like(tensors[0], memory_format=torch.contiguous_format)],
)


def _scales_before(last: Tensor, keep: Tensor, before: Tensor) -> Tensor:
    return _scan([last, keep, before])[0]
