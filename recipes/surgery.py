"""Blocks put into whole models: in the place of their attention, or beside it.

B batch, T tokens.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atlas_blocks import Block, Config, DeepTransformerConfig, check
from atlas_blocks.blocks.deep_transformer import DeepTransformerLayer
from atlas_blocks.blocks.foreign import built
from atlas_blocks.data import there
from atlas_blocks.recipes import adapters

Layers = int | str | Sequence[int | str] | Callable[[str, nn.Module], bool] | None
INITS = ("from_attention", "fresh", "parallel")
# What nn.Module keeps of hooks on itself.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replace_layers(
    model: nn.Module,
    layers: Layers = None,
    *,
    block: Config | None = None,
    init: str = "from_attention",
    heads: int | None = None,
) -> list[str]:
    """Put blocks into a model, in place; the names of the modules that were replaced.

    model: a decoder of Hugging Face transformers, or any module.
    layers: numbers or paths of modules, or a predicate of (path, module); None: every attention of
    transformers, every nn.MultiheadAttention.
    block: the config of a block with a state and without a residual of its own.
    init: "from_attention", the same function where the block can compute it (`from_attention`; None
    is a DeepTransformerLayer with neutral gates); "fresh", a block as it starts; "parallel", a
    fresh block beside the attention with a gate that starts at zero, so that the model starts as
    it was.
    heads: of a fresh block; None: as many as the attention has.

    dtype, device, training, hooks on the module and its places in the model, if it is shared, are
    taken over; where weights are, requires_grad too. In a transformers model the state lies in its
    own cache, and its config notes what was done: `load_converted` reads what its
    `save_pretrained` then writes. A MultiheadAttention must be called with query, key and value
    alike, causally. Any other module is one of x [B, T, dim] -> y, or a block.
    Raises ValueError where there is none, or where one cannot be converted; the model is then as it
    was.
    """
    check.choice("init", init, INITS)
    if block is None and init != "from_attention":
        check.fail("block", f"the config of a block with init={init!r}", None)
    if block is not None and not (isinstance(block, Config) and hasattr(block, "build")):
        check.fail("block", "the config of a block", type(block).__name__)
    if heads is not None:
        check.at_least("heads", heads, 1)
    found = _found(model, layers)
    converted: dict[int, nn.Module] = {}
    for name, module in found:
        if id(module) not in converted:
            try:
                converted[id(module)] = _converted(model, module, block, init, heads)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    for name, module in found:
        model.set_submodule(name, converted[id(module)])
    names = [name for name, _ in found]
    if _is_pretrained(model):
        config: Any = model.config
        # Assisted generation would take back what memories have written: transformers refuses it.
        model._is_stateful = True  # type: ignore[assignment]
        spec = None if block is None else block.to_dict()
        done = {"layers": names, "block": spec, "init": init, "heads": heads}
        config.atlas_layers = [*getattr(config, "atlas_layers", []), done]
    return names


def replace_attention(model: nn.Module, *, window: int = 1, gate_rank: int = 32) -> list[str]:
    """Replace every attention of a model in place by what goes on as it does; their names.

    `replace_layers` with a DeepTransformerLayer of this window and gate_rank.
    """
    return replace_layers(model, block=DeepTransformerConfig(window=window, gate_rank=gate_rank))


def load_converted(path: str | Path, **options: Any) -> Any:
    """The model that `save_pretrained` wrote after `replace_layers`.

    The model class's own `from_pretrained` cannot: it fills plain attention with random weights
    (transformers warns). options: of `from_pretrained` (dtype, device_map, ...).
    Raises ValueError where the folder holds no converted model.
    """
    import transformers

    from atlas_blocks.recipes import hugging_face

    config: Any = transformers.AutoConfig.from_pretrained(path)
    done = getattr(config, "atlas_layers", None)
    if done is None:
        check.fail("path", "a model saved after replace_layers", path)
    name = config.architectures[0]
    kind: Any = getattr(transformers, name, getattr(hugging_face, name, None))
    if kind is None:
        check.fail("path", "a model whose class transformers has, or this library", name)

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        config.atlas_layers = []
        kind.__init__(self, config, *args, **kwargs)
        for step in done:
            block = None if step["block"] is None else Config.from_dict(step["block"])
            layers = [_place(self, name) for name in step["layers"]]
            replace_layers(self, layers, block=block, init=step["init"], heads=step["heads"])
        hugging_face.start_blocks(self)

    # Only a class of its own tells from_pretrained which parameters there are to fill.
    converted = type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})
    model = converted.from_pretrained(path, **options)
    model.__class__ = kind
    return model


def train_only_new(model: nn.Module) -> list[str]:
    """Freeze a model but for what `replace_layers` has added to it; the names of what is trained.

    Of blocks from attention that is all but the projections that they took over; of parallel ones
    the block and its gate. Raises ValueError where nothing was replaced.
    """
    new = {
        f"{path}.{name}" if path else name
        for path, part in model.named_modules()
        if (old := getattr(part, "_taken", None)) is not None
        for name, _ in part.named_parameters()
        if name not in old
    }
    if not new:
        check.fail("model", "one with layers of replace_layers", type(model).__name__)
    for name, p in model.named_parameters():
        p.requires_grad_(name in new)
    return sorted(new)


class MultiheadBlock(nn.Module):
    """A block in the place of an nn.MultiheadAttention, for causal self-attention."""

    def __init__(self, layer: Block) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """query [B, T, dim], the key and the value too -> [B, T, dim], without weights.

        attn_mask: a causal one, whose values are not looked at, or is_causal. key_padding_mask:
        bool [B, T], True at padding. Raises ValueError for attention to something else.
        """
        if key is not query or value is not query:
            check.fail("key", "the query itself (self-attention)", "another tensor")
        if attn_mask is None and not is_causal:
            check.fail("attn_mask", "a causal mask, or is_causal=True", None)
        mask = key_padding_mask
        if mask is not None:
            check.tensor("key_padding_mask", mask, "[B, T]", query.shape[:2], (torch.bool,))
            mask = ~mask
        return self.layer(query, mask=mask)[0], None


class PlainBlock(nn.Module):
    """A block in the place of a module x [B, T, dim] -> y that knows of no state."""

    def __init__(self, layer: Block) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *unused: Any, **others: Any) -> Tensor:
        """unused, others: what the module before was told."""
        return self.layer(x)[0]


class BesideBlock(nn.Module):
    """A module x [B, T, dim], ... -> y or (y, ...) as it is, and gate * block(x) added to its y."""

    def __init__(self, module: nn.Module, layer: Block) -> None:
        super().__init__()
        self.module, self.layer = module, layer
        like = next(layer.parameters())
        self.gate = nn.Parameter(torch.zeros(layer.dim, device=like.device, dtype=like.dtype))

    def reset_parameters(self) -> None:
        """Close the gate."""
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = self.module(x, *args, **kwargs)
        more = self.gate * self.layer(x)[0]
        return (found[0] + more, *found[1:]) if isinstance(found, tuple) else found + more


def _is_pretrained(model: nn.Module) -> bool:
    """Whether it is a model of transformers; where that has not been imported, none is."""
    library: Any = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _is_attention(module: nn.Module) -> bool:
    """Whether it follows the interface that decoders of transformers share."""
    return hasattr(module, "is_causal") and all(
        hasattr(module, name) for name in ("config", "layer_idx")
    )


def _found(model: nn.Module, layers: Layers) -> list[tuple[str, nn.Module]]:
    """The modules that are meant, a shared one at each of its places."""
    every = list(model.named_modules(remove_duplicate=False))
    if layers is None:
        kinds = (nn.MultiheadAttention,)
        found = [(n, m) for n, m in every if n and (_is_attention(m) or isinstance(m, kinds))]
        if not found:
            check.fail(
                "model", f"one with the attention of {adapters.MODELS}", type(model).__name__
            )
        return found
    if callable(layers):
        found = [(n, m) for n, m in every if n and layers(n, m)]
        if not found:
            check.fail("layers", "a predicate that chooses a module", "none")
        return found
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    parts = dict(every)
    found = []
    for one in wanted:
        if isinstance(one, str):
            if not one or one not in parts:
                check.fail("layers", "paths of modules", repr(one))
            # A shared module wherever it is.
            found += [(n, m) for n, m in every if m is parts[one]]
        else:
            numbered = [
                (n, m)
                for n, m in every
                if _is_attention(m) and getattr(m, "layer_idx", None) == one
            ]
            if not numbered:
                check.fail("layers", "numbers of layers with an attention of transformers", one)
            found += numbered
    if not found:
        check.fail("layers", "at least one", "none")
    return list(dict(found).items())


def _converted(
    model: nn.Module, module: nn.Module, block: Config | None, init: str, heads: int | None
) -> nn.Module:
    """What comes in a module's place."""
    attention = _is_attention(module)
    old: set[str] = set()
    if init == "from_attention":
        layer = adapters.from_attention(_bare(module), block=block)
        if attention and isinstance(layer, DeepTransformerLayer):
            _check_rotary(model, module, layer)
        old = {f"layer.{name}" for name in adapters.taken(layer)}
    else:
        layer = _fresh(module, block, heads)
    if attention:
        from atlas_blocks.recipes import hugging_face

        index: Any = module.layer_idx
        window = adapters.window_of(module)
        if init == "parallel":
            found: nn.Module = hugging_face.ParallelAttention(module, layer, index, window)
        else:
            found = hugging_face.HuggingFaceAttention(layer, index, window)
    elif init == "parallel":
        found = BesideBlock(module, layer)
    elif isinstance(module, nn.MultiheadAttention):
        found = MultiheadBlock(layer)
    elif isinstance(module, Block):
        found, old = layer, {name.removeprefix("layer.") for name in old}
    else:
        found = PlainBlock(layer)
    if init == "parallel":
        kept = "attention." if attention else "module."
        old = {n for n, _ in found.named_parameters() if n.startswith(kept)}
    else:
        for name in HOOKS:
            setattr(found, name, getattr(module, name))
    found._taken = frozenset(old)  # type: ignore[assignment]
    return found.train(module.training)


