"""The stacks: one block of a model each (specification section 9; ATLAS Fig. 3, Titans section 4).

B batch, T tokens. Every sublayer is pre-norm and residual. A mixer is what stands in one, and may
be memory and attention together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from atlas_blocks import check
from atlas_blocks.blocks.attention import SlidingWindowAttentionConfig
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.blocks.deep_transformer import DeepTransformerConfig
from atlas_blocks.blocks.feed_forward import MLP, build_mlp, checked_mlp
from atlas_blocks.blocks.foreign import Builds, ForeignBlock, built, is_foreign
from atlas_blocks.blocks.lstm import LSTMConfig
from atlas_blocks.blocks.memory import AtlasMemoryConfig
from atlas_blocks.blocks.memory_as_context import MemoryAsContextConfig
from atlas_blocks.blocks.memory_caching import MemoryCachingConfig
from atlas_blocks.blocks.norm import RMSNorm
from atlas_blocks.blocks.settings import takes
from atlas_blocks.blocks.tnt import TNTConfig
from atlas_blocks.config import Config
from atlas_blocks.state import State


def _check_mixer(name: str, value: object, *types: type) -> None:
    """One of these types, or a config of somebody's own."""
    if not (isinstance(value, types) or is_foreign(value)):
        ours = ", ".join(t.__name__ for t in types)
        check.fail(name, f"{ours} or a config of your own that has build", type(value).__name__)


class StackState(State):
    """The states of a stack's sublayers, in the order they run."""

    parts: tuple[State | None, ...]


def _parts(state: StackState | None, *layers: Block) -> tuple[Any, ...]:
    """The sublayers' states, or as many None."""
    if state is None:
        return (None,) * len(layers)
    if len(state.parts) != len(layers):
        check.fail("state", f"a StackState of {len(layers)} parts", f"{len(state.parts)} parts")
    for i, (part, layer) in enumerate(zip(state.parts, layers, strict=True)):
        kind = layer.state_type
        # A module of somebody's may have none.
        if part is None and kind is not None and not isinstance(layer, ForeignBlock):
            check.fail(f"state.parts[{i}]", kind.__name__, None)
    return state.parts


@dataclass(frozen=True)
class MemoryAsGateMixerConfig(Config):
    """memory, attention: the branches; combine: "sum" (ATLAS Fig. 3) or "product" (Titans)."""

    memory: AtlasMemoryConfig | Builds = field(default_factory=AtlasMemoryConfig)
    attention: SlidingWindowAttentionConfig | Builds = field(
        default_factory=SlidingWindowAttentionConfig
    )
    combine: str = "sum"

    def __post_init__(self) -> None:
        _check_branches(self)

    def build(self, dim: int, heads: int) -> MemoryAsGateMixer:
        return MemoryAsGateMixer(dim, heads, self)


def _check_branches(config: MemoryAsGateMixerConfig | MemoryAsGateConfig) -> None:
    _check_mixer("memory", config.memory, AtlasMemoryConfig)
    _check_mixer("attention", config.attention, SlidingWindowAttentionConfig)
    check.choice("combine", config.combine, ("sum", "product"))


class _Branches(Block):
    """A memory and an attention of the same input, whose normed outputs are combined."""

    state_type = StackState
    config: MemoryAsGateMixerConfig | MemoryAsGateConfig

    def _add_branches(self, dim: int, heads: int) -> None:
        self.memory = built(self.config.memory, dim, heads)
        self.attention = built(self.config.attention, dim, heads)
        self.memory_norm = RMSNorm(dim)
        self.attention_norm = RMSNorm(dim)

    def tensor_plan(self) -> dict[str, tuple[int, int]]:
        return {}

    def _combined(
        self, h: Tensor, state: StackState | None, documents: Documents | None
    ) -> tuple[Tensor, StackState]:
        memory, attention = _parts(state, self.memory, self.attention)
        m, memory = self.memory(h, memory, cu_seqlens=documents, detach_state=False)
        a, attention = self.attention(h, attention, cu_seqlens=documents, detach_state=False)
        m, a = self.memory_norm(m), self.attention_norm(a)
        return m + a if self.config.combine == "sum" else m * a, StackState((memory, attention))


