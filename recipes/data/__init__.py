"""Data: documents from files, a tokenizer, memory-mapped shards, and batches in a fixed order."""

from atlas_blocks.recipes.data.batches import Batch, Packed
from atlas_blocks.recipes.data.shards import Shards, Split, prepare
from atlas_blocks.recipes.data.sources import Source
from atlas_blocks.recipes.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Packed",
    "Shards",
    "Source",
    "Split",
    "Tokenizer",
    "prepare",
    "train_tokenizer",
]