def _bare(module: nn.Module) -> nn.Module:
    """The same module without hooks on itself, which its successor takes over."""
    bare = copy.copy(module)
    for name in HOOKS:
        value = getattr(module, name)
        setattr(bare, name, None if value is None or isinstance(value, bool) else type(value)())
    return bare


def _fresh(module: nn.Module, block: Config | None, heads: int | None) -> Block:
    """A block of a module's width, in its dtype and on its device."""
    assert block is not None
    config: Any = getattr(module, "config", None)
    if _is_attention(module):
        dim, own = config.hidden_size, config.num_attention_heads
    elif isinstance(module, nn.MultiheadAttention):
        if not module.batch_first:
            check.fail("module", "batch_first=True", False)
        dim, own = module.embed_dim, module.num_heads
    else:
        dim, own = _width(module), getattr(module, "heads", None)
    count = own if heads is None else heads
    if count is None:
        check.fail("heads", f"how many a block has in the place of {type(module).__name__}", None)
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    layer = built(block, dim, count)  # type: ignore[arg-type]
    return layer if like is None else layer.to(like.device, like.dtype)


def _width(module: nn.Module) -> int:
    """Of what a module takes: its own `dim`, or that of the first Linear in it."""
    dim = getattr(module, "dim", None)
    if isinstance(dim, int):
        return dim
    for part in module.modules():
        if isinstance(part, nn.Linear):
            return part.in_features
    check.fail(
        "module", "one with a `dim` or a Linear, which tell its width", type(module).__name__
    )


