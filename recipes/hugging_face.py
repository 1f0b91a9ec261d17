"""Blocks inside models of Hugging Face transformers: the attention's place, the cache, the masks.

B rows, T new tokens, P tokens in the cache before them, S = P + T.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from atlas_blocks import (
    AtlasBlock,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    check,
)
from atlas_blocks.blocks.base import Block
from atlas_blocks.state import State

MASK = "a causal mask with padding (that in the cache too) or documents one after another"
POSITIONS = "counting on by 1 from token to token, padding apart"


class StateLayer(CacheLayerMixin):
    """A block's state in the place of a layer's keys and values in a transformers cache.

    real: which of the tokens seen were no padding [B, P], None: all of them. offset: what their
    position_ids are ahead of their number [B], None: nothing. Padding is not in the state.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.length = 0
        self.real: Tensor | None = None
        self.offset: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        check.fail("past_key_values", "a layer with keys and values", "one with a block's state")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.lazy_initialization(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.length, self.real, self.offset = None, 0, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what a memory has written cannot be taken back."""
        if tokens_to_remove:
            check.fail("crop", "0 (a memory forgets no single tokens)", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state[beam_idx]
            self.real = None if self.real is None else self.real[beam_idx]
            self.offset = None if self.offset is None else self.offset[beam_idx]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.reorder_cache(self._rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.reorder_cache(self._rows()[indices])

    def _rows(self) -> Tensor:
        assert self.state is not None
        first = self.state.tensors()[0]
        return torch.arange(first.shape[0], device=first.device)


def start_blocks(model: nn.Module) -> None:
    """Have transformers start the blocks in a model as they start alone.

    Called in the `__init__` of a PreTrainedModel once its blocks are there, before `post_init`.
    That and `from_pretrained`, which fills what a checkpoint lacks, would draw every Linear of a
    block as the model's own, and leave what is no layer of torch's as memory happened to be.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._init_weights = functools.partial(_start, part)


@torch.no_grad()
def _start(model: PreTrainedModel, module: nn.Module) -> None:
    """`_init_weights` of a model with blocks, called for every module of which a checkpoint does
    not hold all by the innermost PreTrainedModel around it."""
    kind = parametrize.type_before_parametrizations(module)
    if not (isinstance(module, Block) or kind.__module__.startswith("atlas_blocks.")):
        type(model)._init_weights(model, module)
        return
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
    for tensor, value in loaded:
        tensor.copy_(value)


class HuggingFaceAttention(nn.Module):
    """A block in the place of an attention module of transformers.

    layer: a block with a state and without a residual of its own, as the model around it adds one:
    DeepTransformerLayer, AtlasMemory, SlidingWindowAttention, LSTM, or one of yours.
    layer_idx: of the attention that it stands for.

    The state lies in the model's own cache (a dynamic one), through `generate` with beams too.
    Padding stays out of it, on either side of a row, and packed position_ids run every document
    apart. A compiled model takes neither (padding at the right, without a cache, is fine); it
    raises RuntimeError. Raises ValueError for blocks, caches, masks and positions of other kinds.
    """

    def __init__(self, layer: Block, layer_idx: int) -> None:
        super().__init__()
        inside = (AtlasBlock, MemoryAsContext, MemoryAsGate, MemoryAsLayer)
        if not isinstance(layer, Block) or isinstance(layer, inside) or layer.state_type is None:
            wanted = "a block with a state, without a residual of its own"
            check.fail("layer", wanted, type(layer).__name__)
        self.layer, self.layer_idx = layer, layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, dim] -> [B, T, dim], 0 for padding; positions are the block's own.

        unused: what transformers tells every attention of other kinds (use_cache, ...).
        """
        past = None if past_key_values is None else self._past(past_key_values)
        before, P = (None, 0) if past is None else (past.state, past.length)
        B, T, _ = hidden_states.shape
        if before is not None and (n := before.tensors()[0].shape[0]) != B:
            check.fail("past_key_values", f"a cache of {B} rows", f"{n} rows")
        visible, device = None, hidden_states.device
        if attention_mask is not None:
            visible = _visible(attention_mask, B, T, P).to(device)
        positions = None if position_ids is None else position_ids.to(device)
        places = _places(visible, positions, hidden_states, past)
        if places is None:
            y, after = self.layer(hidden_states, before, detach_state=False)
        else:
            y, after = self._apart(hidden_states, before, places, past is not None)
        if past is not None:
            past.state, past.length = after, P + T
            if places is not None:
                past.real, past.offset = places.real, places.offset
        return y, None

    def _past(self, cache: Any) -> StateLayer:
        """This layer's part of the cache."""
        layers, index = getattr(cache, "layers", None), self.layer_idx
        if layers is None:
            check.fail("past_key_values", "a DynamicCache", type(cache).__name__)
        if cache.layer_class_to_replicate is not None:
            while len(layers) <= index:
                layers.append(cache.layer_class_to_replicate())
        layer = layers[index]
        if isinstance(layer, StateLayer):
            return layer
        if type(layer) is not DynamicLayer:
            check.fail("past_key_values", "a DynamicCache", f"layers of {type(layer).__name__}")
        if layer.get_seq_length():
            check.fail(
                "past_key_values", "a cache that this model filled", "one of keys and values"
            )
        layers[index] = StateLayer()
        return layers[index]

    def _apart(
        self, x: Tensor, before: State | None, places: Places, cached: bool
    ) -> tuple[Tensor, State | None]:
        """The block over the real tokens of x [B, T, dim], every document by itself.

        cached: every row is one document, whose state goes on.
        """
        B = x.shape[0]
        flat = x.flatten(0, 1)
        some, none = places.rows
        y, after = torch.zeros_like(flat), []
        if len(places.index):
            packed, state = self.layer(
                flat[places.index][None],
                None if before is None else before[some],
                cu_seqlens=places.cu_seqlens,
                detach_state=False,
            )
            y = y.to(packed.dtype).index_copy(0, places.index, packed[0])
            after.append(state)
        if not cached:
            return y.view_as(x), None
        if none:
            idle = None if before is None else before[none]
            after.append(self.layer(x[none, :0], idle, detach_state=False)[1])
        order = [*some, *none]
        return y.view_as(x), State.cat(after)[sorted(range(B), key=order.__getitem__)]