class MemoryAsGateMixer(_Branches):
    """MAG in the place of an attention: Norm(memory(x)) combined with Norm(attention(x)), without
    the residual, the norm of x and the MLP that `MemoryAsGate` has.

    x [B, T, dim] -> y [B, T, dim]; state StackState (memory, attention).
    """

    @takes(MemoryAsGateMixerConfig)
    def __init__(
        self, dim: int, heads: int, config: MemoryAsGateMixerConfig = MemoryAsGateMixerConfig()
    ) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        self._add_branches(dim, heads)

    def mix(
        self, x: Tensor, state: StackState | None, documents: Documents | None = None
    ) -> tuple[Tensor, StackState]:
        return self._combined(x, state, documents)

    mix_packed = mix


MIXERS = (
    AtlasMemoryConfig,
    MemoryCachingConfig,
    TNTConfig,
    DeepTransformerConfig,
    SlidingWindowAttentionConfig,
    LSTMConfig,
    MemoryAsGateMixerConfig,
)
Mixer = (
    AtlasMemoryConfig
    | MemoryCachingConfig
    | TNTConfig
    | DeepTransformerConfig
    | SlidingWindowAttentionConfig
    | LSTMConfig
    | MemoryAsGateMixerConfig
    | Builds
)


@dataclass(frozen=True)
class AtlasBlockConfig(Config):
    """mixer: the token mixer's config. mlp: "swiglu", "relu2", "moe" or a
    MixtureOfExpertsConfig; mlp_width: its hidden units, or those of one expert, None = 8/3 dim, and
    half as many again for "relu2"."""

    mixer: Mixer = field(default_factory=AtlasMemoryConfig)
    mlp_width: int | None = None
    mlp: MLP = "swiglu"

    def __post_init__(self) -> None:
        _check_mixer("mixer", self.mixer, *MIXERS)
        object.__setattr__(self, "mlp", checked_mlp(self.mlp_width, self.mlp))

    def build(self, dim: int, heads: int) -> AtlasBlock:
        return AtlasBlock(dim, heads, self)


class AtlasBlock(Block):
    """x + mixer(norm x); x + MLP(norm x). With attention as the mixer: a Transformer block.

    x [B, T, dim] -> y [B, T, dim]; state StackState of the mixer's.
    """

    state_type = StackState

    @takes(AtlasBlockConfig)
    def __init__(self, dim: int, heads: int, config: AtlasBlockConfig = AtlasBlockConfig()) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        self.mixer_norm = RMSNorm(dim)
        self.mixer = built(config.mixer, dim, heads)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = build_mlp(config.mlp, dim, config.mlp_width)

    def tensor_plan(self) -> dict[str, tuple[int, int]]:
        return {}

    def mix(
        self, x: Tensor, state: StackState | None, documents: Documents | None = None
    ) -> tuple[Tensor, StackState]:
        (before,) = _parts(state, self.mixer)
        mixed, after = self.mixer(
            self.mixer_norm(x), before, cu_seqlens=documents, detach_state=False
        )
        x = x + mixed
        x = x + self.mlp(self.mlp_norm(x))[0]
        return x, StackState((after,))

    mix_packed = mix


@dataclass(frozen=True)
class MemoryAsLayerConfig(Config):
    """memory, attention: the two mixers' configs; mlp, mlp_width: of both MLPs, as in
    AtlasBlockConfig."""

    memory: AtlasMemoryConfig | Builds = field(default_factory=AtlasMemoryConfig)
    attention: SlidingWindowAttentionConfig | Builds = field(
        default_factory=SlidingWindowAttentionConfig
    )
    mlp_width: int | None = None
    mlp: MLP = "swiglu"

    def __post_init__(self) -> None:
        _check_mixer("memory", self.memory, AtlasMemoryConfig)
        _check_mixer("attention", self.attention, SlidingWindowAttentionConfig)
        object.__setattr__(self, "mlp", checked_mlp(self.mlp_width, self.mlp))

    def build(self, dim: int, heads: int) -> MemoryAsLayer:
        return MemoryAsLayer(dim, heads, self)