def _place(model: Any, name: str) -> str:
    """A path from the model that was operated on, in the one that was saved around it."""
    parts = dict(model.named_modules(remove_duplicate=False))
    return name if name in parts else f"{model.base_model_prefix}.{name}"


def _check_rotary(model: nn.Module, module: nn.Module, layer: DeepTransformerLayer) -> None:
    """That the model turns an attention's queries and keys as the attention's config says, from
    which the layer takes its positions."""
    base, attention = layer.config.rope_base, type(module).__module__
    for name, part in model.named_modules():
        of_another = getattr(part, "config", module.config) is not module.config
        if base is None or of_another or name.rpartition(".")[2] != "rotary_emb":
            continue
        rotary: Any = part
        adapters.check_own(name, rotary, is_part=False)
        found = getattr(rotary, "inv_freq", None)
        if type(rotary).__module__ != attention or not isinstance(found, Tensor):
            check.fail(name, f"the rotary embedding of {attention}", type(rotary).__name__)
        if rotary.attention_scaling != 1:
            check.fail(f"{name}.attention_scaling", "1", rotary.attention_scaling)
        if not there(found):  # as `load_converted` builds it
            continue
        width = layer.config.rope_width or layer.width
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        ours, theirs = base**-exponents, found.detach().cpu().double()
        # Computed in float32, and rounded where the model was cast.
        close = 32 * torch.finfo(torch.float32).eps + torch.finfo(found.dtype).eps
        if ours.shape != theirs.shape or not torch.allclose(theirs, ours, rtol=close, atol=0):
            check.fail(f"{name}.inv_freq", f"the frequencies of rope_theta = {base}", "others")
