"""Trained softmax attention turned into a DeepTransformer layer, and back."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from atlas_blocks import (
    DeepTransformerConfig,
    DeepTransformerLayer,
    SlidingWindowAttention,
    check,
)
from atlas_blocks.blocks.deep_transformer import NeutralGates
from atlas_blocks.blocks.parameters import Linear
from atlas_blocks.data import there

MODELS = "Gemma, GPT-2, Llama, Mistral, Qwen2 or Qwen3"
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
    transposed: bool = False  # the module's matrices [in, out]


def from_attention(
    module: nn.Module, *, window: int = 1, gate_rank: int = 32
) -> DeepTransformerLayer:
    """A layer that computes what trained causal attention computes, to rounding, and learns on.

    module: torch.nn.MultiheadAttention (its causal use, batch first, without dropout), the
    attention of a model of Hugging Face transformers (Gemma, GPT-2, Llama, Mistral, Qwen2, Qwen3;
    rotary positions unscaled, as its config says, and no sliding window), or a
    SlidingWindowAttention with window=None.
    window, gate_rank: of the gates that the layer has beyond it. They start at exactly 1 (older
    lags of the window at 0), where they change nothing and still receive a gradient.
    Rotary positions, grouped keys, scale and biases are taken over, dropout is not. The layer owns
    copies of the weights as they are in effect (parametrised, pruned), of the same dtype and on
    the same device, frozen where they are frozen; the gates are trainable.
    Raises ValueError for any other module, for one whose attention is not causal softmax, and for
    projections that are wrapped, replaced, quantised, sharded or hooked, by the parameter's name.
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
        parts = [t.mT if layout.transposed and t.ndim == 2 else t for t in found[ours]]
        target = layer.get_parameter(ours)
        _fill(target.detach(), names, parts)
        target.requires_grad_(group.requires_grad)
    return layer.train(module.training)


def to_attention(layer: DeepTransformerLayer, like: nn.Module) -> nn.Module:
    """The attention module that a layer of `from_attention` still is: `like` with its weights.

    like: a module of the kind and sizes that the layer was made from; it is copied, not changed.
    Raises ValueError where the layer's gates have learnt anything, so that attention cannot
    compute it, where `like` does not fit, and as `from_attention` does for either's parameters.
    """
    layout = _layout(like)
    if parametrize.type_before_parametrizations(layer) is not DeepTransformerLayer:
        check.fail("layer", "a DeepTransformerLayer", type(layer).__name__)
    _check_own("layer", layer, is_part=False)
    gates = layer.gates
    if not isinstance(gates, NeutralGates) or not gates.untouched():
        check.fail("layer", "gates that are still neutral", "gates that are not")
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
            _fill(target, (name,), [part])
    return module


