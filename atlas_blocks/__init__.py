"""Composable blocks for long-context models whose memory is optimised at test time (ATLAS)."""

import importlib
from typing import Any

from atlas_blocks import functional
from atlas_blocks.blocks.attention import SlidingWindowAttention, SlidingWindowAttentionConfig
from atlas_blocks.blocks.base import Block
from atlas_blocks.blocks.conv import ShortConv
from atlas_blocks.blocks.deep_transformer import (
    DeepTransformerConfig,
    DeepTransformerLayer,
    phi_star,
)
from atlas_blocks.blocks.feed_forward import MixtureOfExpertsConfig, SquaredReLU, SwiGLU
from atlas_blocks.blocks.lstm import LSTM, LSTMConfig
from atlas_blocks.blocks.memory import AtlasMemory, AtlasMemoryConfig
from atlas_blocks.blocks.memory_as_context import MemoryAsContext, MemoryAsContextConfig
from atlas_blocks.blocks.memory_caching import MemoryCaching, MemoryCachingConfig
from atlas_blocks.blocks.stacks import (
    AtlasBlock,
    AtlasBlockConfig,
    MemoryAsGate,
    MemoryAsGateConfig,
    MemoryAsGateMixer,
    MemoryAsGateMixerConfig,
    MemoryAsLayer,
    MemoryAsLayerConfig,
)
from atlas_blocks.blocks.tnt import TNT, TNTConfig
from atlas_blocks.config import Config, with_settings
from atlas_blocks.omega.feature_maps import register_feature_map
from atlas_blocks.omega.memories import register_memory
from atlas_blocks.omega.objectives import register_objective
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.updates import register_update
from atlas_blocks.ops import ProviderWarning, checkpoint_policy, keep_provider, use_provider
from atlas_blocks.state import State

__all__ = [
    "LSTM",
    "TNT",
    "AtlasBlock",
    "AtlasBlockConfig",
    "AtlasMemory",
    "AtlasMemoryConfig",
    "Block",
    "Config",
    "DeepTransformerConfig",
    "DeepTransformerLayer",
    "LSTMConfig",
    "MemoryAsContext",
    "MemoryAsContextConfig",
    "MemoryAsGate",
    "MemoryAsGateConfig",
    "MemoryAsGateMixer",
    "MemoryAsGateMixerConfig",
    "MemoryAsLayer",
    "MemoryAsLayerConfig",
    "MemoryCaching",
    "MemoryCachingConfig",
    "MixtureOfExpertsConfig",
    "ProviderWarning",
    "Rule",
    "ShortConv",
    "SlidingWindowAttention",
    "SlidingWindowAttentionConfig",
    "SquaredReLU",
    "State",
    "SwiGLU",
    "TNTConfig",
    "checkpoint_policy",
    "functional",
    "keep_provider",
    "phi_star",
    "register_feature_map",
    "register_memory",
    "register_objective",
    "register_update",
    "use_provider",
    "with_settings",
]


def __getattr__(name: str) -> Any:
    """`compile`, `compile_blocks` and `explain`, found when first used: they import all of
    Inductor."""
    if name in ("compile", "compile_blocks", "explain"):
        return getattr(importlib.import_module("atlas_blocks.compile_passes"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
