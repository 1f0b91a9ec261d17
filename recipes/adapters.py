"""Trained softmax attention turned into a DeepTransformer layer, and back.

B batch, T tokens, H heads of width D, G heads of keys and values.
"""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atlas_blocks import (
    DeepTransformerConfig,
    DeepTransformerLayer,
    SlidingWindowAttention,
    check,
)
from atlas_blocks.blocks.deep_transformer import DeepTransformerState, NeutralGates


class Slot(NamedTuple):
    """A parameter of an attention module, and the rows of a layer's parameter that hold it."""

    theirs: str
    ours: str
    first: int = 0
    transposed: bool = False


class Layout(NamedTuple):
    """What an attention module is, in the terms of DeepTransformerLayer."""

    dim: int
    heads: int
    settings: dict[str, Any]  # fields of DeepTransformerConfig
    slots: list[Slot]


def from_attention(
    module: nn.Module, *, window: int = 1, gate_rank: int = 32
) -> DeepTransformerLayer:
    """A layer that computes what trained causal attention computes, to rounding, and learns on.

    module: torch.nn.MultiheadAttention (its causal use, batch first, without dropout), a Llama or
    GPT-2 attention of Hugging Face transformers, or a SlidingWindowAttention with window=None.
    window, gate_rank: of the gates that the layer has beyond it. They start at exactly 1 (older
    lags of the window at 0), where they change nothing and still receive a gradient.
    Rotary positions, grouped keys, scale and biases are taken over, dropout is not. The layer owns
    copies of the weights, of the same dtype and on the same device.
    Raises ValueError for any other module, and for one whose attention is not causal softmax.
    """
    layout = _layout(module)
    config = DeepTransformerConfig(
        window=window,
        gates="neutral",
        gate_rank=gate_rank,
        conv_width=None,
        output_gate=False,
        **layout.settings,
    )
    first = module.get_parameter(layout.slots[0].theirs)
    layer = config.build(layout.dim, layout.heads).to(first.device, first.dtype)
    _copy(module, layer, layout.slots, back=False)
    return layer.train(module.training)


def to_attention(layer: DeepTransformerLayer, like: nn.Module) -> nn.Module:
    """The attention module that a layer of `from_attention` still is: `like` with its weights.

    like: a module of the kind and sizes that the layer was made from; it is copied, not changed.
    Raises ValueError where the layer's gates have learnt anything, so that attention cannot
    compute it, and where `like` does not fit.
    """
    layout = _layout(like)
    gates = layer.gates
    if not isinstance(gates, NeutralGates) or not gates.untouched():
        check.fail("layer", "gates that are still neutral", "gates that are not")
    settings = {name: getattr(layer.config, name) for name in layout.settings}
    wanted = (layout.dim, layout.heads, layout.settings)
    if (layer.dim, layer.heads, settings) != wanted:
        check.fail("like", f"dim, heads and settings {(layer.dim, layer.heads, settings)}", wanted)
    module = copy.deepcopy(like)
    _copy(module, layer, layout.slots, back=True)
    return module


def replace_attention(model: nn.Module, *, window: int = 1, gate_rank: int = 32) -> list[str]:
    """Replace every attention of a Hugging Face Llama or GPT-2 model in place; their names.

    The model goes on as before, `generate` with its cache included; see HuggingFaceAttention.
    Raises ValueError where there is none.
    """
    kinds = tuple(kind for kind, _ in _hugging_face())
    found = [(name, m) for name, m in model.named_modules() if kinds and isinstance(m, kinds)]
    if not found:
        check.fail("model", "one with Llama or GPT-2 attention", type(model).__name__)
    for name, module in found:
        index = module.layer_idx
        assert isinstance(index, int)
        layer = from_attention(module, window=window, gate_rank=gate_rank)
        model.set_submodule(name, HuggingFaceAttention(layer, index))
    return [name for name, _ in found]


class HuggingFaceAttention(nn.Module):
    """A DeepTransformerLayer in the place of an attention module of transformers.

    The layer's state lies in the model's own cache object, beside stand-ins of one number a token
    from which transformers reads the length; rows that it reorders (beam search) take their state
    along. Sequences must begin at position 0 and have no padding: ValueError otherwise.
    """

    def __init__(self, layer: DeepTransformerLayer, layer_idx: int) -> None:
        super().__init__()
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
        """hidden_states [B, T, dim] -> [B, T, dim]; the layer has its own rotary positions.

        unused: what transformers tells every attention of other kinds (use_cache, ...).
        """
        state = None if past_key_values is None else self._recall(past_key_values)
        seen = 0 if state is None else int(state.kernel.position.max())
        self._check(hidden_states, attention_mask, position_ids, seen)
        y, state = self.layer(hidden_states, state)
        if past_key_values is not None:
            B, T, _ = hidden_states.shape
            rows = torch.arange(B, device=y.device).view(B, 1, 1, 1).expand(B, 1, T, 1).float()
            past_key_values.update(rows, rows, self.layer_idx)
            vars(past_key_values).setdefault("deep_transformer_states", {})[self.layer_idx] = state
        return y, None

    def _recall(self, cache: Any) -> DeepTransformerState | None:
        """The state that lies in a cache, its rows in the cache's present order."""
        state = vars(cache).get("deep_transformer_states", {}).get(self.layer_idx)
        length = cache.get_seq_length(self.layer_idx)
        seen = 0 if state is None else int(state.kernel.position.max())
        if length != seen:
            check.fail("past_key_values", f"a cache of {seen} tokens", f"{length} tokens")
        if state is None:
            return None
        return state[cache.layers[self.layer_idx].values[:, 0, -1, 0].long()]

    def _check(
        self, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, seen: int
    ) -> None:
        T = x.shape[1]
        steps = torch.arange(seen, seen + T, device=x.device)
        if position_ids is not None and not bool((position_ids == steps).all()):
            check.fail("position_ids", f"{seen} to {seen + T - 1} in every row", "others")
        if mask is not None:
            allowed = mask if mask.dtype == torch.bool else mask == 0
            causal = torch.arange(mask.shape[-1], device=x.device) <= steps[:, None]
            if mask.ndim != 4 or not bool((allowed == causal).all()):
                check.fail("attention_mask", "None or a causal mask without padding", "another")


