"""A recipe in words and numbers: its pattern, its parameters, the memory it carries."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    Config,
    DeepTransformerConfig,
    LSTMConfig,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    SlidingWindowAttentionConfig,
)
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig


def pattern(config: LanguageModelConfig) -> str:
    """Such as "12 x MAG(mlp, Muon, c=16 | window 512)"."""
    return f"{config.depth} x {_part(config.block)}"


def _part(config: Config) -> str:
    match config:
        case AtlasMemoryConfig():
            update = "Muon" if config.update == "muon" else "gradient descent"
            kind = f"{config.memory}, dot" if config.objective == "dot" else config.memory
            cut = f", exp to degree {config.degree}" if "coefficients" in config.fixed else ""
            return f"{kind}{cut}, {update}, c={config.window}"
        case DeepTransformerConfig():
            return f"exact phi*, {config.objective}, c={config.window}"
        case SlidingWindowAttentionConfig():
            return "full attention" if config.window is None else f"window {config.window}"
        case LSTMConfig():
            return "LSTM"
        case AtlasBlockConfig():
            return f"({_part(config.mixer)})"
        case MemoryAsGateConfig():
            return f"MAG({_part(config.memory)} | {_part(config.attention)})"
        case MemoryAsLayerConfig():
            return f"MAL({_part(config.memory)}, {_part(config.attention)})"
        case MemoryAsContextConfig():
            return f"MAC({_part(config.memory)}, segment {config.segment})"
        case _:
            return type(config).__name__


def state_bytes(config: LanguageModelConfig, tokens: int) -> int:
    """Bytes of state that one sequence carries after `tokens` tokens, in float32.

    Measured on one block: before any token, and where the state grows, after one.
    """
    start = _block_state_bytes(config, 0)
    each = _block_state_bytes(config, 1) - start if state_grows(config) else 0
    return config.depth * (start + tokens * each)


def _block_state_bytes(config: LanguageModelConfig, tokens: int) -> int:
    # Zeros in place of weights: sizes are all that is asked for, and initialising is slow. The
    # state does not depend on the MLP.
    with torch.device("meta"):
        block = config.block.replace(mlp_width=1).build(config.dim, config.heads)
    block.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.zero_()
        _, state = block(torch.zeros(1, tokens, config.dim))
    return state.nbytes


def state_grows(config: Config) -> bool:
    """Whether the state grows with the text: every key is kept, without a window or for phi*."""
    if isinstance(config, DeepTransformerConfig):
        return True
    if isinstance(config, SlidingWindowAttentionConfig):
        return config.window is None
    parts = (getattr(config, field.name) for field in dataclasses.fields(config))
    return any(isinstance(part, Config) and state_grows(part) for part in parts)


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
