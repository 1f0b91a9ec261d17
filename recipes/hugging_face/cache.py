"""The states of blocks in the caches of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from atlas_blocks import check
from atlas_blocks.state import State


class StateLayer(CacheLayerMixin):
    """A block's state in the place of a layer's keys and values in a transformers cache.

    real: which of the tokens seen were no padding [B, P], None: all of them. offset: what their
    position_ids are ahead of their number [B], None: nothing. Padding is not in the state.
    last: of a whole model that has seen padding, its output for each row's last token [B, dim].
    """

    is_sliding = False
    # transformers would fill it with keys of its own kind.
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.length = 0
        self.real: Tensor | None = None
        self.offset: Tensor | None = None
        self.last: Tensor | None = None

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
        self.state, self.length = None, 0
        self.real = self.offset = self.last = None

    def offload(self) -> None:
        """The state on the CPU; a block that goes on from it has it brought back."""
        if self.state is not None:
            self.state = self.state.cpu()

    def prefetch(self) -> None:
        """Nothing: the model brings the state back, which knows where its layers are."""

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what a memory has written cannot be taken back."""
        if tokens_to_remove:
            wanted = "0 (a memory forgets no single tokens: no assisted generation)"
            check.fail("crop", wanted, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(lambda t: t[beam_idx.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(lambda t: t[indices.to(t.device)])

    def _choose(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = self.state.map(rows)
        for name in ("real", "offset", "last"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, rows(tensor))


class _Beside:
    """What a layer of keys and values does where a block's state lies beside them."""

    is_croppable = False
    memory: StateLayer

    def crop(self, tokens_to_remove: int) -> None:
        self.memory.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.memory.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.memory.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.memory.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.memory.batch_select_indices(indices)


@functools.cache
def _with_memory(kind: type) -> type:
    return type(f"{kind.__name__}WithMemory", (_Beside, kind), {})


def _entry(cache: Any, index: int) -> Any:
    layers = getattr(cache, "layers", None)
    if layers is None:
        check.fail("past_key_values", "a DynamicCache", type(cache).__name__)
    if cache.layer_class_to_replicate is not None:
        while len(layers) <= index:
            layers.append(cache.layer_class_to_replicate())
    return layers[index]


def _check_empty(layer: Any) -> None:
    if layer.get_seq_length():
        check.fail("past_key_values", "a cache that this model filled", "one of keys and values")


def layer_of(cache: Any, index: int) -> StateLayer:
    """The part of a transformers cache that is one layer's; an empty one of keys and values is
    replaced. Raises ValueError for caches of other kinds, and for keys and values."""
    layer = _entry(cache, index)
    if isinstance(layer, StateLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        check.fail("past_key_values", "a DynamicCache", f"layers of {type(layer).__name__}")
    _check_empty(layer)
    cache.layers[index] = StateLayer()
    return cache.layers[index]


def memory_of(cache: Any, index: int) -> StateLayer:
    """The place of a block's state beside a layer's keys and values, which stay as they are.
    Raises ValueError as `layer_of`."""
    layer = _entry(cache, index)
    if not isinstance(layer, _Beside):
        if not isinstance(layer, DynamicLayer):
            check.fail("past_key_values", "a DynamicCache", f"layers of {type(layer).__name__}")
        _check_empty(layer)
        kind: Any = _with_memory(type(layer))
        found = kind.__new__(kind)
        vars(found).update(vars(layer), memory=StateLayer())
        cache.layers[index] = layer = found
    return layer.memory


def brought(state: State | None, device: torch.device) -> State | None:
    """The state on the device of what goes on from it."""
    floats = [] if state is None else [t for t in state.tensors() if t.is_floating_point()]
    return (
        state.to(device) if state is not None and any(t.device != device for t in floats) else state
    )