class Places(NamedTuple):
    """Where the documents of a padded or packed batch lie.

    index: the real tokens among all B * T, cu_seqlens: the documents among those. rows: those with
    a real token and those without. real [B, S], offset [B]: for the cache.
    """

    index: Tensor
    cu_seqlens: Tensor
    rows: tuple[list[int], list[int]]
    real: Tensor
    offset: Tensor


def _visible(mask: Any, B: int, T: int, P: int) -> Tensor:
    """Which of S tokens each new one may see, as a mask of transformers says [B, T, S]."""
    S = P + T
    if isinstance(mask, Tensor):
        if mask.shape == (B, S):  # what FlashAttention is given: 1 where a token is real
            return mask.bool()[:, None] & _causal(T, S, mask.device)
        if mask.ndim == 4 and mask.shape[0] in (1, B) and mask.shape[1:] == (1, T, S):
            return (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(B, T, S)
    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    check.fail("attention_mask", f"None or a tensor [{B}, 1, {T}, {S}]", got)


def _causal(T: int, S: int, device: torch.device) -> Tensor:
    steps = torch.arange(S, device=device)
    return steps <= steps[S - T :, None]


def _places(
    visible: Tensor | None, positions: Tensor | None, x: Tensor, past: StateLayer | None
) -> Places | None:
    """Where the real tokens lie; None where the batch can be run as it is.

    Raises ValueError for masks and positions that are neither causal, padded nor packed.
    """
    known, P = (None, 0) if past is None else (past.real, past.length)
    plain = _plain(visible, positions, x, P, past is not None)
    if torch.compiler.is_compiling():
        # Compiled, nothing is read on the host: what is not plain fails as the graph runs.
        if known is not None:
            check.fail("past_key_values", "a cache without padding in a compiled model", "padding")
        if plain is not None:
            message = "attention_mask, position_ids: a compiled model takes neither padding nor "
            message += "packed documents; run this batch uncompiled"
            torch.ops.aten._assert_async.msg(plain, message)
        return None
    if known is None and (plain is None or bool(plain)):
        return None
    return _documents(visible, positions, x, past)


def _plain(
    visible: Tensor | None, positions: Tensor | None, x: Tensor, P: int, cached: bool
) -> Tensor | None:
    """Whether each row is one sequence from its first token on; None: nothing says otherwise.

    Padding at the right does not matter where no state is kept: no real token sees it.
    """
    T, parts = x.shape[1], []
    if positions is not None:
        parts.append((positions == torch.arange(P, P + T, device=positions.device)).all())
    if visible is not None:
        own = visible.diagonal(P, 1, 2)
        causal = _causal(T, P + T, visible.device)
        parts.append(((visible == causal) | ~own[..., None]).all())
        parts += [own.all()] if cached else []
    return torch.stack(parts).all() if parts else None


def _documents(
    visible: Tensor | None, positions: Tensor | None, x: Tensor, past: StateLayer | None
) -> Places:
    B, T, _ = x.shape
    P = 0 if past is None else past.length
    steps = torch.arange(P + T, device=x.device)
    positions = (steps[P:] if positions is None else positions).expand(B, T)
    known = torch.ones(B, P, dtype=torch.bool, device=x.device)
    if past is not None and past.real is not None:
        known = past.real
    start = torch.zeros(B, T, dtype=torch.int64, device=x.device)
    if past is None:
        start = _starts(visible, positions)
    if visible is None:
        visible = _causal(T, P + T, x.device) & (steps >= start[..., None])

    own = visible.diagonal(P, 1, 2)
    real = torch.cat([known, own], 1)
    expected = _causal(T, P + T, x.device) & real[:, None] & (steps >= start[..., None])
    # What padding sees does not matter.
    fits = ((visible == expected).all(-1) | ~own).all()
    if past is None:
        heads = own & (start == steps)
        fits &= (_latest(heads) == start)[own].all()
    else:
        heads = own & (own.cumsum(1) == 1)
    if not bool(fits):
        check.fail("attention_mask", MASK, "another")
    offset = _offset(positions, start, heads, own, real, past)

    filled = own.any(1).tolist()
    rows = [i for i in range(B) if filled[i]], [i for i in range(B) if not filled[i]]
    cu_seqlens = torch.cat([heads[own].nonzero()[:, 0], own.sum()[None]])
    return Places(own.flatten().nonzero()[:, 0], cu_seqlens, rows, real, offset)


def _starts(visible: Tensor | None, positions: Tensor) -> Tensor:
    """Where the document of every token begins [B, T]: at the first token that it sees, or where
    positions do not go on."""
    if visible is not None:
        return visible.int().argmax(-1)
    return _latest(positions.diff(prepend=positions[:, :1]) != 1)


def _latest(marks: Tensor) -> Tensor:
    """The place of the last mark up to every token, 0 before the first [B, T]."""
    places = torch.arange(marks.shape[1], device=marks.device)
    return torch.where(marks, places, 0).cummax(1).values


def _offset(
    positions: Tensor,
    start: Tensor,
    heads: Tensor,
    own: Tensor,
    real: Tensor,
    past: StateLayer | None,
) -> Tensor:
    """What each row's positions are ahead of its tokens' numbers [B], if that is one number in
    every document: rotary positions count from anywhere."""
    T = own.shape[1]
    ahead = positions + 1 - real.cumsum(1)[:, -T:]
    offset = ahead.gather(1, heads.int().argmax(1, keepdim=True))[:, 0]
    if past is None:
        same = ahead == ahead.gather(1, start)
    else:
        before = torch.zeros_like(offset) if past.offset is None else past.offset
        offset = torch.where(real[:, :-T].any(1), before, offset)
        same = ahead == offset[:, None]
    if not bool((same | ~own).all()):
        kept = "" if past is None else "; packed documents need use_cache=False"
        check.fail("position_ids", POSITIONS + kept, positions.tolist())
    return offset
