"""The sliding-window attention block: the paper's formula, streaming, packing, states, errors."""

import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atlas_blocks.blocks.attention import (
    AttentionState,
    SlidingWindowAttention,
    SlidingWindowAttentionConfig,
)
from atlas_blocks.config import Config
from atlas_blocks.state import State

DIM, HEADS = 12, 2
WINDOWS = (1, 2, 7, 70, None)


def build(window: int | None = 7, sink_tokens: int = 2, **options) -> SlidingWindowAttention:
    torch.manual_seed(0)
    config = SlidingWindowAttentionConfig(window=window, sink_tokens=sink_tokens, **options)
    block = config.build(DIM, HEADS).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return block


def draw(*size: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=g, dtype=torch.float64)


def assert_same(ours: State, true: State) -> None:
    for a, b in zip(ours.tensors(), true.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def by_hand(block: SlidingWindowAttention, x: Tensor) -> Tensor:
    """One query, one head, one key at a time; rotations as complex numbers."""
    config, width = block.config, DIM // HEADS

    def norm(t: Tensor, scale: Tensor | None) -> Tensor:
        return t if scale is None else t / (t.square().mean() + 1e-6).sqrt() * scale

    def turn(t: Tensor, position: int) -> Tensor:
        half = width // 2
        angle = position * config.rope_base ** (-torch.arange(half).double() / half)
        pairs = torch.complex(t[:half], t[half:])
        return pairs * torch.polar(torch.ones_like(angle), angle)

    rows = []
    for row in x:
        groups = config.kv_heads or HEADS
        heads = (row @ block.qkv.weight.T).unflatten(1, (-1, width))
        q, k, v = heads.split([HEADS, groups, groups], 1)
        outputs = []
        for i in range(len(row)):
            start = 0 if config.window is None else max(0, i - config.window + 1)
            heads = []
            for h in range(HEADS):
                g = h * groups // HEADS
                query = norm(q[i, h], block.q_scale)
                keys = [norm(k[j, g], block.k_scale) for j in range(start, i + 1)]
                turned = [turn(key, j) for j, key in enumerate(keys, start)]
                scores = [(turn(query, i) * key.conj()).real.sum() for key in turned]
                values = [v[j, g] for j in range(start, i + 1)]
                if block.sink_k is not None:
                    scores += [query @ key for key in block.sink_k[g]]
                    values += list(block.sink_v[g])
                weights = (torch.stack(scores) / width**0.5).softmax(0)
                heads.append(weights @ torch.stack(values))
            outputs.append(torch.cat(heads) @ block.out.weight.T)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("window", [3, None])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_equals_the_formula(
    window: int | None, sink_tokens: int, qk_norm: bool, kv_heads: int | None
) -> None:
    block = build(window, sink_tokens, qk_norm=qk_norm, rope_base=100.0, kv_heads=kv_heads)
    x = draw(2, 9, DIM)
    torch.testing.assert_close(block(x)[0], by_hand(block, x))


@settings(deadline=None, max_examples=60)
@given(
    window=st.sampled_from(WINDOWS),
    sink_tokens=st.sampled_from([0, 2]),
    pieces=st.lists(st.integers(0, 90), min_size=1, max_size=5),
)
def test_any_split_equals_the_whole(window, sink_tokens, pieces) -> None:
    block = build(window, sink_tokens)
    x = draw(2, sum(pieces), DIM)
    y, end = block(x)
    state, parts = None, []
    for part in x.split(pieces, dim=1):
        out, state = block(part, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), y)
    assert_same(state, end)


@pytest.mark.parametrize("window", WINDOWS)
def test_token_by_token_equals_the_whole(window: int | None) -> None:
    block = build(window)
    x = draw(2, 100, DIM)
    y, end = block(x)
    state, parts = None, []
    for token in x.split(1, dim=1):
        out, state = block(token, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), y)
    assert_same(state, end)


