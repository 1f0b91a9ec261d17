"""At home in Hugging Face transformers: blocks in the place of its attention, its cache, its masks.

Needs the extra `hf`.
"""

from atlas_blocks.recipes.hugging_face.attention import HuggingFaceAttention, start_blocks
from atlas_blocks.recipes.hugging_face.cache import StateLayer

__all__ = ["HuggingFaceAttention", "StateLayer", "start_blocks"]