def _copy(module: nn.Module, layer: nn.Module, slots: list[Slot], back: bool) -> None:
    with torch.no_grad():
        for slot in slots:
            theirs, ours = module.get_parameter(slot.theirs), layer.get_parameter(slot.ours)
            if slot.transposed:
                theirs = theirs.mT
            ours = ours[slot.first : slot.first + theirs.shape[0]]
            (theirs if back else ours).copy_(ours if back else theirs)


def _layout(module: nn.Module) -> Layout:
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module)
    if isinstance(module, SlidingWindowAttention):
        return _our_own(module)
    for kind, read in _hugging_face():
        if isinstance(module, kind):
            return read(module)
    kinds = "MultiheadAttention, LlamaAttention, GPT2Attention or SlidingWindowAttention"
    check.fail("module", f"a {kinds}", type(module).__name__)
    raise AssertionError


def _hugging_face() -> list[tuple[type, Any]]:
    """The attention classes of transformers, where it has been imported: no module is one else."""
    found = []
    for name, read in (("llama.modeling_llama.LlamaAttention", _llama),
                       ("gpt2.modeling_gpt2.GPT2Attention", _gpt2)):  # fmt: skip
        path, _, kind = name.rpartition(".")
        module = sys.modules.get(f"transformers.models.{path}")
        if module is not None:
            found.append((getattr(module, kind), read))
    return found


def _settings(**changes: Any) -> dict[str, Any]:
    """Every setting in which attention modules differ, so that `to_attention` compares all."""
    plain: dict[str, Any] = {
        "qk_norm": "none",
        "scale": None,
        "rope_base": None,
        "kv_heads": None,
        "head_width": None,
        "qkv_bias": False,
        "out_bias": False,
    }
    return plain | changes


def _biases(module: nn.Module, *slots: Slot) -> list[Slot]:
    """The slots, without those whose parameter the module does not have."""
    names = {name for name, _ in module.named_parameters()}
    return [slot for slot in slots if slot.theirs in names]


def _multihead(m: nn.MultiheadAttention) -> Layout:
    if m.in_proj_weight is None or m.bias_k is not None or m.add_zero_attn:
        check.fail("module", "keys and values of the queries' width, none added", "another kind")
    bias = m.in_proj_bias is not None
    slots = _biases(
        m,
        Slot("in_proj_weight", "qkv.weight"),
        Slot("in_proj_bias", "qkv.bias"),
        Slot("out_proj.weight", "out.weight"),
        Slot("out_proj.bias", "out.bias"),
    )
    return Layout(m.embed_dim, m.num_heads, _settings(qkv_bias=bias, out_bias=bias), slots)


def _our_own(m: SlidingWindowAttention) -> Layout:
    c = m.config
    if c.window is not None or c.sink_tokens:
        check.fail("module", "a SlidingWindowAttention with window=None, without sink tokens", c)
    norm = "rms" if c.qk_norm else "none"
    slots = _biases(
        m,
        Slot("qkv.weight", "qkv.weight"),
        Slot("out.weight", "out.weight"),
        Slot("q_scale", "q_scale"),
        Slot("k_scale", "k_scale"),
    )
    return Layout(m.dim, m.heads, _settings(qk_norm=norm, rope_base=c.rope_base), slots)


def _llama(m: Any) -> Layout:
    c = m.config
    rope = c.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        check.fail("module", 'rotary positions of type "default"', rope)
    heads, groups, width = c.num_attention_heads, c.num_key_value_heads, m.head_dim
    settings = _settings(
        scale=m.scaling,
        rope_base=float(rope["rope_theta"]),
        kv_heads=groups,
        head_width=width,
        qkv_bias=m.q_proj.bias is not None,
        out_bias=m.o_proj.bias is not None,
    )
    starts = {"q_proj": 0, "k_proj": heads * width, "v_proj": (heads + groups) * width}
    slots = [
        Slot(f"{name}.{kind}", f"qkv.{kind}", first)
        for kind in ("weight", "bias")
        for name, first in starts.items()
    ]
    slots += [Slot(f"o_proj.{kind}", f"out.{kind}") for kind in ("weight", "bias")]
    return Layout(c.hidden_size, heads, settings, _biases(m, *slots))


def _gpt2(m: Any) -> Layout:
    if m.is_cross_attention:
        check.fail("module", "self-attention", "cross-attention")
    settings = _settings(scale=m.scaling, qkv_bias=True, out_bias=True)
    slots = [
        Slot("c_attn.weight", "qkv.weight", transposed=True),
        Slot("c_attn.bias", "qkv.bias"),
        Slot("c_proj.weight", "out.weight", transposed=True),
        Slot("c_proj.bias", "out.bias"),
    ]
    return Layout(m.embed_dim, m.num_heads, settings, slots)
