"""Trained softmax attention turned into a block, and back. (Those of a whole model: surgery.py.)"""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from atlas_blocks import (
    AtlasMemory,
    AtlasMemoryConfig,
    Block,
    Config,
    DeepTransformerConfig,
    DeepTransformerLayer,
    SlidingWindowAttention,
    SlidingWindowAttentionConfig,
    check,
)
from atlas_blocks.blocks.deep_transformer import NeutralGates
from atlas_blocks.blocks.parameters import Linear

MODELS = "Gemma, Gemma 2, GPT-2, GPT-NeoX, Llama, Mistral, Phi, Qwen2 or Qwen3"
RMS_EPS = 1e-6
# Hooks that set a parameter anew before it is used.
REFRESHED = (BasePruningMethod, WeightNorm)


class Layout(NamedTuple):
    """What an attention module is, in the terms of DeepTransformerLayer."""

    dim: int
    heads: int
    settings: dict[str, Any]  # fields of DeepTransformerConfig
    # Of every parameter of the layer: the module's that lie one under the other in it.
    slots: dict[str, tuple[str, ...]]
    window: int | None = None  # how many tokens a query sees, None: all before it
    transposed: bool = False  # the module's matrices [in, out]
    by_head: bool = False  # rows of qkv: head by head the query, key and value of each


def from_attention(
    module: nn.Module,
    *,
    window: int = 1,
    gate_rank: int = 32,
    block: Config | None = None,
) -> Block:
    """A layer that computes what trained causal attention computes, to rounding, and learns on.

    module: torch.nn.MultiheadAttention (its causal use, batch first, without dropout), the
    attention of a model of Hugging Face transformers (MODELS; rotary positions unscaled, as its
    config says), or a SlidingWindowAttention with window=None. The rotary embedding lies in the
    model, where `replace_attention` alone sees what was edited.
    window, gate_rank: of the gates that the layer has beyond it. They start at exactly 1 (older
    lags of the window at 0), where they change nothing and still receive a gradient.
    block: None is a DeepTransformerLayer of that window. Or a config of one whose objective is
    "dot", of SlidingWindowAttention (the same function as long as its window, or where the
    attention has the same one), or of AtlasMemory, which takes over the projections and is another
    function: it has to be trained. A DeepTransformerLayer takes over no sliding window.
    Rotary positions, grouped keys, scale and biases are taken over, dropout is not. The layer owns
    copies of the weights as they are in effect (parametrised, pruned), of the same dtype and on
    the same device, frozen where they are frozen; what is new is trainable.
    Raises ValueError for any other module, for one whose attention is not causal softmax, for a
    block that cannot take it over, and for projections that are wrapped, replaced, quantised,
    sharded or hooked, by the parameter's name.
    """
    layout = _layout(module)
    if block is None:
        block = DeepTransformerConfig(window=window, gate_rank=gate_rank)
    config = _config_for(block, layout)
    found = {ours: [_effective(module, n) for n in names] for ours, names in layout.slots.items()}
    first = found["qkv.weight"][0]
    layer = config.build(layout.dim, layout.heads).to(first.device, first.dtype)
    for ours, names in layout.slots.items():
        group = found[ours][0]
        for name, tensor in zip(names, found[ours], strict=True):
            for like, what in ((first, "dtype"), (first, "device"), (group, "requires_grad")):
                if getattr(tensor, what) != getattr(like, what):
                    wanted = f"the {what} of the others, {getattr(like, what)}"
                    check.fail(name, wanted, getattr(tensor, what))
        if ours in ("q_scale", "k_scale") and isinstance(layer, AtlasMemory):
            continue  # it has its own norm of queries and keys
        rows = torch.cat([_ours(t.detach(), layout, ours) for t in found[ours]])
        target = layer.get_parameter(ours)
        if isinstance(layer, AtlasMemory) and ours == "qkv.weight":
            rows = _ungrouped(rows, layout)
        check.tensor(" and ".join(names), rows, "together", target.shape)
        target.detach().copy_(rows)
        target.requires_grad_(group.requires_grad)
    return layer.train(module.training)


def taken(layer: nn.Module) -> set[str]:
    """The parameters of a layer of `from_attention` that the attention had."""
    names = {"qkv.weight", "qkv.bias", "out.weight", "out.bias", "q_scale", "k_scale"}
    return names & {name for name, _ in layer.named_parameters()}