def replace_attention(model: nn.Module, *, window: int = 1, gate_rank: int = 32) -> list[str]:
    """Replace every attention of a Hugging Face model in place (MODELS); their names.

    The model goes on as before, `generate` with its cache included; see HuggingFaceAttention. Its
    config notes what was done, so that `load_converted` reads what its `save_pretrained` writes.
    Raises ValueError where there is none, and where one cannot be converted; the model is then as
    it was.
    """
    kinds = tuple(_hugging_face())
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    if not found:
        check.fail("model", f"one with the attention of {MODELS}", type(model).__name__)
    from atlas_blocks.recipes.hugging_face import HuggingFaceAttention

    converted = {}
    for name, module in found:
        try:
            layer = from_attention(module, window=window, gate_rank=gate_rank)
            _check_rotary(model, module, layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        index = module.layer_idx
        assert isinstance(index, int)
        converted[name] = HuggingFaceAttention(layer, index)
    for name, module in found:
        model.set_submodule(name, converted[name])
        config: Any = module.config
        config.atlas_attention = {"window": window, "gate_rank": gate_rank}
    # Assisted generation would take back what memories have written: transformers refuses it.
    model._is_stateful = True  # type: ignore[assignment]
    return [name for name, _ in found]


def load_converted(path: str | Path, **options: Any) -> Any:
    """The model that `save_pretrained` wrote after `replace_attention`.

    The model class's own `from_pretrained` cannot: it fills plain attention with random weights
    (transformers warns). options: of `from_pretrained` (dtype, device_map, ...).
    Raises ValueError where the folder holds no converted model.
    """
    import transformers

    from atlas_blocks.recipes.hugging_face import start_blocks

    config: Any = transformers.AutoConfig.from_pretrained(path)
    settings = getattr(config, "atlas_attention", None)
    if settings is None:
        check.fail("path", "a model saved after replace_attention", path)
    name = config.architectures[0]
    kind: Any = getattr(transformers, name, None)
    if kind is None:
        check.fail("path", "a model whose class transformers has", name)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        replace_attention(self, **settings)
        start_blocks(self)

    # Only a class of its own tells from_pretrained which parameters there are to fill.
    converted = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
    model = converted.from_pretrained(path, **options)
    model.__class__ = kind
    return model


def _effective(module: nn.Module, name: str) -> Tensor:
    """A parameter as forward uses it. Raises ValueError where something else stands before it."""
    path, _, kind = name.rpartition(".")
    owner = module.get_submodule(path)
    _check_own(name, owner, is_part=bool(path))
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


def _check_own(name: str, owner: nn.Module, is_part: bool) -> None:
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


def _fill(target: Tensor, names: tuple[str, ...], parts: list[Tensor]) -> None:
    rows = torch.cat([t.detach() for t in parts])
    check.tensor(" and ".join(names), rows, "together", target.shape)
    target.copy_(rows)


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
    _check_own("module", module, is_part=False)
    return readers[kind](module)


def _hugging_face() -> dict[type, Any]:
    """The attention classes of transformers, where it has been imported: no module is one else."""
    readers = {
        "gemma.modeling_gemma.GemmaAttention": _llama,
        "gpt2.modeling_gpt2.GPT2Attention": _gpt2,
        "llama.modeling_llama.LlamaAttention": _llama,
        "mistral.modeling_mistral.MistralAttention": _mistral,
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
            _check_own(f"{name}.weight", owner, is_part=True)
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


def _llama(m: Any, qk_norm: str = "none") -> Layout:
    c = m.config
    rope = c.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        check.fail("module", 'rotary positions of type "default"', rope)
    _check_causal(m)
    slots = _linears(m, ("q_proj", "k_proj", "v_proj"), "o_proj")
    settings = _settings(
        qk_norm=qk_norm,
        scale=m.scaling,
        rope_base=float(rope["rope_theta"]),
        kv_heads=c.num_key_value_heads,
        head_width=m.head_dim,
        **_biases(slots),
    )
    return Layout(c.hidden_size, c.num_attention_heads, settings, slots)


def _mistral(m: Any) -> Layout:
    _check_window(m.config)
    return _llama(m)


def _qwen3(m: Any) -> Layout:
    layout = _llama(m, "rms")
    for name, norm in (("q_norm", m.q_norm), ("k_norm", m.k_norm)):
        _check_own(f"{name}.weight", norm, is_part=True)
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


def _check_rotary(model: nn.Module, module: nn.Module, layer: DeepTransformerLayer) -> None:
    """That the model turns an attention's queries and keys as the attention's config says, from
    which the layer takes its positions."""
    base, attention = layer.config.rope_base, type(module).__module__
    for name, part in model.named_modules():
        of_another = getattr(part, "config", module.config) is not module.config
        if base is None or of_another or name.rpartition(".")[2] != "rotary_emb":
            continue
        rotary: Any = part
        _check_own(name, rotary, is_part=False)
        found = getattr(rotary, "inv_freq", None)
        if type(rotary).__module__ != attention or not isinstance(found, Tensor):
            check.fail(name, f"the rotary embedding of {attention}", type(rotary).__name__)
        if rotary.attention_scaling != 1:
            check.fail(f"{name}.attention_scaling", "1", rotary.attention_scaling)
        if not there(found):  # as `load_converted` builds it
            continue
        exponents = torch.arange(0, layer.width, 2, dtype=torch.float64) / layer.width
        ours, theirs = base**-exponents, found.detach().cpu().double()
        # Computed in float32, and rounded where the model was cast.
        close = 32 * torch.finfo(torch.float32).eps + torch.finfo(found.dtype).eps
        if ours.shape != theirs.shape or not torch.allclose(theirs, ours, rtol=close, atol=0):
            check.fail(f"{name}.inv_freq", f"the frequencies of rope_theta = {base}", "others")


def _check_causal(m: Any) -> None:
    if not m.is_causal or not getattr(m.config, "is_causal", True):
        check.fail("module", "causal attention", "is_causal=False")
    _check_window(m)


def _check_window(where: Any) -> None:
    window = getattr(where, "sliding_window", None)
    if window is not None:
        check.fail("module", "attention without a sliding window", window)
