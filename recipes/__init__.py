"""Recipes: named configs, full models, text and tasks, training, generation, the command line."""

from atlas_blocks.recipes.generate import generate, prefill, stream
from atlas_blocks.recipes.model import (
    LanguageModel,
    LanguageModelConfig,
    LanguageModelState,
    LMOutput,
)
from atlas_blocks.recipes.registry import build, config, names, register_block, with_memory
from atlas_blocks.recipes.training import TrainingConfig, train

__all__ = [
    "LMOutput",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelState",
    "TrainingConfig",
    "build",
    "config",
    "generate",
    "names",
    "prefill",
    "register_block",
    "stream",
    "train",
    "with_memory",
]