class MemoryAsLayer(Block):
    """MAL: memory, MLP, sliding-window attention, MLP.

    x [B, T, dim] -> y [B, T, dim]; state StackState (memory, attention).
    """

    state_type = StackState

    @takes(MemoryAsLayerConfig)
    def __init__(
        self, dim: int, heads: int, config: MemoryAsLayerConfig = MemoryAsLayerConfig()
    ) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        mlp = (config.mlp_width, config.mlp)
        self.memory = AtlasBlock(dim, heads, AtlasBlockConfig(config.memory, *mlp))
        self.attention = AtlasBlock(dim, heads, AtlasBlockConfig(config.attention, *mlp))

    def tensor_plan(self) -> dict[str, tuple[int, int]]:
        return {}

    def mix(
        self, x: Tensor, state: StackState | None, documents: Documents | None = None
    ) -> tuple[Tensor, StackState]:
        memory, attention = _parts(state, self.memory, self.attention)
        x, memory = self.memory(x, memory, cu_seqlens=documents, detach_state=False)
        x, attention = self.attention(x, attention, cu_seqlens=documents, detach_state=False)
        return x, StackState((memory, attention))

    mix_packed = mix


@dataclass(frozen=True)
class MemoryAsGateConfig(Config):
    """memory, attention: the branches; combine: "sum" (ATLAS Fig. 3) or "product" (Titans); mlp,
    mlp_width: as in AtlasBlockConfig."""

    memory: AtlasMemoryConfig | Builds = field(default_factory=AtlasMemoryConfig)
    attention: SlidingWindowAttentionConfig | Builds = field(
        default_factory=SlidingWindowAttentionConfig
    )
    combine: str = "sum"
    mlp_width: int | None = None
    mlp: MLP = "swiglu"

    def __post_init__(self) -> None:
        _check_branches(self)
        object.__setattr__(self, "mlp", checked_mlp(self.mlp_width, self.mlp))

    def build(self, dim: int, heads: int) -> MemoryAsGate:
        return MemoryAsGate(dim, heads, self)


class MemoryAsGate(_Branches):
    """MAG: x + Norm(memory(norm x)) combined with Norm(attention(norm x)); x + MLP(norm x).

    x [B, T, dim] -> y [B, T, dim]; state StackState (memory, attention).
    """

    @takes(MemoryAsGateConfig)
    def __init__(
        self, dim: int, heads: int, config: MemoryAsGateConfig = MemoryAsGateConfig()
    ) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        self.mixer_norm = RMSNorm(dim)
        self._add_branches(dim, heads)
        self.mlp_norm = RMSNorm(dim)
        self.mlp = build_mlp(config.mlp, dim, config.mlp_width)

    def mix(
        self, x: Tensor, state: StackState | None, documents: Documents | None = None
    ) -> tuple[Tensor, StackState]:
        mixed, state = self._combined(self.mixer_norm(x), state, documents)
        x = x + mixed
        x = x + self.mlp(self.mlp_norm(x))[0]
        return x, state

    mix_packed = mix


STACKS = (AtlasBlockConfig, MemoryAsLayerConfig, MemoryAsGateConfig, MemoryAsContextConfig)
BlockConfig = (
    AtlasBlockConfig | MemoryAsLayerConfig | MemoryAsGateConfig | MemoryAsContextConfig | Builds
)


def check_block(name: str, value: object) -> None:
    """`value` must be the config of a stack, or one of somebody's own."""
    if isinstance(value, MIXERS):
        kind = type(value).__name__
        check.fail(name, "a block config, as AtlasBlockConfig makes of a mixer's", kind)
    if not (isinstance(value, STACKS) or is_foreign(value)):
        check.fail(name, "a block config", type(value).__name__)
