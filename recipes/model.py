"""A language model around any blocks, alike or not: embedding, blocks, final norm, head.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atlas_blocks import AtlasMemory, Config, DeepTransformerLayer, State, check
from atlas_blocks.blocks.base import Documents
from atlas_blocks.blocks.foreign import ForeignBlock, built
from atlas_blocks.blocks.norm import RMSNorm
from atlas_blocks.blocks.padding import Padding, checked_mask, run_padded
from atlas_blocks.blocks.parameters import GroupedLinear, Linear
from atlas_blocks.blocks.stacks import BlockConfig
from atlas_blocks.recipes.architectures import size_of
from atlas_blocks.recipes.patterns import Layers, turn_of


@dataclasses.dataclass(frozen=True, init=False)
class LanguageModelConfig(Config):
    """Everything that defines a model; stored with every checkpoint.

    name: of the recipe, for people. layers: the config of every block, first to last. What is given
    for it is repeated up to `depth` and cut there: one block config (all are alike), a pattern of
    names such as "3*atlas+transformer", or a sequence of both. depth: None is one turn of it; less
    than that is a ValueError. block: another name of layers, from when all were alike.
    tie_embeddings: the head shares the embedding's weights.
    """

    name: str
    vocab_size: int
    dim: int
    heads: int
    depth: int
    layers: tuple[BlockConfig, ...]
    tie_embeddings: bool

    def __init__(
        self,
        name: str,
        vocab_size: int,
        dim: int,
        heads: int,
        depth: int | None = None,
        layers: Layers | None = None,
        tie_embeddings: bool = True,
        *,
        block: BlockConfig | None = None,
    ) -> None:
        if not isinstance(name, str):
            check.fail("name", "a string", repr(name))
        for field, value in (("vocab_size", vocab_size), ("dim", dim), ("heads", heads)):
            check.at_least(field, value, 1)
        if dim % heads:
            check.fail("heads", f"a divisor of dim = {dim}", heads)
        check.boolean("tie_embeddings", tie_embeddings)
        given = [x for x in (layers, block) if x is not None]
        if len(given) != 1:
            check.fail("layers", "layers or block", "both" if given else "neither")
        turn = turn_of(given[0], size_of(dim, heads))
        depth = len(turn) if depth is None else depth
        check.at_least("depth", depth, 1)
        if depth < len(turn):
            check.fail("depth", f"at least {len(turn)}, one turn of layers", depth)
        values = {
            "name": name,
            "vocab_size": vocab_size,
            "dim": dim,
            "heads": heads,
            "depth": depth,
            "layers": tuple(itertools.islice(itertools.cycle(turn), depth)),
            "tie_embeddings": tie_embeddings,
        }
        for field, value in values.items():
            object.__setattr__(self, field, value)

    @property
    def turn(self) -> tuple[BlockConfig, ...]:
        """The shortest sequence of layers that, repeated and cut, is all of them."""
        layers = self.layers
        for length in range(1, len(layers)):
            if all(a == b for a, b in zip(layers[length:], layers, strict=False)):
                return layers[:length]
        return layers

    def replace(self, **changes: Any) -> LanguageModelConfig:
        """A copy with some fields changed; another depth repeats or cuts the turn of layers.

        Raises ValueError for an unknown field, and for a depth below one turn.
        """
        if "block" in changes and "layers" not in changes:
            changes["layers"] = changes.pop("block")
        if "depth" in changes:
            changes = {"layers": self.turn, **changes}
        return super().replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """As of every config; of the layers one turn."""
        whole = super().to_dict()
        return whole | {"layers": whole["layers"][: len(self.turn)]}

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


def start_widths(model: nn.Module, dim: int) -> None:
    """Have embeddings and Linears of a model of this width start as LanguageModel says."""
    std = math.sqrt(2 / (5 * dim))
    inside_memory = {
        part
        for memory in model.modules()
        if isinstance(memory, (AtlasMemory, DeepTransformerLayer, ForeignBlock))
        for part in memory.modules()
    }
    for module in model.modules():
        if (
            isinstance(module, (Linear, GroupedLinear, TokenEmbedding))
            and module not in inside_memory
        ):
            module.std = std
            module.reset_parameters()


class LanguageModel(nn.Module):
    """`model(tokens, state=None) -> LMOutput(logits, state)`.

    Embeddings and Linears start from Normal(0, sqrt(2 / (5 dim))), biases from zero: 0.02 at dim
    1000, more as models narrow. Memory layers and modules of somebody's keep their
    own start. Every part resets its own: `reset_parameters` of all modules, in any order, draws
    the model anew.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(
            built(layer, config.dim, config.heads) for layer in config.layers
        )
        self.norm = RMSNorm(config.dim)
        # Tied: no second parameter at all, so that the state_dict holds every tensor once.
        self.head = (
            None if config.tie_embeddings else Linear(config.dim, config.vocab_size, bias=False)
        )
        start_widths(self, config.dim)

    def forward(
        self,
        tokens: Tensor,
        state: LanguageModelState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        detach_state: bool = True,
    ) -> LMOutput:
        """Logits for the token after each of `tokens`.

        tokens: int [B, T], any T >= 0. state: what the last call returned, to continue it.
        cu_seqlens: int [N + 1], bounds of packed documents (B = 1), each run as if alone.
        mask: bool [B, T], False at padding, which no row reads: see `Block.forward`.
        detach_state: False keeps the returned state in the autograd graph.
        Returns logits [B, T, V] and the state. Raises ValueError on a wrong shape, dtype or state.
        """
        check.tensor("tokens", tokens, "[B, T]", (None, None), (torch.int64, torch.int32))
        if state is not None and not isinstance(state, LanguageModelState):
            check.fail("state", "what this model returned, or None", type(state).__name__)
        if state is not None and len(state.blocks) != len(self.blocks):
            check.fail("state", f"{len(self.blocks)} block states", len(state.blocks))
        if mask is not None:
            if cu_seqlens is not None:
                check.fail("mask", "none beside cu_seqlens", "both")
            if checked_mask(mask, tokens):
                return self._masked(tokens, state, Padding.of(mask), detach_state)
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

    def _masked(
        self,
        tokens: Tensor,
        state: LanguageModelState | None,
        padding: Padding,
        detach_state: bool,
    ) -> LMOutput:
        if state is not None and (n := len(state)) != len(tokens):
            check.fail("state", f"a batch of {len(tokens)} (that of tokens)", n)

        def call(tokens: Tensor, state: Any, cu_seqlens: Tensor | None) -> LMOutput:
            # Not by a call of the module, whose hooks have run already.
            return self.forward(tokens, state, cu_seqlens=cu_seqlens, detach_state=detach_state)

        return LMOutput(*run_padded(call, tokens, state, padding))

    def parameter_count(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters())
