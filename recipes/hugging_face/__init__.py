"""At home in Hugging Face transformers: recipes as its models, blocks in the place of attention.

Importing it registers the models with the Auto classes. Needs the extra `hf`.
"""

from atlas_blocks.recipes.hugging_face.attention import (
    HuggingFaceAttention,
    ParallelAttention,
    start_blocks,
)
from atlas_blocks.recipes.hugging_face.cache import StateLayer
from atlas_blocks.recipes.hugging_face.model import AtlasConfig, AtlasForCausalLM, AtlasModel

__all__ = [
    "AtlasConfig",
    "AtlasForCausalLM",
    "AtlasModel",
    "HuggingFaceAttention",
    "ParallelAttention",
    "StateLayer",
    "start_blocks",
]
