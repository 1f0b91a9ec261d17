"""A recipe in words and numbers: its pattern, its parameters, the memory it carries."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    Config,
    DeepTransformerConfig,
    LSTMConfig,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsGateMixerConfig,
    MemoryAsLayerConfig,
    MemoryCachingConfig,
    SlidingWindowAttentionConfig,
    TNTConfig,
)
from atlas_blocks.blocks.foreign import built, is_foreign
from atlas_blocks.blocks.settings import changed
from atlas_blocks.blocks.stacks import STACKS, BlockConfig
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig

# As the specification writes them: decay, step, momentum, weights of the window.
GATES = {"alpha": "α", "eta": "η", "theta": "θ", "gamma": "γ"}


def pattern(config: LanguageModelConfig) -> str:
    """Such as "12 x MAG(mlp, Muon, c=16 | window 512)", or "6 x [3 x (matrix) + (window 512)]"."""
    turn = config.turn
    turns, rest = divmod(config.depth, len(turn))
    if len(turn) == 1 or turns == 1:
        return _in_turn(config.layers)
    return f"{turns} x [{_in_turn(turn)}]" + (f" + {_in_turn(turn[:rest])}" if rest else "")


UPDATE_NAMES = {"gd": "gradient descent", "muon": "Muon"}
# Those that go without saying.
PLAIN_MAPS = ("identity", "polynomial", "sketch", "taylor_exp")


def _in_turn(layers: Sequence[BlockConfig]) -> str:
    """Equal neighbours counted."""
    told = []
    for part, alike in itertools.groupby(map(_part, layers)):
        count = len(list(alike))
        told.append(f"{count} x {part}" if count > 1 else part)
    return " + ".join(told)


def _part(config: object) -> str:
    match config:
        case AtlasMemoryConfig():
            kind = [config.memory]
            if config.objective != "l2":
                kind.append(config.objective)
            if "coefficients" in config.fixed:
                kind.append(f"exp to degree {config.degree}")
            if config.feature_map not in PLAIN_MAPS:
                kind.append(config.feature_map)
            kind.append(UPDATE_NAMES.get(config.update, config.update))
            return ", ".join([*kind, f"c={config.window}"])
        case MemoryCachingConfig():
            read = "" if config.top_k is None else f", {config.top_k} read"
            return f"{_part(config.memory)}, kept every {config.segment}{read}"
        case TNTConfig():
            chunks = "/".join(str(m.chunk_size) for m in (config.memory, *config.local))
            return f"TNT: {_part(config.memory)}, chunks {chunks}, span {config.span}"
        case DeepTransformerConfig():
            return f"exact phi*, {config.objective}, c={config.window}"
        case SlidingWindowAttentionConfig():
            reach = "full attention" if config.window is None else f"window {config.window}"
            return reach + _kv_heads(config.kv_heads)
        case LSTMConfig():
            return "LSTM"
        case AtlasBlockConfig():
            return f"({_part(config.mixer)})"
        case MemoryAsGateConfig():
            return f"MAG({_part(config.memory)} | {_part(config.attention)})"
        case MemoryAsGateMixerConfig():
            return f"{_part(config.memory)} | {_part(config.attention)}"
        case MemoryAsLayerConfig():
            return f"MAL({_part(config.memory)}, {_part(config.attention)})"
        case MemoryAsContextConfig():
            heads = _kv_heads(config.kv_heads)
            return f"MAC({_part(config.memory)}, segment {config.segment}{heads})"
        case Config():
            return f"{type(config).__name__}({changed(config)})"
        case _:
            return type(config).__name__


def _kv_heads(count: int | None) -> str:
    return f", {count} kv heads" if count else ""


def parts_of(config: Config) -> list[Config]:
    """The configs that lie in its fields, and in tuples there."""
    values = (getattr(config, field.name) for field in dataclasses.fields(config))
    rows = (value if isinstance(value, tuple) else (value,) for value in values)
    return [part for row in rows for part in row if isinstance(part, Config)]


def gates(config: Config) -> str:
    """The gates that every token sets, such as "α η θ γ"; of a decay that none sets, "α fixed";
    those of memories that differ beside one another."""
    if not isinstance(config, AtlasMemoryConfig):
        found = dict.fromkeys(gates(part) for part in parts_of(config))
        return ", ".join(gate for gate in found if gate)
    own = [name for name in GATES if name not in config.fixed]
    if not config.momentum:
        own = [name for name in own if name != "theta"]
    found = [GATES[name] for name in own]
    if "alpha" in config.fixed and config.retention_init != 1:
        found.insert(0, f"{GATES['alpha']} fixed")
    return " ".join(found) or "none"


class _ShapesOnly(TorchFunctionMode):
    """Parameters are not initialised, large tensors neither zeroed nor copied: memory that is
    asked for is never touched."""

    instead: ClassVar[dict[Any, Callable[..., Any]]] = {
        Tensor.clone: lambda tensor, **_: tensor,
        Tensor.new_zeros: Tensor.new_empty,
        torch.zeros_like: torch.empty_like,
    }

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, nn.Parameter):
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
                return first
        return (self.instead.get(func) or func)(*args, **kwargs)


@functools.lru_cache(maxsize=4)
def unfilled_block(config: BlockConfig, dim: int, heads: int) -> nn.Module:
    """One block, its parameters without values: for shapes and counts.

    Not on the meta device, whose operations take seconds to import.
    """
    with _ShapesOnly():
        return built(config, dim, heads)


def least_mlp(block: BlockConfig) -> BlockConfig:
    """The block with MLPs of one unit, where it has any."""
    return block.replace(mlp_width=1) if isinstance(block, STACKS) else block


def state_bytes(config: LanguageModelConfig, tokens: int) -> int:
    """Bytes of state that one sequence carries after `tokens` tokens, in float32.

    Measured on one block of each kind: before any token, and where the state grows, after one. The
    state does not depend on the MLP.
    """

    def of(layer: BlockConfig) -> int:
        layer, steps = _one_a_token(layer, tokens)
        block = unfilled_block(least_mlp(layer), config.dim, config.heads)

        def after(count: int) -> int:
            with torch.no_grad(), _ShapesOnly():
                state = block(torch.zeros(1, count, config.dim))[1]
            return 0 if state is None else state.nbytes

        start = after(0)
        return start + steps * (after(1) - start if state_grows(layer) else 0)

    return sum(count * of(layer) for layer, count in collections.Counter(config.layers).items())


def _one_a_token(layer: BlockConfig, tokens: int) -> tuple[BlockConfig, int]:
    """A layer whose state grows at every token as that of `layer` does at times, and how often it
    has after so many."""
    if isinstance(layer, AtlasBlockConfig) and isinstance(layer.mixer, MemoryCachingConfig):
        segment = layer.mixer.segment
        return layer.replace(mixer=layer.mixer.replace(segment=1)), tokens // segment
    return layer, tokens


def state_grows(config: object) -> bool:
    """Whether the state grows with the text: every key is kept, without a window or for phi*, or
    every segment's memory. Of a mixer of somebody's it is taken to."""
    if isinstance(config, (DeepTransformerConfig, MemoryCachingConfig)):
        return True
    if isinstance(config, SlidingWindowAttentionConfig):
        return config.window is None
    if is_foreign(config):
        return True
    return isinstance(config, Config) and any(map(state_grows, parts_of(config)))


def meta_model(config: LanguageModelConfig) -> LanguageModel:
    """The whole model without storage: shapes and counts only."""
    with torch.device("meta"):
        return config.build()


def parameters_in(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def human(count: float, unit: str = "") -> str:
    """1234567 -> "1.23M", or with a unit "1.23 MB": three significant digits."""
    for scale, suffix in ((1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            digits = count / scale
            decimals = 0 if digits >= 100 else 1 if digits >= 10 else 2
            return f"{digits:.{decimals}f}" + (f" {suffix}{unit}" if unit else suffix)
    return f"{count:.0f} {unit}".strip()
