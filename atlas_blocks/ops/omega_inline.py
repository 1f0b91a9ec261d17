"""The Omega rule traced into a compiled graph: only the walk over the chunks' ends is a node.

What needs no memory and what reads it is computed for all chunks at once (functional/chunks.py and
walk.py), without a loop, so the compiler may fuse it with what is around it. Serves a sequence that
begins with a whole chunk, with gradient descent, one that lies within a chunk, and one token at any
place, of which the walk is no node either.

Axes as in functional/chunks.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.functional import walk
from atlas_blocks.functional.chunks import Discount, Last, Piece, Tokens, Write, cut
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.functional.omega_rule import prepare, run_at
from atlas_blocks.functional.one_token import one_token
from atlas_blocks.functional.rule import Arguments, OmegaState, Rule, first_state
from atlas_blocks.functional.walk import ChunkMemory, Ends, Step
from atlas_blocks.ops import compiled, recomputed
from atlas_blocks.ops.contract import recording
from atlas_blocks.ops.polynomial_features import as_node
from atlas_blocks.ops.providers import Provider

NAME = "inline"
TOKENS = 512  # that one piece of the backward computes again, or one chunk


def _supports(call: Any) -> str | None:
    if not call.traced:
        return "it is chosen where torch.compile traces the rule, and so before there is a node"
    if call.rule.update != "gd" and call.chunks not in ("one", "token"):
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
    """`Call.chunks` of a call whose first token has this place in its chunk, where that is known.

    One without a state may be of any length, and is not looked at: a graph serves them all.
    """
    if a.state is None:
        return "whole"
    if place is None:
        return "token" if a.q.shape[1] == 1 else "any"
    if place + operator.index(a.q.shape[1]) <= a.rule.chunk_size:
        return "one"
    return "whole" if place == 0 else "any"


def run(a: Arguments, place: int | None = None) -> tuple[Tensor, OmegaState]:
    """`functional.omega_rule.run` of "whole" or "one" of chunks, or of a "token"."""
    rule, (batch, length, heads, _) = a.rule, a.q.shape
    a = a._replace(feature_map=as_node(a.feature_map))
    if chunks_of(a, place) == "token":
        with torch.autocast(a.q.device.type, enabled=False):
            return one_token(a)
    if place is not None and chunks_of(a, place) == "one":
        assert a.state is not None
        with torch.autocast(a.q.device.type, enabled=False):
            return run_at(a, a.state.position[:, None], place)
    chunk, state = rule.chunk_size, a.state or first_state(a)
    position = 0 if a.state is None else state.position[:, None]
    with torch.autocast(a.q.device.type, enabled=False):
        tokens, memory, history = prepare(a._replace(state=state), position)
        count = (length + chunk - 1) // chunk
        piece = Piece(0, chunk, count, 0)
        write, read = cut(rule, a.feature_map, _whole_chunks(tokens, rule, count), piece)
        discount = write.discount is not None
        found = iter(
            _walk(
                [*write.tensors(), *memory.start()],
                rule.memory, rule.objective, a.theta is not None, discount,
            )
        )  # fmt: skip
        ends, after = _unflatten_ends(found, rule.memory, a.theta is not None)
        y = walk.read_chunks(rule, write, read, ends)

    def rows(t: Tensor) -> Tensor:
        """[G, ...] -> [B, H, ...]."""
        return t.unflatten(0, (batch, heads))

    # A chunk longer than it can be: whether the cut leaves it contiguous would be a guard.
    y = rows(F.pad(y, [0, 0, 0, chunk]))[:, :, :length].transpose(1, 2)

    # M^(0) of the token that comes next: of the last chunk, or M after a whole one.
    newest = length // chunk
    starts = tuple(
        torch.cat([start, end.unsqueeze(0)])[newest]
        for start, end in zip(ends.starts, after.weights, strict=False)
    )
    # Without momentum the tokens filled in would leave none.
    scale = ends.scales.transpose(1, 2).flatten(0, 1)[length - 1]
    keys, values, writes = history
    state = OmegaState(
        weights=tuple(map(rows, after.weights)),
        momentum=tuple(map(rows, after.momentum)),
        chunk_start=tuple(map(rows, starts)),
        keys=keys,
        values=values,
        writes=writes,
        scale=rows(scale),
        position=state.position + length,
    )
    return y.to(a.q.dtype), state


def _whole_chunks(x: Tokens, rule: Rule, count: int) -> Tokens:
    """With tokens that change no memory after the last, up to whole chunks."""
    length, past = count * rule.chunk_size, rule.history

    def more(t: Tensor, value: float = 0.0, past: int = 0) -> Tensor:
        # A whole chunk, then cut: nothing here may depend on how far the last one is filled.
        whole = F.pad(t, [*(t.ndim - 2) * (0, 0), 0, rule.chunk_size], value=value)
        return whole[:, : past + length]

    return Tokens(
        q_raw=more(x.q_raw),
        k_raw=more(x.k_raw, past=past),
        q=more(x.q),
        k=more(x.k, past=past),
        v=more(x.v, past=past),
        alpha=more(x.alpha, 1.0),
        eta=more(x.eta),
        theta=None if x.theta is None else more(x.theta, 1.0),
        gamma=more(x.gamma),
        writes=None if x.writes is None else more(x.writes, past=past),
    )


# --- the op: tensors are those of `Write`, then of `ChunkMemory.start()` ------------------------


def _unflatten(
    tensors: Sequence[Tensor], memory: str, momentum: bool, discount: bool
) -> tuple[Write, ChunkMemory]:
    parts = iter(tensors)

    def several(count: int) -> list[Tensor]:
        return [next(parts) for _ in range(count)]

    k, target, eta, abar, decay = several(5)
    thbar, thbar_last = several(2) if momentum else (None, None)
    window, window_last = several(2)
    of_discount = last = None
    if discount:
        similarity, squares, held, writes = several(4)
        decays = next(parts) if momentum else None
        of_discount = Discount(similarity, squares, held, writes, decays)
    else:
        last = Last(next(parts), next(parts) if momentum else None)
    write = Write(
        k, target, eta, abar, decay, thbar, thbar_last, window, window_last, of_discount, last
    )
    count = MEMORIES[memory].weights
    weights, s = several(count), several(count if momentum else 0)
    return write, ChunkMemory(weights, s, weights, next(parts))


def _unflatten_ends(
    parts: Iterator[Tensor], memory: str, momentum: bool
) -> tuple[Ends, ChunkMemory]:
    count = MEMORIES[memory].weights
    both = count * (2 if momentum else 1)
    starts = [next(parts) for _ in range(both + 1)]
    factors = [(next(parts), next(parts)) for _ in range(count)]
    eta, scales = next(parts), next(parts)
    weights, s = ([next(parts) for _ in range(n)] for n in (count, both - count))
    return Ends(starts, factors, eta, scales), ChunkMemory(weights, s, weights, next(parts))


def _outputs(ends: Ends, after: ChunkMemory) -> list[Tensor]:
    """What the op returns."""
    factors = [t for factor in ends.factors for t in factor]
    return [*ends.starts, *factors, ends.eta, ends.scales, *after.start()]


def _prepare(
    tensors: Sequence[Tensor], memory: str, objective: str, momentum: bool, discount: bool
) -> tuple[Rule, Write, ChunkMemory, Step]:
    write, start = _unflatten(tensors, memory, momentum, discount)
    span, keys = write.window.shape[-2:]
    rule = Rule(memory, objective, "gd", 0, 1, span, discount, keys - span + 1)
    start = start.map(compiled.alike)
    sizes = (t.shape[2:] for t in (*write.tensors(), *start.weights))
    return rule, write, start, _compiled_step(compiled.key(rule, write, sizes))


def _run(tensors: Sequence[Tensor], *settings: Any) -> list[Tensor]:
    rule, write, start, step = _prepare(tensors, *settings)
    with recording():  # the first call comes under a dispatch mode; a guard would tell them apart
        return _outputs(*walk.walk_ends(rule, write.unbind(), start, 0, None, step))


def _differentiate(
    grads: Sequence[Tensor], tensors: Sequence[Tensor], results: Sequence[Tensor], *settings: Any
) -> list[Tensor]:
    """From the last chunks to the first, several at a time computed again from what they start
    with: one by one they would take longer to set out than to compute."""
    rule, write, start, step = _prepare(tensors, *settings)
    weights, count = len(start.weights), len(start.start())
    # As `_outputs` lists them: the chunks' starts first, the memory at the end last.
    starts, of_ends, after = results[:count], grads[:-count], list(grads[-count:])
    found, several = [], max(1, TOKENS // rule.chunk_size)

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.is_floating_point())

    for first in reversed(range(0, write.k.shape[0], several)):
        part = slice(first, first + several)
        xs = write.map(lambda t, part=part: leaf(t[part]))
        begin = [leaf(t[first]) for t in starts]
        w = begin[:weights]
        memory = ChunkMemory(w, begin[weights:-1], w, begin[-1])
        walked = _outputs(*walk.walk_ends(rule, xs.unbind(), memory, 0, None, step))
        pairs = zip(walked, [*(t[part] for t in of_ends), *after], strict=True)
        outputs, gradients = zip(*(p for p in pairs if p[0].requires_grad), strict=True)
        leaves = [t for t in (*xs.tensors(), *begin) if t.requires_grad]
        one = torch.autograd.grad(
            outputs, leaves, gradients, allow_unused=True, materialize_grads=True
        )
        found.append(one[:-count])
        after = list(one[-count:])
    return [*(torch.cat(gs) for gs in zip(*reversed(found), strict=True)), *after]


@functools.cache
def _compiled_step(key: compiled.Key) -> Step:
    """`chunk_end`, for a deep memory compiled once for these sizes, whatever the batch and the
    length. A matrix memory's is too little work for what a call of compiled code costs."""
    if key.rule.memory == "matrix":
        return walk.chunk_end

    def step(rule: Rule, x: Write, memory: ChunkMemory) -> Any:
        factors, eta, scales, end = walk.chunk_end(rule, x, memory)
        # Laid out as the memory it began with, so that the next chunk is served by what serves it.
        return factors, eta, scales, end.map(Tensor.contiguous)

    return compiled.once(step)


def _fake(
    tensors: Sequence[Tensor], memory: str, objective: str, momentum: bool, discount: bool
) -> list[Tensor]:
    write, start = _unflatten(tensors, memory, momentum, discount)
    count = write.k.shape[0]
    begin = [t.new_empty(count, *t.shape) for t in start.start()]
    factors = [
        write.k.new_empty(*write.k.shape[:-1], width)
        for w in start.weights
        for width in w.shape[1:]
    ]
    end = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in start.start()]
    tokens = [write.eta.new_empty(write.eta.shape) for _ in range(2)]
    return [*begin, *factors, *tokens, *end]


_walk = recomputed.define(
    "omega_walk", "str memory, str objective, bool momentum, bool discount", _run, _fake,
    _differentiate,
)  # fmt: skip
