"""Composable blocks for long-context models whose memory is optimised at test time (ATLAS)."""

from atlas_blocks import functional
from atlas_blocks.blocks.attention import SlidingWindowAttention, SlidingWindowAttentionConfig
from atlas_blocks.blocks.base import Block
from atlas_blocks.blocks.conv import ShortConv
from atlas_blocks.blocks.deep_transformer import (
    DeepTransformerConfig,
    DeepTransformerLayer,
    phi_star,
)
from atlas_blocks.blocks.memory import AtlasMemory, AtlasMemoryConfig
from atlas_blocks.blocks.stacks import (
    AtlasBlock,
    AtlasBlockConfig,
    MemoryAsContext,
    MemoryAsContextConfig,
    MemoryAsGate,
    MemoryAsGateConfig,
    MemoryAsLayer,
    MemoryAsLayerConfig,
)
from atlas_blocks.blocks.swiglu import SwiGLU
from atlas_blocks.config import Config
from atlas_blocks.ops import ProviderWarning, use_provider
from atlas_blocks.state import State

__all__ = [
    "AtlasBlock",
    "AtlasBlockConfig",
    "AtlasMemory",
    "AtlasMemoryConfig",
    "Block",
    "Config",
    "DeepTransformerConfig",
    "DeepTransformerLayer",
    "MemoryAsContext",
    "MemoryAsContextConfig",
    "MemoryAsGate",
    "MemoryAsGateConfig",
    "MemoryAsLayer",
    "MemoryAsLayerConfig",
    "ProviderWarning",
    "ShortConv",
    "SlidingWindowAttention",
    "SlidingWindowAttentionConfig",
    "State",
    "SwiGLU",
    "functional",
    "phi_star",
    "use_provider",
]
