"""The stacks are put together as section 9 says; MAC against a loop over segments."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DIM, HEADS, assert_close, difference, draw, make_block, small_memory
from torch import Tensor, nn

from atlas_blocks import (
    AtlasBlock,
    AtlasBlockConfig,
    AtlasMemoryConfig,
    MemoryAsContext,
    MemoryAsContextConfig,
    MemoryAsGate,
    MemoryAsGateConfig,
    MemoryAsGateMixerConfig,
    MemoryAsLayer,
    MemoryAsLayerConfig,
    SlidingWindowAttentionConfig,
    SquaredReLU,
    State,
    SwiGLU,
)

SIDES = ("memory", "attention")


def rms(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    scale = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return x / scale * norm.weight


def randomise(block: nn.Module) -> None:
    """Scales of norms away from 1, so that none can be forgotten."""
    for module in block.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)


def block_by_hand(block: AtlasBlock, x: Tensor) -> Tensor:
    x = x + block.mixer(rms(block.mixer_norm, x))[0]
    return x + block.mlp(rms(block.mlp_norm, x))[0]


@pytest.mark.parametrize("name", ["block-memory", "block-attention"])
def test_a_block_is_mixer_then_mlp(name: str) -> None:
    block, x = make_block(name), draw(2, 20, DIM)
    randomise(block)
    assert difference([block(x)[0]], [block_by_hand(block, x)]) < 1e-10


def test_memory_as_layer_is_memory_mlp_attention_mlp() -> None:
    block, x = make_block("as-layer"), draw(2, 20, DIM)
    randomise(block)
    true = block_by_hand(block.attention, block_by_hand(block.memory, x))
    assert difference([block(x)[0]], [true]) < 1e-10


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_memory_as_gate_combines_two_normed_branches(combine: str) -> None:
    parts = (small_memory(), SlidingWindowAttentionConfig(window=5), combine)
    block, x = MemoryAsGateConfig(*parts).build(DIM, HEADS).double(), draw(2, 20, DIM)
    randomise(block)
    h = rms(block.mixer_norm, x)
    m, a = (rms(getattr(block, f"{n}_norm"), getattr(block, n)(h)[0]) for n in SIDES)
    y = x + (m + a if combine == "sum" else m * a)
    y = y + block.mlp(rms(block.mlp_norm, y))[0]
    assert difference([block(x)[0]], [y]) < 1e-10


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_the_mixer_in_a_block_is_memory_as_gate(combine: str) -> None:
    """And by itself neither adds its input, nor norms it, nor has an MLP."""
    parts = (small_memory(), SlidingWindowAttentionConfig(window=5), combine)
    gate = MemoryAsGateConfig(*parts, mlp_width=7).build(DIM, HEADS).double()
    block = AtlasBlockConfig(MemoryAsGateMixerConfig(*parts), 7).build(DIM, HEADS).double()
    randomise(gate)
    of_mixer = ("memory.", "attention.", "memory_norm.", "attention_norm.")
    weights = gate.state_dict()
    renamed = {("mixer." + n if n.startswith(of_mixer) else n): w for n, w in weights.items()}
    block.load_state_dict(renamed)
    mixer, x = block.mixer, draw(2, 20, DIM)
    m, a = (rms(getattr(mixer, f"{n}_norm"), getattr(mixer, n)(x)[0]) for n in SIDES)
    assert difference([mixer(x)[0]], [m + a if combine == "sum" else m * a]) < 1e-10
    (y, state), (true, before) = block(x), gate(x)
    more, _ = block(x, state)
    assert_close((y, state.parts[0]), (true, before), 1e-12)
    assert difference([more], [gate(x, before)[0]]) < 1e-12


def rotated(x: Tensor, place: int, base: float) -> Tensor:
    """x [D] turned by its place, pairs (i, i + D/2) as complex numbers."""
    half = len(x) // 2
    angle = place * base ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def context_by_hand(block: MemoryAsContext, x: Tensor) -> Tensor:
    """One sequence x [T, dim], one token at a time inside each segment."""
    c, width = block.config, DIM // HEADS
    h = rms(block.mixer_norm, x)
    # All a_t of a segment come from the memory before it; then the segment is written.
    memory = block.memory(h[None, :0])[1]
    mixed = []
    groups = c.kv_heads or HEADS
    wq, wk, wv = block.qkv.weight.split([DIM, groups * width, groups * width])
    for start in range(0, len(x), c.segment):
        part = h[start : start + c.segment]
        reads = block.memory.recall((part @ block.recall_query.weight.T)[None], memory.rule.weights)
        reads = reads[0]
        a = []
        for t in range(len(part)):
            # (input of the key, place or None for the persistent tokens, which are not turned)
            tokens = () if block.persistent is None else block.persistent
            seen = [(p, None) for p in tokens]
            seen += [(reads[j], j) for j in range(t + 1)] + [(part[j], j) for j in range(t + 1)]
            heads = []
            for n in range(HEADS):
                rows = slice(n * width, (n + 1) * width)
                group = n * groups // HEADS
                shared = slice(group * width, (group + 1) * width)
                q = rotated(part[t] @ wq[rows].T, t, c.rope_base)
                keys = [z @ wk[shared].T for z, _ in seen]
                keys = [
                    key if place is None else rotated(key, place, c.rope_base)
                    for key, (_, place) in zip(keys, seen, strict=True)
                ]
                scores = torch.stack([q @ key for key in keys]) / width**0.5
                heads.append(scores.softmax(0) @ torch.stack([z @ wv[shared].T for z, _ in seen]))
            a.append(block.attention_out.weight @ torch.cat(heads))
        a = torch.stack(a)
        m, memory = block.memory(a[None], memory)
        mixed.append(rms(block.attention_norm, a) * rms(block.memory_norm, m[0]))
    y = (x + torch.cat(mixed))[None]
    return y + block.mlp(rms(block.mlp_norm, y))[0]


@pytest.mark.parametrize("name", ["as-context", "as-context-muon"])
def test_memory_as_context_reads_attends_and_writes_by_segments(name: str) -> None:
    block, x = make_block(name), draw(1, 29, DIM)
    randomise(block)
    hand = context_by_hand(block, x[0])
    assert difference([block(x)[0]], [hand]) < 1e-9


@pytest.mark.parametrize("name", ["as-context", "as-context-muon"])
def test_one_token_of_rows_anywhere_in_their_segments_is_each_alone(name: str) -> None:
    block, x = make_block(name), draw(2, 40, DIM)
    randomise(block)
    segment = block.config.segment
    states = [block(x[[i], :n])[1] for i, n in enumerate((segment, 2))]
    for t in range(2 * segment + 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block, "segments", None)  # each alone is what it is compared with
            y, after = block(x[:, t : t + 1], State.cat(states))
        alone = [block(x[[i], t : t + 1], s) for i, s in enumerate(states)]
        states = [s for _, s in alone]
        assert_close((y, after), (torch.cat([z for z, _ in alone]), State.cat(states)), 1e-9)


def test_swiglu_of_a_stack_takes_its_width() -> None:
    assert make_block("block-attention").mlp.gate.out_features == 10
    block = MemoryAsLayerConfig(small_memory(), mlp_width=7).build(DIM, HEADS)
    assert block.memory.mlp.gate.out_features == block.attention.mlp.gate.out_features == 7


@pytest.mark.parametrize("block", [AtlasBlockConfig, MemoryAsLayerConfig, MemoryAsGateConfig])
def test_the_mlp_of_a_stack_is_of_its_kind(block) -> None:
    stack = block(mlp="relu2", mlp_width=5).build(DIM, HEADS)
    mlps = [m for name, m in stack.named_modules() if name.endswith("mlp")]
    assert [type(m) for m in mlps] == len(mlps) * [SquaredReLU]
    assert {m.up.out_features for m in mlps} == {5}


def test_a_squared_relu_is_its_formula_at_the_parameters_of_swiglu() -> None:
    mlp, x = make_block("squared-relu"), draw(2, 7, DIM)
    hidden = torch.einsum("btd,hd->bth", x, mlp.up.weight)
    positive = torch.where(hidden > 0, hidden * hidden, 0.0)
    true = torch.einsum("bth,dh->btd", positive, mlp.down.weight)
    assert difference([mlp(x)[0]], [true]) < 1e-12
    for dim in (64, 256, 1024):
        counts = [sum(p.numel() for p in kind(dim).parameters()) for kind in (SquaredReLU, SwiGLU)]
        assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: AtlasBlockConfig("memory"),
            "mixer: expected AtlasMemoryConfig, .*MemoryAsGateMixerConfig or a .*, got str",
        ),
        (lambda: AtlasBlockConfig(mlp_width=0), "mlp_width: expected an int >= 1, got 0"),
        (
            lambda: MemoryAsContextConfig(mlp="gelu"),
            "mlp: expected one of moe, relu2, swiglu, got 'gelu'",
        ),
        (
            lambda: MemoryAsLayerConfig(SlidingWindowAttentionConfig()),
            "memory: expected AtlasMemoryConfig or .*, got SlidingWindowAttentionConfig",
        ),
        (
            lambda: MemoryAsLayerConfig(attention=AtlasMemoryConfig()),
            "attention: expected SlidingWindowAttentionConfig or .*, got AtlasMemoryConfig",
        ),
        (
            lambda: MemoryAsGateConfig(combine="mean"),
            "combine: expected one of product, sum, got 'mean'",
        ),
        (lambda: MemoryAsContextConfig(segment=0), "segment: expected an int >= 1, got 0"),
        (
            lambda: MemoryAsContextConfig(persistent_tokens=-1),
            "persistent_tokens: expected an int >= 0, got -1",
        ),
        (lambda: MemoryAsContextConfig(rope_base=0), "rope_base: expected a number in"),
        (lambda: AtlasBlock(12, 5), "heads: expected a divisor of dim = 12, got 5"),
        (lambda: MemoryAsLayer(12, 5), "heads: expected a divisor of dim = 12, got 5"),
        (lambda: MemoryAsGate(12, 5), "heads: expected a divisor of dim = 12, got 5"),
        (lambda: MemoryAsContext(12, 5), "heads: expected a divisor of dim = 12, got 5"),
        (
            lambda: MemoryAsContext(12, 3, MemoryAsContextConfig(small_memory(), kv_heads=2)),
            "kv_heads: expected a divisor of heads = 3, got 2",
        ),
        (
            lambda: MemoryAsContext(9, 1, MemoryAsContextConfig(small_memory(sketch_width=20))),
            "heads: expected an even head width for rotary positions, dim = 9, got 1",
        ),
    ],
)
def test_wrong_arguments_are_named(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config()


def test_attention_of_a_segment_is_softmax_of_scaled_dots() -> None:
    """The helper above and torch agree on what a rotation is: dots depend on distance alone."""
    q, k = draw(8), draw(8, seed=2)
    near = rotated(q, 5, 100.0) @ rotated(k, 3, 100.0)
    far = rotated(q, 9, 100.0) @ rotated(k, 7, 100.0)
    torch.testing.assert_close(near, far)
    assert F.softmax(near[None], 0) == 1