def _config_for(block: Config, layout: Layout) -> Any:
    """The config of the layer that takes an attention over."""
    settings = layout.settings
    if isinstance(block, DeepTransformerConfig):
        if block.objective != "dot" or not block.normalise:
            wanted = 'objective="dot" and normalise=True, which is softmax attention'
            check.fail("block", wanted, block)
        if layout.window is not None:
            check.fail("module", "attention without a sliding window", layout.window)
        return block.replace(gates="neutral", conv_width=None, output_gate=False, **settings)
    width = settings["head_width"] or layout.dim // layout.heads
    square = width * layout.heads == layout.dim
    if isinstance(block, AtlasMemoryConfig):
        if not square or settings["qkv_bias"] or settings["out_bias"]:
            wanted = "heads that make up the width, and no biases, for an AtlasMemory"
            check.fail("module", wanted, settings)
        return block
    if isinstance(block, SlidingWindowAttentionConfig):
        fits = square and not (settings["qkv_bias"] or settings["out_bias"])
        fits = fits and settings["rope_base"] is not None and settings["rope_width"] is None
        if not fits or settings["scale"] not in (None, width**-0.5):
            wanted = "plain attention with rotary positions, for a SlidingWindowAttention"
            check.fail("module", wanted, settings)
        return block.replace(
            rope_base=settings["rope_base"],
            qk_norm=settings["qk_norm"] == "rms",
            kv_heads=settings["kv_heads"],
        )
    kinds = "DeepTransformerConfig, SlidingWindowAttentionConfig or AtlasMemoryConfig"
    check.fail("block", kinds, type(block).__name__)


