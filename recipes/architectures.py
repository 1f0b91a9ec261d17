"""Every named system as configs over the blocks: a function from a size to a block config, or to
those of one turn of layers.

The rule's systems are rows of specification section 8. All share the layer around the rule
(projections, short convolution, unit keys, output norm and gate) and the block around the layer,
so that recipes differ in what they memorise and how. Where a system's own paper differs, its
function says how far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    LSTMConfig,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    MemoryCachingConfig,
    SlidingWindowAttentionConfig,
    TNTConfig,
)
from atlas_blocks.blocks.stacks import BlockConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of the paper's table of sizes, and what we add to it.

    parameters: what the name promises; None: as many as atlas-mag of this size with the default
    MLP width. reach: attention window of the hybrids, and segment of MAC. multiple: MLP widths
    are rounded to it.
    """

    depth: int
    dim: int
    heads: int
    parameters: float | None
    vocab_size: int = 32_000
    expansion: int = 4
    reach: int = 512
    multiple: int = 64


SIZES = {
    "tiny": Size(2, 64, 4, None, vocab_size=256, expansion=1, reach=32, multiple=8),
    "170m": Size(12, 768, 16, 170e6),
    "340m": Size(24, 1024, 16, 340e6),
    "760m": Size(24, 1536, 16, 760e6),
    "1.3b": Size(18, 2048, 8, 1.3e9),
}


def size_of(dim: int, heads: int) -> Size:
    """That of the recipes of this width; else the same settings as most of them have."""
    alike = (size for size in SIZES.values() if (size.dim, size.heads) == (dim, heads))
    return next(alike, Size(1, dim, heads, None))


# exp cut after this degree stands for phi*: |q . k| <= 1, where it is right to e / 5! = 0.023.
TRUNCATION = 4


# --- memories ---------------------------------------------------------------------------------


def _atlas_memory(size: Size) -> AtlasMemoryConfig:
    """The paper's Atlas: l2, window, sketched polynomial features, MLP memory, momentum, Muon.

    Muon's errors are those at the chunk's start, so its chunks are short; a step at every fourth
    token learns recall as well and costs a fourth (benchmarks/studies)."""
    return AtlasMemoryConfig(expansion=size.expansion, chunk_size=16, ns_every=4)


def _omega(size: Size) -> AtlasMemoryConfig:
    """Gradient descent, whose online errors do not ask for short chunks."""
    return _atlas_memory(size).replace(update="gd", momentum=False, chunk_size=64, ns_every=1)


def _exponential(size: Size) -> AtlasMemoryConfig:
    """phi* under a deep memory: the truncated exponential, sketched, coefficients fixed at 1/n!."""
    return _omega(size).replace(
        degree=TRUNCATION,
        sketch_width=2 * TRUNCATION * size.dim // size.heads,
        fixed=("coefficients",),
    )


def _titans_memory(size: Size) -> AtlasMemoryConfig:
    """Titans' LMM. Its write strength stands inside the momentum: gamma's place, with eta = 1."""
    return AtlasMemoryConfig(
        expansion=size.expansion,
        update="gd",
        window=1,
        feature_map="identity",
        own_init=0.5,
        eta_init=1.0,
        fixed=("eta",),
    )


def _linear() -> AtlasMemoryConfig:
    """A matrix of outer products, M_t = alpha_t M_{t-1} + eta_t v_t k_t^T from M_0 = 0, with
    alpha = eta = 1. Its errors, -v, know nothing of the memory."""
    return AtlasMemoryConfig(
        memory="matrix",
        objective="dot",
        update="gd",
        window=1,
        momentum=False,
        feature_map="identity",
        retention_init=1.0,
        eta_init=1.0,
        own_init=1.0,
        fixed=("alpha", "eta", "gamma"),
        initial_memory="zero",
    )


def _delta() -> AtlasMemoryConfig:
    """The delta rule: l2, and online errors, which are those of the newest memory at any chunk."""
    return _linear().replace(objective="l2", eta_init=0.5, fixed=("alpha", "gamma"))


def _attention(size: Size) -> SlidingWindowAttentionConfig:
    return SlidingWindowAttentionConfig(window=size.reach)


# --- the paper's architectures ----------------------------------------------------------------


def _dla(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_omega(size).replace(objective="dot", window=1))


def _swla(size: Size) -> BlockConfig:
    """Features are sketched: all C(D + 2, 2) of them would be 33,153 a head at 1.3b."""
    mixer = _linear().replace(
        window=16,
        feature_map="sketch",
        retention_init=0.99,
        eta_init=0.5,
        own_init=0.98,
        fixed=(),
    )
    return AtlasBlockConfig(mixer=mixer)


def _deep_transformer(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_exponential(size).replace(objective="dot", window=1))


def _swdt(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_exponential(size).replace(objective="dot"))


def _dot(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_exponential(size))


def _omeganet(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_omega(size))


def _atlas(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_atlas_memory(size))


def _atlas_plus_plus(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_atlas_memory(size).replace(memory="gated_mlp"))


def _atlas_mag(size: Size) -> BlockConfig:
    return MemoryAsGateConfig(memory=_atlas_memory(size), attention=_attention(size))


def _atlas_mal(size: Size) -> BlockConfig:
    return MemoryAsLayerConfig(memory=_atlas_memory(size), attention=_attention(size))