@pytest.mark.parametrize("window", [7, None])
def test_grouped_heads_keep_what_they_share_once(window: int | None) -> None:
    x = draw(2, 40, DIM)
    (_, whole), (_, grouped) = build(window)(x), build(window, kv_heads=1)(x)
    assert whole.keys.shape[2:] == (HEADS, DIM // HEADS)
    assert grouped.keys.shape == grouped.values.shape == (*whole.keys.shape[:2], 1, DIM // HEADS)


def test_gradients_cross_a_state_that_is_not_detached() -> None:
    block = build(7)
    x = draw(1, 30, DIM)
    weight = draw(1, 30, DIM, seed=2)
    true = torch.autograd.grad((block(x)[0] * weight).sum(), list(block.parameters()))
    y1, state = block(x[:, :11], detach_state=False)
    y2, _ = block(x[:, 11:], state)
    ours = torch.autograd.grad((torch.cat([y1, y2], 1) * weight).sum(), list(block.parameters()))
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b)
    assert not block(x)[1].keys.requires_grad


def test_state_has_one_size_and_owns_its_memory() -> None:
    block = build(7)
    for T in (0, 3, 6, 7, 500):
        _, state = block(draw(2, T, DIM))
        assert state.keys.shape == state.values.shape == (2, 6, HEADS, DIM // HEADS)
        assert state.keys.untyped_storage().nbytes() == state.keys.nbytes
        assert state.position.tolist() == [T, T]
    _, grown = build(None)(draw(2, 40, DIM))
    assert grown.keys.shape[1] == 40


@pytest.mark.parametrize("window", [7, 70])
def test_rows_at_different_positions_equal_each_alone(window: int) -> None:
    block = build(window)
    lengths = (0, 3, 6, 40, 90)
    states = [block(draw(1, n, DIM, seed=n))[1] for n in lengths]
    x = draw(len(lengths), 80, DIM)
    y, end = block(x, State.cat(states))
    for b, state in enumerate(states):
        alone, after = block(x[b : b + 1], state)
        torch.testing.assert_close(y[b : b + 1], alone)
        assert_same(end[[b]], after)
    order = [3, 0, 4, 1, 2]
    torch.testing.assert_close(block(x[order], State.cat(states)[order])[0], y[order])


@pytest.mark.parametrize("window", [1, 7, 70])
def test_packed_documents_equal_each_alone(window: int) -> None:
    block = build(window)
    bounds = [0, 5, 17, 22, 112]
    x = draw(1, bounds[-1], DIM)
    cu_seqlens = torch.tensor(bounds)
    y, states = block(x, cu_seqlens=cu_seqlens)
    again, ends = block(x, states, cu_seqlens=cu_seqlens)
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        alone, state = block(x[:, a:b])
        torch.testing.assert_close(y[:, a:b], alone)
        assert_same(states[[n]], state)
        alone, state = block(x[:, a:b], state)
        torch.testing.assert_close(again[:, a:b], alone)
        assert_same(ends[[n]], state)


def test_state_can_be_saved_and_loaded() -> None:
    block = build(7)
    _, state = block(draw(2, 5, DIM))
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    loaded = State.from_dict(torch.load(file, weights_only=True))
    assert isinstance(loaded, AttentionState)
    x = draw(2, 9, DIM, seed=3)
    assert torch.equal(block(x, loaded)[0], block(x, state)[0])


@pytest.mark.parametrize("position", [1000, 10_000_000])
def test_output_does_not_depend_on_where_the_window_stands(position: int) -> None:
    block = build(7).float()
    x = draw(2, 60, DIM).float()
    near, start = block(x)[0], block(x[:, :0])[1]
    # Nothing valid is in the cache at position 0; further on the cache counts, so fill it alike.
    far = AttentionState(start.keys, start.values, start.position + position)
    y, _ = block(x, far)
    torch.testing.assert_close(y[:, 6:], near[:, 6:], rtol=1e-4, atol=1e-5)


def test_config_round_trip_and_default() -> None:
    config = SlidingWindowAttentionConfig(window=None, sink_tokens=3, rope_base=5e5)
    assert Config.from_json(config.to_json()) == config
    assert SlidingWindowAttention(8, 2).config == SlidingWindowAttentionConfig()


def test_parameters_reset_on_a_real_device_after_meta() -> None:
    with torch.device("meta"):
        block = SlidingWindowAttention(8, 2, SlidingWindowAttentionConfig(sink_tokens=2))
    block.to_empty(device="cpu")
    for module in (block, block.qkv, block.out):
        module.reset_parameters()
    assert block(torch.zeros(1, 4, 8))[0].isfinite().all()


@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_autocast_gives_its_dtype_and_streams(sink_tokens: int) -> None:
    block = build(7, sink_tokens).float()
    x = draw(2, 80, DIM).float()
    true, full = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, end = block(x)
        a, state = block(x[:, :33])
        b, _ = block(x[:, 33:], state)
        # A state from a call in another dtype is legal.
        block(x, full)
    assert y.dtype == end.keys.dtype == end.values.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([a, b], 1), y, rtol=0, atol=0.1)
    assert (y - true).norm() < 0.05 * true.norm()
    assert block(x, end)[0].dtype == torch.float32


def test_backend_can_be_asked_for() -> None:
    x = draw(1, 4, DIM)
    assert build(7).backend_for(x)[0] == "sdpa"
    assert build(7).backend_for(x, build(7)(x)[1])[0] == "sdpa"
    block = build(7, backend="flash")
    for call in (block, block.backend_for):
        with pytest.raises(ValueError, match=r"backend: .*flash_attn needs a CUDA device"):
            call(x)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    block = build(7)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    x, weight = draw(2, 90, DIM), draw(2, 90, DIM, seed=2)
    leaves = list(block.parameters())
    y, end = compiled(x)
    torch.testing.assert_close(y, block(x)[0])
    ours = torch.autograd.grad((y * weight).sum(), leaves)
    for a, b in zip(ours, torch.autograd.grad((block(x)[0] * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    token = x[:, :1]
    torch.testing.assert_close(compiled(token, end)[0], block(token, end)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected an int >= 1, got 0"),
        ({"window": True}, "window: expected an int >= 1, got True"),
        ({"sink_tokens": -1}, "sink_tokens: expected an int >= 0, got -1"),
        ({"backend": "fast"}, "backend: expected one of auto, flash, flex, sdpa, xformers"),
        ({"rope_base": 0.0}, "rope_base: expected a number in"),
        ({"qk_norm": 1}, "qk_norm: expected True or False, got 1"),
        ({"kv_heads": 0}, "kv_heads: expected an int >= 1, got 0"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of heads = 2, got 3"),
    ],
)
def test_wrong_config_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttentionConfig(**options).build(DIM, HEADS)


@pytest.mark.parametrize(("dim", "heads"), [(12, 5), (6, 2), (0, 1), (12, 0), (12, 2.0)])
def test_wrong_widths_are_named(dim: int, heads: int) -> None:
    with pytest.raises(ValueError, match=r"(dim|heads): expected"):
        SlidingWindowAttention(dim, heads)


def test_wrong_inputs_are_named() -> None:
    block, x = build(7), draw(2, 4, DIM)
    _, state = block(x)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, T, dim\]"):
        block(x[..., 1:])
    with pytest.raises(ValueError, match=r"x: expected shape \[B, T, dim\]"):
        block.backend_for(x[..., 1:])
    with pytest.raises(ValueError, match="state: expected a batch of 1"):
        block(x[:1], state)
    with pytest.raises(ValueError, match=r"state.keys: expected shape \[B, window - 1, G, D\]"):
        block(x, build(9)(x)[1])
    with pytest.raises(ValueError, match="state: expected AttentionState or None, got Tensor"):
        block(x, x)
