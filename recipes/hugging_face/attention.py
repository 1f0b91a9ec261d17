"""Blocks inside models of transformers, in the place of their attention; how blocks start there.

B rows, T new tokens, P tokens in the cache before them, S = P + T.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from atlas_blocks import (
    AtlasBlock,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    check,
)
from atlas_blocks.blocks.base import Block
from atlas_blocks.recipes.hugging_face.cache import StateLayer, brought, layer_of, memory_of
from atlas_blocks.recipes.hugging_face.padding import places_of, run_placed


def start_blocks(model: nn.Module) -> None:
    """Have transformers start the blocks in a model as they start alone.

    Called in the `__init__` of a PreTrainedModel once its blocks are there, before `post_init`.
    That and `from_pretrained`, which fills what a checkpoint lacks, would draw every Linear of a
    block as the model's own, and leave what is no layer of torch's as memory happened to be.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._init_weights = functools.partial(_start, part)


def _start(model: PreTrainedModel, module: nn.Module) -> None:
    """`_init_weights` of a model with blocks, called for every module of which a checkpoint does
    not hold all by the innermost PreTrainedModel around it."""
    if not start(module):
        type(model)._init_weights(model, module)


@torch.no_grad()
def start(module: nn.Module) -> bool:
    """Fill what transformers has not loaded of one of our modules; whether it is one."""
    kind = parametrize.type_before_parametrizations(module)
    if not (isinstance(module, Block) or kind.__module__.startswith("atlas_blocks.")):
        return False
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
    for tensor, value in loaded:
        tensor.copy_(value)
    return True


class HuggingFaceAttention(nn.Module):
    """A block in the place of an attention module of transformers.

    layer: a block with a state and without a residual of its own, as the model around it adds one:
    DeepTransformerLayer, AtlasMemory, SlidingWindowAttention, LSTM, or one of yours.
    layer_idx: of the attention that it stands for. window: of that attention, None: it saw all. Its
    masks leave out what is further away; the block reads that all the same.

    The state lies in the model's own cache (a dynamic one), through `generate` with beams too.
    Padding stays out of it, on either side of a row, and packed position_ids run every document
    apart. A compiled model takes neither (padding at the right, without a cache, is fine); it
    raises RuntimeError. Raises ValueError for blocks, caches, masks and positions of other kinds.
    """

    def __init__(self, layer: Block, layer_idx: int, window: int | None = None) -> None:
        super().__init__()
        check_mixer(layer)
        check_window(window)
        self.layer, self.layer_idx, self.window = layer, layer_idx, window

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, dim] -> [B, T, dim], 0 for padding; positions are the block's own.

        layer_past: past_key_values, as GPT-NeoX calls it. unused: what transformers tells every
        attention of other kinds (use_cache, ...).
        """
        cache: Any = layer_past if past_key_values is None else past_key_values
        past = None if cache is None else layer_of(cache, self.layer_idx)
        y = run_cached(self.layer, hidden_states, attention_mask, position_ids, past, self.window)
        if past is not None and getattr(cache, "offloading", False):
            past.offload()
        return y, None


class ParallelAttention(nn.Module):
    """An attention of transformers as it is, and a block beside it: attention(x) + gate * block(x).

    The gate [dim] starts at zero, so that the model starts as it was. layer, layer_idx, window and
    what is refused: see HuggingFaceAttention; the cache keeps the state beside the keys and values.
    """

    def __init__(
        self, attention: nn.Module, layer: Block, layer_idx: int, window: int | None = None
    ) -> None:
        super().__init__()
        check_mixer(layer)
        check_window(window)
        self.attention, self.layer = attention, layer
        self.layer_idx, self.window = layer_idx, window
        like = next(layer.parameters())
        self.gate = nn.Parameter(torch.zeros(layer.dim, device=like.device, dtype=like.dtype))
        self._names = list(inspect.signature(attention.forward).parameters)

    def reset_parameters(self) -> None:
        """Close the gate."""
        nn.init.zeros_(self.gate)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention takes and returns."""
        told = dict(zip(self._names, args, strict=False)) | kwargs
        cache: Any = told.get("past_key_values", told.get("layer_past"))
        past = None
        if cache is not None:
            past = memory_of(cache, self.layer_idx)
        x, mask = told["hidden_states"], told.get("attention_mask")
        more = run_cached(self.layer, x, mask, told.get("position_ids"), past, self.window)
        if past is not None and getattr(cache, "offloading", False):
            past.offload()
        y, *rest = self.attention(*args, **kwargs)
        return (y + self.gate * more, *rest)


def check_mixer(layer: Any) -> None:
    """Raise ValueError for what cannot stand in the place of an attention."""
    inside = (AtlasBlock, MemoryAsContext, MemoryAsGate, MemoryAsLayer)
    if not isinstance(layer, Block) or isinstance(layer, inside) or layer.state_type is None:
        wanted = "a block with a state, without a residual of its own"
        check.fail("layer", wanted, type(layer).__name__)


def check_window(window: int | None) -> None:
    """Raise ValueError for a window of which no mask shows where documents begin."""
    if window is not None:
        check.at_least("window", window, 2)


def run_cached(
    layer: Block,
    x: Tensor,
    mask: Any,
    positions: Tensor | None,
    past: StateLayer | None,
    window: int | None = None,
) -> Tensor:
    """A block over x [B, T, dim] with a mask and positions of transformers, its state in `past`.
    window: see `HuggingFaceAttention`."""
    before, (B, T) = None if past is None else past.state, x.shape[:2]
    if before is not None and (n := before.tensors()[0].shape[0]) != B:
        check.fail("past_key_values", f"a cache of {B} rows", f"{n} rows")
    places = places_of(mask, positions, x, past, window)

    def run(x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return layer(x, state, cu_seqlens=cu_seqlens, detach_state=False)

    y, after = run_placed(run, x, brought(before, x.device), places, past is not None)
    if past is not None:
        past.state, past.length = after, past.length + T
        if places is not None:
            past.real, past.offset = places.real, places.offset
    return y
