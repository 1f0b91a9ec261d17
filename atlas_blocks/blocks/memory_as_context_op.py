"""The segments of `MemoryAsContext` as one node of a compiled graph, forward and backward.

A segment reads the memory that the one before it wrote, so the segments are a loop, which tracing
would unroll; and where a segment begins depends on the state's position, which is data. The block
itself says what a segment computes (`define`). The backward of a short call on a CPU finds it all
saved (graph/saved_graphs.py). Any other takes segments in reverse and computes each again from the
memory at its start: only one segment's intermediates exist at a time.

B batch, T tokens, N segments that a call touches at most.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.autocast import autocast_dtype, no_autocast
from atlas_blocks.blocks import as_built
from atlas_blocks.derivatives import once_differentiable
from atlas_blocks.graph import compiled_steps, providers, saved_graphs
from atlas_blocks.graph.contract import (
    LIBRARY,
    distinct,
    implement,
    own,
    own_empty,
    recording,
    untraced,
)
from atlas_blocks.omega import inline
from atlas_blocks.omega.groups import chunk_count
from atlas_blocks.omega.memories import MEMORIES

# block: what `define`'s function builds it from. autocast: its dtype where it is on. provider: of
# `use_provider`, for the ops inside.
# wanted: of which of x, parameters, buffers and state a backward will want the gradient; empty: no
# backward. -> y, the state's tensors and, for a backward, what it takes as `saved`: the memory's
# state before every segment, each of its tensors [B, N, ...], and the key of what is kept.
LIBRARY.define(
    "memory_as_context(Tensor x, Tensor[] parameters, Tensor[] buffers, Tensor[] state, str block,"
    " ScalarType? autocast, str provider, bool[] wanted) -> Tensor[]"
)
# grads: of y and of the state's floating tensors. -> those of the tensors that are wanted.
LIBRARY.define(
    "memory_as_context_backward(Tensor[] grads, Tensor x, Tensor[] parameters, Tensor[] buffers,"
    " Tensor[] state, Tensor[] saved, str block, ScalarType? autocast, str provider, bool[] wanted)"
    " -> Tensor[]"
)

# What the segments use of the block; the rest of it stays in the graph.
PARTS = (
    "attention_norm",
    "attention_out",
    "memory",
    "memory_norm",
    "persistent",
    "qkv",
    "recall_query",
)
_build: list[Callable[[str], Any]] = []


def written(parts: dict[str, Any]) -> str:
    """A dict as an argument of the op: JSON without the quotes and backslashes that a compiler of
    C++ would stumble on."""
    return quote(json.dumps(parts), safe=" {}[]:,'.+-_")


def read(description: str) -> dict[str, Any]:
    """What was `written`."""
    return json.loads(unquote(description))


def build_with(build: Callable[[str], Any]) -> None:
    """`build(text)` makes the MemoryAsContext whose `description` is `text`."""
    _build[:] = [build]


def memory_as_context(block: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """All segments of a call as one node: normed x [B, T, dim] and a ContextState -> y, state.

    A block that something was put into (hooks, adapters, parametrisations, other parts) breaks the
    graph and runs as it is: the node builds the block again and knows nothing of them. Raises
    ValueError for such a block where it is exported.
    """
    reason = _deviation(block.description, as_built.identity_of(block, PARTS))
    if reason is not None and torch.compiler.is_exporting():
        check.fail("block", "a MemoryAsContext as its config builds it, to be exported", reason)
    if reason is not None:
        torch._dynamo.graph_break(msg=f"MemoryAsContext runs uncompiled: {reason}")
        return _uncompiled(block, x, state)
    parameters, buffers = tensors_of(block)
    autocast = autocast_dtype(x)
    before = state.tensors()
    # The ops inside are in no graph that could take them in, and choose.
    context = providers.context()
    common = (block.description, autocast, "auto" if context == inline.NAME else context)
    tensors = [x, *parameters, *buffers, *before]
    wanted = [t.requires_grad for t in tensors]
    if torch.is_grad_enabled() and any(wanted):
        sizes = (len(parameters), len(buffers))
        y, *after = _MemoryAsContext.apply(sizes, common, wanted, *distinct(tensors))
    else:
        y, *after = torch.ops.atlas.memory_as_context.default(
            x, parameters, buffers, before, *common, []
        )
    return y, _like(state, after)


@untraced
def _deviation(description: str, facts: tuple[tuple, ...]) -> str | None:
    """Not traced: the block is built here to be compared with."""
    return as_built.deviation(facts, _body(description, threading.get_ident())[0].block, PARTS)


def _uncompiled(block: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    run: Any = torch.compiler.disable(block._rows)
    return run(x, state)


def tensors_of(block: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and the buffers of the parts that the segments use."""

    def used(named: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
        return [t for name, t in named if name.split(".")[0] in PARTS]

    return used(block.named_parameters()), used(block.named_buffers())


def _like(state: Any, tensors: Sequence[Tensor]) -> Any:
    """A state of the same structure with these tensors."""
    parts = iter(tensors)
    return state.map(lambda _: next(parts))


class _MemoryAsContext(torch.autograd.Function):
    """Both directions are ops."""

    @staticmethod
    def forward(
        ctx: Any, sizes: tuple[int, int], common: tuple, wanted: list[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = _split(tensors, sizes)
        outputs = torch.ops.atlas.memory_as_context.default(*inputs, *common, wanted)
        results = 1 + len(inputs[-1])
        ctx.sizes, ctx.common, ctx.wanted = sizes, common, wanted
        ctx.save_for_backward(*tensors, *outputs[results:])
        positions = [t for t in outputs[:results] if not t.is_floating_point()]
        ctx.mark_non_differentiable(*positions)
        ctx.floating = [t.is_floating_point() for t in outputs[:results]]
        return tuple(outputs[:results])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # a checkpoint hands them out once
        inputs = _split(kept[: len(ctx.wanted)], ctx.sizes)
        saved = list(kept[len(ctx.wanted) :])
        of_results = [g for g, floating in zip(grads, ctx.floating, strict=True) if floating]
        op = torch.ops.atlas.memory_as_context_backward.default
        found = iter(op(of_results, *inputs, saved, *ctx.common, ctx.wanted))
        return None, None, None, *(next(found) if one else None for one in ctx.wanted)


def _split(
    tensors: Sequence[Tensor], sizes: tuple[int, int]
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """x, parameters, buffers and state."""
    x, *rest = tensors
    first, second = sizes[0], sum(sizes)
    return x, rest[:first], rest[first:second], rest[second:]


# --- the ops ----------------------------------------------------------------------------------


class _Body(nn.Module):
    """A block without storage, run with other tensors in place of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(self.block, *arguments)


@functools.lru_cache(maxsize=64)
def _body(description: str, thread: int) -> tuple[_Body, list[str], list[str]]:
    """The body and the names of its parameters and buffers; one of each thread's own, since its
    tensors are exchanged while it runs."""
    with torch.device("meta"):
        block = _build[0](description)

    def names(named: Iterable[tuple[str, Tensor]]) -> list[str]:
        return [f"block.{name}" for name, _ in named if name.split(".")[0] in PARTS]

    return _Body(block), names(block.named_parameters()), names(block.named_buffers())


@functools.lru_cache(maxsize=64)
def _template(description: str) -> Any:
    """A ContextState of the block's structure."""
    with torch.device("meta"):
        block = _build[0](description)
        return block.initial_state(torch.empty(1, 0, block.dim))


def _with(
    description: str,
    autocast: torch.dtype | None,
    provider: str,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    work: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """work(block, *arguments) with these tensors in the block."""
    body, names, buffer_names = _body(description, threading.get_ident())
    tensors = dict(zip(names + buffer_names, [*parameters, *buffers], strict=True))
    device = parameters[0].device.type
    with (
        providers.use_provider(provider),
        torch.autocast(device, autocast, enabled=autocast is not None),
    ):
        return torch.func.functional_call(body, tensors, (work, *arguments))


@functools.lru_cache(maxsize=64)
def _compiled_piece(
    block: Any,
    autocast: torch.dtype | None,
    provider: str,
    place: int | None,
    rows: int,
    grad: bool,
    backend: str | None,
) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """A whole segment at this place of a chunk, compiled once for all of them with this many rows,
    to be called where the block has its tensors (`_with`)."""

    def piece(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = block.piece(x, state, 0, place)
        return y, state.map(compiled_steps.in_order)

    run = compiled_steps.once(piece, dynamic=False)

    def call(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return run(compiled_steps.alike(x), state.map(compiled_steps.alike))

    return call


def _groups(state: Any) -> list[list[int]]:
    """Rows at one position of their sequence."""
    groups: dict[int, list[int]] = {}
    for row, position in enumerate(state.position.tolist()):
        groups.setdefault(position, []).append(row)
    return list(groups.values())


def _forward(
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    state: list[Tensor],
    description: str,
    autocast: torch.dtype | None,
    provider: str,
    wanted: list[bool],
) -> list[Tensor]:
    tensors = [x, *parameters, *buffers, *state]
    sizes, common = (len(parameters), len(buffers)), (description, autocast, provider)
    saved = _starts_like(x, state, description) if wanted else []
    if wanted and saved_graphs.serves(x):
        results, key = saved_graphs.keep(partial(_segments, sizes, common, []), tensors, wanted)
        return [*results, *saved, key]
    with torch.no_grad():
        results = [own(t) for t in _segments(sizes, common, saved, tensors)]
    return [*results, *saved, saved_graphs.no_key(x)] if wanted else results


def _starts_like(x: Tensor, state: list[Tensor], description: str) -> list[Tensor]:
    """Zeros for the memory's state before every segment."""
    # Read off the description: nothing can be built where every tensor is fake.
    config = read(description)["config"]
    reads = MEMORIES[config["memory"]["memory"]].weights
    memory = state[: len(state) - 3 - reads]
    count = chunk_count(x.shape[1], config["segment"], True)
    return [t.new_zeros(t.shape[0], count, *t.shape[1:]) for t in memory]


def _segments(
    sizes: tuple[int, int],
    common: tuple[str, torch.dtype | None, str],
    saved: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """y and the state's tensors; to `saved`, if any, the memory's before every segment."""
    x, parameters, buffers, state = _split(tensors, sizes)
    description, autocast, provider = common
    before = _like(_template(description), state)
    groups = _groups(before)
    if x.shape[0] == 0 or x.shape[1] == 0:
        groups = []

    def work(block: Any) -> tuple[Tensor, Any]:
        def whole(x: Tensor, state: Any, place: int | None) -> tuple[Tensor, Any]:
            key = (autocast, provider, place, len(x), *compiled_steps.here())
            return _compiled_piece(block, *key)(x, state)

        if not groups:
            return torch.zeros_like(x), before
        parts = []
        for rows in groups:
            starts: list[Any] | None = [] if saved else None
            # Rows at different places are groups of any size, each of which would be compiled.
            piece = whole if x.device.type == "cpu" and len(groups) == 1 else None
            parts.append(block.segments(x[rows], before[rows], starts, piece))
            for n, memory in enumerate(starts or ()):
                for out, t in zip(saved, memory.tensors(), strict=True):
                    out[rows, n] = t.to(out.dtype)
        order = [row for rows in groups for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        after = type(before).cat([s for _, s in parts])[back]
        return torch.cat([y for y, _ in parts])[back], after

    y, after = _with(description, autocast, provider, parameters, buffers, work)
    return [y, *after.tensors()]


def _backward(
    grads: list[Tensor],
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    state: list[Tensor],
    saved: list[Tensor],
    description: str,
    autocast: torch.dtype | None,
    provider: str,
    wanted: list[bool],
) -> list[Tensor]:
    *saved, key = saved
    with no_autocast(x), recording():  # as a backward is run
        found = saved_graphs.gradients(key, grads)
    if found is None and saved_graphs.serves(x):
        # Nothing was saved where all of it was to be kept.
        inputs = saved_graphs.leaves([x, *parameters, *buffers, *state], wanted)
        sizes, common = (len(parameters), len(buffers)), (description, autocast, provider)
        with recording(), torch.enable_grad():
            outputs = _segments(sizes, common, [], inputs)
            with no_autocast(x):
                found = saved_graphs.differentiate(outputs, inputs, grads)
    if found is not None:
        return [own(g) for g in found]
    before = _like(_template(description), state)
    fixed = 1 + len(parameters) + len(buffers)
    leaves = saved_graphs.leaves([*parameters, *buffers], wanted[1:fixed])
    learned = [t for t in leaves if t.requires_grad]
    grad_y, *grad_after = grads
    grad_x, of_learned = torch.zeros_like(x), [torch.zeros_like(t) for t in learned]
    of_state = [torch.zeros_like(t) for t in state if t.is_floating_point()]
    groups = _groups(before)
    if x.shape[0] == 0 or x.shape[1] == 0:
        groups, of_state = [], [own(g) for g in grad_after]

    def work(block: Any) -> None:
        for rows in groups:
            start, after = before[rows], [g[rows] for g in grad_after]
            pieces = block.pieces(x.shape[1], int(start.position[0]))
            for n, (first, span, offset) in reversed(list(enumerate(pieces))):
                here = start if n == 0 else _at_segment(start, first, [t[rows, n] for t in saved])
                here = here.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
                part = x[rows, first : first + span].detach().requires_grad_()
                y, end = block.piece(part, here, offset)
                ends = [t for t in end.tensors() if t.is_floating_point()]
                pairs = [(y, grad_y[rows, first : first + span]), *zip(ends, after, strict=True)]
                pairs = [(t, g.to(t.dtype)) for t, g in pairs if t.requires_grad]
                floats = [t for t in here.tensors() if t.is_floating_point()]
                with no_autocast(x):  # as a backward is run
                    found = torch.autograd.grad(
                        [t for t, _ in pairs],
                        [part, *learned, *floats],
                        [g for _, g in pairs],
                        materialize_grads=True,
                    )
                grad_x[rows, first : first + span] = found[0]
                for total, g in zip(of_learned, found[1 : 1 + len(learned)], strict=True):
                    total += g
                after = list(found[1 + len(learned) :])
            for out, g in zip(of_state, after, strict=True):
                out[rows] = g.to(out.dtype)

    with recording(), torch.enable_grad():
        count = len(parameters)
        _with(description, autocast, provider, leaves[:count], leaves[count:], work)
    of_state = saved_graphs.those_wanted(of_state, state, wanted[fixed:])
    return [*([grad_x] if wanted[0] else []), *of_learned, *of_state]


def _at_segment(start: Any, first: int, saved: list[Tensor]) -> Any:
    """The state before a segment that begins `first` tokens into the call.

    It has keys and values of the call's start, at which a segment's first piece does not look.
    """
    memory = _like(start.memory, saved)
    position = start.position + first
    return type(start)(memory, memory.rule.weights, start.keys, start.values, position)


def _forward_fake(
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    state: list[Tensor],
    description: str,
    autocast: torch.dtype | None,
    provider: str,
    wanted: list[bool],
) -> list[Tensor]:
    after = [own_empty(t) for t in state]
    if x.shape[1] != 0 and x.shape[0] != 0:
        # What comes of a Linear has autocast's dtype: the convolution's tail, keys and values.
        linear = parameters[0].dtype if autocast is None else autocast
        for i in (0, -3, -2):
            after[i] = after[i].to(linear)
    saved = [*_starts_like(x, state, description), saved_graphs.no_key(x)] if wanted else []
    return [own_empty(x), *after, *saved]


def _backward_fake(
    grads: list[Tensor],
    x: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    state: list[Tensor],
    saved: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    tensors = [x, *parameters, *buffers, *state]
    return [own_empty(t) for t, one in zip(tensors, rest[-1], strict=True) if one]


implement("memory_as_context", _forward, _forward_fake)
implement("memory_as_context_backward", _backward, _backward_fake)