def _atlas_mac(size: Size) -> BlockConfig:
    return _as_context(_atlas_memory(size), size)


def _as_context(memory: AtlasMemoryConfig, size: Size) -> BlockConfig:
    """Segments of whole chunks."""
    return MemoryAsContextConfig(memory=memory, segment=max(size.reach, memory.chunk_size))


# --- what it compares with --------------------------------------------------------------------


def _titans(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_titans_memory(size))


def _titans_mag(size: Size) -> BlockConfig:
    memory, attention = _titans_memory(size), _attention(size)
    return MemoryAsGateConfig(memory=memory, attention=attention, combine="product")


def _titans_mal(size: Size) -> BlockConfig:
    return MemoryAsLayerConfig(memory=_titans_memory(size), attention=_attention(size))


def _titans_mac(size: Size) -> BlockConfig:
    return _as_context(_titans_memory(size), size)


def _memory_caching(size: Size) -> BlockConfig:
    """Memory Caching over Titans' memory (Behrouz et al. 2026), its gated residual memory. Segments
    are compressed apart, so that all of them run as one batch."""
    mixer = MemoryCachingConfig(_titans_memory(size), segment=size.reach, reset=True)
    return AtlasBlockConfig(mixer=mixer)


def _tnt(size: Size) -> BlockConfig:
    """TNT over Titans' memory (Li et al. 2025): global chunks and local spans of the paper's 2048
    tokens, one local memory."""
    memory, span = _titans_memory(size), 4 * size.reach
    local = memory.replace(chunk_size=16)
    return AtlasBlockConfig(mixer=TNTConfig(memory.replace(chunk_size=span), (local,), span))


def _ttt(size: Size) -> BlockConfig:
    """TTT-MLP (Sun et al. 2024): mini-batches of 16, no decay. Its inner LayerNorm is left out;
    errors are online instead of those at the mini-batch's start."""
    mixer = AtlasMemoryConfig(
        expansion=size.expansion,
        update="gd",
        window=1,
        chunk_size=16,
        momentum=False,
        feature_map="identity",
        retention_init=1.0,
        own_init=1.0,
        fixed=("alpha", "gamma"),
    )
    return AtlasBlockConfig(mixer=mixer)


def _gated_deltanet(size: Size) -> BlockConfig:
    """Here the error is M k - v, in Gated DeltaNet's paper alpha M k - v: its write strength is
    our eta / alpha, its value our alpha v."""
    mixer = _delta().replace(retention_init=0.99, fixed=("gamma",))
    return AtlasBlockConfig(mixer=mixer)


def _deltanet(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_delta())


def _retnet(size: Size) -> BlockConfig:
    """RetNet's fixed decays, 1 - 1/32 for the first head to 1 - 1/512 for the last; without its
    rotation of queries and keys."""
    mixer = _linear().replace(retention_init=(1 - 1 / 32, 1 - 1 / 512))
    return AtlasBlockConfig(mixer=mixer)


def _linear_attention(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_linear())


def _samba(size: Size) -> BlockConfig:
    """Samba is Mamba and sliding-window attention in turn. The parts have no Mamba: in its place
    stands the recurrence of Mamba-2, with a decay and a write strength for every token and head."""
    memory = _linear().replace(retention_init=0.99, eta_init=0.5, fixed=("gamma",))
    return MemoryAsLayerConfig(memory=memory, attention=_attention(size))


def _lstm(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=LSTMConfig())


def _transformer(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=SlidingWindowAttentionConfig(window=None))


def _sliding_window(size: Size) -> BlockConfig:
    return AtlasBlockConfig(mixer=_attention(size))


# --- layers in turn ---------------------------------------------------------------------------


def _atlas_hybrid(size: Size) -> tuple[BlockConfig, ...]:
    """Three memory layers to one of full attention, as in Qwen3-Next and Kimi Linear."""
    return (*3 * [_atlas(size)], _transformer(size))


def _sliding_window_hybrid(size: Size) -> tuple[BlockConfig, ...]:
    """Attention with a window in most layers, as in Gemma 3, and a memory where those have full
    attention: nothing grows with the text."""
    return (*3 * [_sliding_window(size)], _atlas(size))


Architecture = Callable[[Size], BlockConfig | tuple[BlockConfig, ...]]
ARCHITECTURES: dict[str, Architecture] = {
    "atlas": _atlas,
    "atlas-mag": _atlas_mag,
    "atlas-mal": _atlas_mal,
    "atlas-mac": _atlas_mac,
    "atlas-hybrid": _atlas_hybrid,
    "sliding-window-hybrid": _sliding_window_hybrid,
    "atlas-plus-plus": _atlas_plus_plus,
    "omeganet": _omeganet,
    "dot": _dot,
    "swdt": _swdt,
    "deep-transformer": _deep_transformer,
    "swla": _swla,
    "dla": _dla,
    "titans": _titans,
    "titans-mag": _titans_mag,
    "titans-mal": _titans_mal,
    "titans-mac": _titans_mac,
    "memory-caching": _memory_caching,
    "tnt": _tnt,
    "ttt": _ttt,
    "gated-deltanet": _gated_deltanet,
    "deltanet": _deltanet,
    "samba": _samba,
    "retnet": _retnet,
    "linear-attention": _linear_attention,
    "lstm": _lstm,
    "transformer": _transformer,
    "sliding-window": _sliding_window,
}