def _ours(t: Tensor, layout: Layout, name: str) -> Tensor:
    """A module's tensor as the layer has it: rows [out, in], those of queries first."""
    t = t.mT if layout.transposed and t.ndim == 2 else t
    if layout.by_head and name.startswith("qkv"):
        t = t.unflatten(0, (layout.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return t


def _ungrouped(rows: Tensor, layout: Layout) -> Tensor:
    """qkv with keys and values for every head of queries."""
    H, G = layout.heads, layout.settings["kv_heads"] or layout.heads
    q, k, v = rows.unflatten(0, (H + 2 * G, -1)).split([H, G, G])
    k, v = (t.repeat_interleave(H // G, 0) for t in (k, v))
    return torch.cat([q, k, v]).flatten(0, 1)


def to_attention(layer: DeepTransformerLayer, like: nn.Module) -> nn.Module:
    """The attention module that a layer of `from_attention` still is: `like` with its weights.

    like: a module of the kind and sizes that the layer was made from; it is copied, not changed.
    Raises ValueError where the layer's gates have learnt anything, so that attention cannot
    compute it, where `like` does not fit, and as `from_attention` does for either's parameters.
    """
    layout = _layout(like)
    if parametrize.type_before_parametrizations(layer) is not DeepTransformerLayer:
        check.fail("layer", "a DeepTransformerLayer", type(layer).__name__)
    check_own("layer", layer, is_part=False)
    gates = layer.gates
    if not isinstance(gates, NeutralGates) or not gates.untouched():
        check.fail("layer", "gates that are still neutral", "gates that are not")
    if layout.window is not None:
        check.fail("like", "attention without a sliding window", layout.window)
    settings = {name: getattr(layer.config, name) for name in layout.settings}
    wanted = (layout.dim, layout.heads, layout.settings)
    if (layer.dim, layer.heads, settings) != wanted:
        check.fail("like", f"dim, heads and settings {(layer.dim, layer.heads, settings)}", wanted)
    for name in itertools.chain.from_iterable(layout.slots.values()):
        if not isinstance(_effective(like, name), nn.Parameter):
            check.fail(f"like.{name}", "a parameter that can be set", "a computed one")
    module = copy.deepcopy(like)
    for ours, names in layout.slots.items():
        targets = [module.get_parameter(name).detach() for name in names]
        targets = [t.mT if layout.transposed and t.ndim == 2 else t for t in targets]
        parts = _effective(layer, ours).detach().split([len(t) for t in targets])
        for name, target, part in zip(names, targets, parts, strict=True):
            if layout.by_head and ours.startswith("qkv"):
                part = part.unflatten(0, (3, layout.heads, -1)).transpose(0, 1).flatten(0, 2)
            check.tensor(name, part, "together", target.shape)
            target.copy_(part)
    return module


def _effective(module: nn.Module, name: str) -> Tensor:
    """A parameter as forward uses it. Raises ValueError where something else stands before it."""
    path, _, kind = name.rpartition(".")
    owner = module.get_submodule(path)
    check_own(name, owner, is_part=bool(path))
    # Those of pruning and weight norm set the parameter anew. MultiheadAttention never calls its
    # out_proj, and computes with what was set last.
    hooks = list(owner._forward_pre_hooks.values())
    if owner is not module and isinstance(module, nn.MultiheadAttention):
        hooks = []
    with torch.enable_grad():  # whether it is frozen shows in what is computed from it
        for hook in hooks:
            hook(owner, ())
        tensor: Any = getattr(owner, kind)
    if tensor is None or is_traceable_wrapper_subclass(tensor) or tensor.dtype not in check.FLOATS:
        check.fail(name, "a plain tensor of floats", type(tensor).__name__)
    if tensor.is_meta and hasattr(owner, "_hf_hook"):
        check.fail(name, "weights in memory (convert before they are offloaded)", "offloaded ones")
    return tensor


def check_own(name: str, owner: nn.Module, is_part: bool) -> None:
    """That a module computes what its class says. is_part: it is to be a projection or norm."""
    kind = parametrize.type_before_parametrizations(owner)
    if is_part and kind not in _plain_parts():
        wanted = "the parameter of a plain layer (merge or remove what wraps it)"
        check.fail(name, wanted, f"one inside a {kind.__module__}.{kind.__name__}")
    hooks = [h for h in owner._forward_hooks.values() if not _of_transformers(h)]
    hooks += [h for h in owner._forward_pre_hooks.values() if not isinstance(h, REFRESHED)]
    hooks += [*owner._backward_hooks.values(), *owner._backward_pre_hooks.values()]
    # accelerate places its hooks, which only move tensors, in the same way.
    if hooks or ("forward" in vars(owner) and not hasattr(owner, "_hf_hook")):
        check.fail(name, "a module without hooks, which conversion would lose", "hooks")


def _of_transformers(hook: Any) -> bool:
    """Whether transformers set it, to collect outputs."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _plain_parts() -> list[type]:
    """The classes that compute with a weight and perhaps a bias, and with nothing else."""
    found = [nn.Linear, Linear, NonDynamicallyQuantizableLinear]
    for path, kind in (
        ("pytorch_utils", "Conv1D"),
        ("models.qwen3.modeling_qwen3", "Qwen3RMSNorm"),
    ):
        module = sys.modules.get(f"transformers.{path}")
        if module is not None:
            found.append(getattr(module, kind))
    return found


def _layout(module: nn.Module) -> Layout:
    kind = parametrize.type_before_parametrizations(module)
    readers = {
        nn.MultiheadAttention: _multihead,
        SlidingWindowAttention: _our_own,
        **_hugging_face(),
    }
    if kind not in readers:
        kinds = "MultiheadAttention, a SlidingWindowAttention or the attention of " + MODELS
        check.fail("module", f"a {kinds}", kind.__name__)
    check_own("module", module, is_part=False)
    return readers[kind](module)


def _hugging_face() -> dict[type, Any]:
    """The attention classes of transformers, where it has been imported: no module is one else."""
    readers = {
        "gemma.modeling_gemma.GemmaAttention": _llama,
        "gemma2.modeling_gemma2.Gemma2Attention": _gemma2,
        "gpt_neox.modeling_gpt_neox.GPTNeoXAttention": _gpt_neox,
        "phi.modeling_phi.PhiAttention": _phi,
        "gpt2.modeling_gpt2.GPT2Attention": _gpt2,
        "llama.modeling_llama.LlamaAttention": _llama,
        "mistral.modeling_mistral.MistralAttention": _llama,
        "qwen2.modeling_qwen2.Qwen2Attention": _llama,
        "qwen3.modeling_qwen3.Qwen3Attention": _qwen3,
    }
    found = {}
    for name, read in readers.items():
        path, _, kind = name.rpartition(".")
        module = sys.modules.get(f"transformers.models.{path}")
        if module is not None:
            found[getattr(module, kind)] = read
    return found


def _settings(**changes: Any) -> dict[str, Any]:
    """Every setting in which attention modules differ, so that `to_attention` compares all."""
    plain: dict[str, Any] = {
        "qk_norm": "none",
        "scale": None,
        "rope_base": None,
        "rope_width": None,
        "kv_heads": None,
        "head_width": None,
        "qkv_bias": False,
        "out_bias": False,
    }
    return plain | changes


def _linears(module: nn.Module, qkv: tuple[str, ...], out: str) -> dict[str, tuple[str, ...]]:
    """The slots of projections in modules of their own. Only biases may be absent."""
    slots = {}
    for ours, names in (("qkv", qkv), ("out", (out,))):
        owners = [module.get_submodule(name) for name in names]
        for name, owner in zip(names, owners, strict=True):
            check_own(f"{name}.weight", owner, is_part=True)
        slots[f"{ours}.weight"] = tuple(f"{name}.weight" for name in names)
        without = [n for n, owner in zip(names, owners, strict=True) if owner.bias is None]
        if not without:
            slots[f"{ours}.bias"] = tuple(f"{name}.bias" for name in names)
        elif len(without) < len(names):
            check.fail(f"{without[0]}.bias", f"a bias, as others of {', '.join(names)} have", None)
    return slots


def _multihead(m: nn.MultiheadAttention) -> Layout:
    if not m._qkv_same_embed_dim or m.bias_k is not None or m.add_zero_attn:
        check.fail("module", "keys and values of the queries' width, none added", "another kind")
    slots = _linears(m, ("out_proj",), "out_proj")
    slots = {name: slots[name] for name in slots if name.startswith("out")}
    slots["qkv.weight"] = ("in_proj_weight",)
    if m.in_proj_bias is not None:
        slots["qkv.bias"] = ("in_proj_bias",)
    return Layout(m.embed_dim, m.num_heads, _settings(**_biases(slots)), slots)


def _our_own(m: SlidingWindowAttention) -> Layout:
    c = m.config
    if c.window is not None or c.sink_tokens:
        check.fail("module", "a SlidingWindowAttention with window=None, without sink tokens", c)
    slots = _linears(m, ("qkv",), "out")
    if c.qk_norm:
        slots |= {"q_scale": ("q_scale",), "k_scale": ("k_scale",)}
    norm = "rms" if c.qk_norm else "none"
    settings = _settings(qk_norm=norm, rope_base=c.rope_base, kv_heads=c.kv_heads, **_biases(slots))
    return Layout(m.dim, m.heads, settings, slots)


def _llama(m: Any, qk_norm: str = "none", out: str = "o_proj") -> Layout:
    c = m.config
    _check_causal(m)
    slots = _linears(m, ("q_proj", "k_proj", "v_proj"), out)
    settings = _settings(
        qk_norm=qk_norm,
        scale=m.scaling,
        kv_heads=c.num_key_value_heads,
        head_width=m.head_dim,
        **_rope(c, m.head_dim),
        **_biases(slots),
    )
    return Layout(c.hidden_size, c.num_attention_heads, settings, slots, window_of(m))


def _rope(c: Any, width: int) -> dict[str, Any]:
    """Of rotary positions, as the config of a model says."""
    rope = c.rope_parameters
    if rope["rope_type"] != "default":
        check.fail("module", 'rotary positions of type "default"', rope)
    turned = int(width * rope.get("partial_rotary_factor", 1.0))
    whole = turned == width
    return {"rope_base": float(rope["rope_theta"]), "rope_width": None if whole else turned}


def _gemma2(m: Any) -> Layout:
    if m.attn_logit_softcapping is not None:
        wanted = "None (a soft cap of the scores, which the rule does not have)"
        check.fail("attn_logit_softcapping", wanted, m.attn_logit_softcapping)
    return _llama(m)


def _phi(m: Any) -> Layout:
    if m.qk_layernorm:
        check.fail("qk_layernorm", "False", True)
    return _llama(m, out="dense")


def _gpt_neox(m: Any) -> Layout:
    _check_causal(m)
    slots = _linears(m, ("query_key_value",), "dense")
    rope = _rope(m.config, m.head_size)
    settings = _settings(scale=m.scaling, **rope, **_biases(slots))
    c = m.config
    return Layout(c.hidden_size, c.num_attention_heads, settings, slots, by_head=True)


def _qwen3(m: Any) -> Layout:
    layout = _llama(m, "rms")
    for name, norm in (("q_norm", m.q_norm), ("k_norm", m.k_norm)):
        check_own(f"{name}.weight", norm, is_part=True)
        if norm.variance_epsilon != RMS_EPS:
            check.fail(name, f"an eps of {RMS_EPS}", norm.variance_epsilon)
    slots = layout.slots | {"q_scale": ("q_norm.weight",), "k_scale": ("k_norm.weight",)}
    return layout._replace(slots=slots)


def _gpt2(m: Any) -> Layout:
    if m.is_cross_attention:
        check.fail("module", "self-attention", "cross-attention")
    _check_causal(m)
    slots = _linears(m, ("c_attn",), "c_proj")
    settings = _settings(scale=m.scaling, **_biases(slots))
    return Layout(m.embed_dim, m.num_heads, settings, slots, transposed=True)


def _biases(slots: dict[str, tuple[str, ...]]) -> dict[str, bool]:
    return {"qkv_bias": "qkv.bias" in slots, "out_bias": "out.bias" in slots}


def _check_causal(m: Any) -> None:
    if not m.is_causal or not getattr(m.config, "is_causal", True):
        check.fail("module", "causal attention", "is_causal=False")


def window_of(attention: Any) -> int | None:
    """How many tokens a query of an attention of transformers sees, None: all before it."""
    config = attention.config
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[attention.layer_idx] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None
