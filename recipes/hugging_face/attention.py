"""Blocks inside models of transformers, in the place of their attention; how blocks start there.

B rows, T new tokens, P tokens in the cache before them, S = P + T.
"""

from __future__ import annotations

import functools
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
from atlas_blocks.recipes.hugging_face.cache import brought, layer_of
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
        past = None if past_key_values is None else layer_of(past_key_values, self.layer_idx)
        before, P = (None, 0) if past is None else (past.state, past.length)
        B, T, _ = hidden_states.shape
        if before is not None and (n := before.tensors()[0].shape[0]) != B:
            check.fail("past_key_values", f"a cache of {B} rows", f"{n} rows")
        before = brought(before, hidden_states.device)
        places = places_of(attention_mask, position_ids, hidden_states, past)
        y, after = run_placed(self._run, hidden_states, before, places, past is not None)
        if past is not None:
            past.state, past.length = after, P + T
            if places is not None:
                past.real, past.offset = places.real, places.offset
        return y, None

    def _run(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return self.layer(x, state, cu_seqlens=cu_seqlens, detach_state=False)
