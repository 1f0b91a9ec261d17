"""A language model around any stack of blocks: embedding, blocks, final norm, head.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemory,
    Config,
    DeepTransformerLayer,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    State,
    check,
)
from atlas_blocks.blocks.base import Documents
from atlas_blocks.blocks.norm import RMSNorm
from atlas_blocks.blocks.parameters import Linear

BlockConfig = AtlasBlockConfig | MemoryAsLayerConfig | MemoryAsGateConfig | MemoryAsContextConfig


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(Config):
    """Everything that defines a model; stored with every checkpoint.

    name: of the recipe, for people. block: one of the block configs, repeated `depth` times.
    tie_embeddings: the head shares the embedding's weights.
    """

    name: str
    vocab_size: int
    dim: int
    heads: int
    depth: int
    block: BlockConfig
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for field in ("vocab_size", "dim", "heads", "depth"):
            check.at_least(field, getattr(self, field), 1)
        if self.dim % self.heads:
            check.fail("heads", f"a divisor of dim = {self.dim}", self.heads)
        if not isinstance(self.block, BlockConfig):
            check.fail("block", "a block config", type(self.block).__name__)

    def build(self) -> LanguageModel:
        """The model, initialised."""
        return LanguageModel(self)


class LanguageModelState(State):
    """One state per block, first to last."""

    blocks: tuple[State, ...]


class LMOutput(NamedTuple):
    """logits [B, T, V], and the state after token T."""

    logits: Tensor
    state: LanguageModelState


class TokenEmbedding(nn.Embedding):
    """Tokens [B, T] -> x [B, T, dim]; x -> logits [B, T, V] by the same weights.

    Both in forward, where FSDP and offloading see to it that the weights are there.
    """

    std = 1.0

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.mT if input.is_floating_point() else super().forward(input)


class LanguageModel(nn.Module):
    """`model(tokens, state=None) -> LMOutput(logits, state)`.

    Embeddings and Linears start from Normal(0, sqrt(2 / (5 dim))), biases from zero: 0.02 at dim
    1000, more as models narrow. Memory layers keep the start they chose themselves. Every part
    resets its own: `reset_parameters` of all modules, in any order, draws the model anew.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            config.block.build(config.dim, config.heads) for _ in range(config.depth)
        )
        self.norm = RMSNorm(config.dim)
        # Tied: no second parameter at all, so that the state_dict holds every tensor once.
        self.head = (
            None if config.tie_embeddings else Linear(config.dim, config.vocab_size, bias=False)
        )
        std = math.sqrt(2 / (5 * self.config.dim))
        inside_memory = {
            part
            for memory in self.modules()
            if isinstance(memory, (AtlasMemory, DeepTransformerLayer))
            for part in memory.modules()
        }
        for module in self.modules():
            if isinstance(module, (Linear, TokenEmbedding)) and module not in inside_memory:
                module.std = std
                module.reset_parameters()

    def forward(
        self,
        tokens: Tensor,
        state: LanguageModelState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        detach_state: bool = True,
    ) -> LMOutput:
        """Logits for the token after each of `tokens`.

        tokens: int [B, T], any T >= 0. state: what the last call returned, to continue it.
        cu_seqlens: int [N + 1], bounds of packed documents (B = 1), each run as if alone.
        detach_state: False keeps the returned state in the autograd graph.
        Returns logits [B, T, V] and the state. Raises ValueError on a wrong shape, dtype or state.
        """
        check.tensor("tokens", tokens, "[B, T]", (None, None), (torch.int64, torch.int32))
        if state is not None and not isinstance(state, LanguageModelState):
            check.fail("state", "what this model returned, or None", type(state).__name__)
        if state is not None and len(state.blocks) != len(self.blocks):
            check.fail("state", f"{len(self.blocks)} block states", len(state.blocks))
        x = self.embedding(tokens)
        documents = None if cu_seqlens is None else Documents.check(cu_seqlens, x)
        before = state.blocks if state is not None else (None,) * len(self.blocks)
        after = []
        for block, block_state in zip(self.blocks, before, strict=True):
            x, block_state = block(x, block_state, cu_seqlens=documents, detach_state=detach_state)
            after.append(block_state)
        x = self.norm(x)
        logits = (self.embedding if self.head is None else self.head)(x)
        return LMOutput(logits, LanguageModelState(tuple(after)))

    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters())
