"""Memory Caching: what every token reads, written out token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DIM,
    SEGMENT,
    Recorder,
    assert_close,
    difference,
    draw,
    make_block,
    small_memory,
    unit,
)
from torch import Tensor

from atlas_blocks import MemoryCaching, MemoryCachingConfig, State
from atlas_blocks.recipes import build

LINEAR = small_memory(
    memory="matrix",
    objective="dot",
    update="gd",
    momentum=False,
    feature_map="identity",
    window=1,
    conv_width=1,
    retention_init=0.9,
)


def token_by_token(block: MemoryCaching, x: Tensor) -> Tensor:
    """A decayed linear attention whose states are kept; x [T, dim]."""
    layer, c = block.memory, block.config
    heads, width = layer.heads, layer.width
    first = layer.memory()[0]
    memory, kept, means, total, outputs = first, [], [], torch.zeros(DIM).double(), []
    for t, token in enumerate(x):
        if t % c.segment == 0:
            total = torch.zeros_like(total)
            memory = first if c.reset else memory
        q, k, v = F.silu(layer.qkv(token) * layer.conv.weight[0]).view(3, heads, width)
        q, k = unit(q), unit(k)
        alpha, eta, gamma = (getattr(layer, n)(token[None])[0] for n in ("alpha", "eta", "gamma"))
        memory = torch.stack(
            [
                alpha[h] * memory[h] + eta[h] * gamma[h] * torch.outer(v[h], k[h])
                for h in range(heads)
            ]
        )
        total = total + token
        u = block.router.weight @ token
        scores = [u @ mean for mean in means]
        best = sorted(range(len(scores)), key=lambda i: -scores[i].item())[: c.top_k]
        own = u @ (total / (t % c.segment + 1))
        gates = torch.stack([*(scores[i] for i in best), own]).softmax(0)
        memories = [*(kept[i] for i in best), memory]
        read = torch.stack(
            [
                sum(g * (m[h] @ q[h]) for g, m in zip(gates, memories, strict=True))
                for h in range(heads)
            ]
        )
        read = read / (read.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()
        y = (read * layer.norm.weight).flatten() * F.silu(layer.gate(token))
        outputs.append(layer.out(y))
        if t % c.segment == c.segment - 1:
            kept.append(memory)
            means.append(total / c.segment)
    return torch.stack(outputs)


def linear(**changes: Any) -> MemoryCaching:
    torch.manual_seed(0)
    config = MemoryCachingConfig(LINEAR, SEGMENT).replace(**changes)
    block = config.build(DIM, 2).double()
    for name in ("alpha", "eta", "gamma"):
        torch.nn.init.normal_(getattr(block.memory, name)[1].weight, std=0.5)
    return block


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 2, 9])
@torch.no_grad()
def test_token_by_token(reset: bool, top_k: int | None) -> None:
    block, x = linear(reset=reset, top_k=top_k), draw(1, 40, DIM)
    true = token_by_token(block, x[0])
    assert difference([block(x)[0][0]], [true]) < 1e-10
    y, state = block(x[:, :17])
    rest = block(x[:, 17:], state)[0]
    assert difference([torch.cat([y, rest], 1)[0]], [true]) < 1e-10


def test_gradients_are_those_of_the_loop() -> None:
    block, x = linear(reset=True, top_k=2), draw(1, 24, DIM)
    weight, leaves = draw(24, DIM, seed=3), list(block.parameters())
    ours, true = (
        torch.autograd.grad((y * weight).sum(), leaves)
        for y in (block(x)[0][0], token_by_token(block, x[0]))
    )
    assert difference(ours, true) < 1e-8


@pytest.mark.parametrize("name", ["caching-checkpoints", "caching-reset"])
def test_no_token_is_seen_before_its_turn(name: str) -> None:
    """Not by the mean of its segment either: whatever comes later, y has the same bits."""
    block, x = make_block(name), draw(1, 30, DIM)
    y = block(x)[0]
    for t in range(1, 30, 4):
        other = torch.cat([x[:, :t], 100 * draw(1, 30 - t, DIM, seed=t)], 1)
        assert torch.equal(block(other)[0][:, :t], y[:, :t])


def test_without_segments_behind_it_it_is_the_memory() -> None:
    block, x = make_block("caching-checkpoints"), draw(2, SEGMENT, DIM)
    assert_close((block(x)[0], None), (block.memory(x)[0], None))


def test_the_memory_goes_on_or_starts_anew() -> None:
    going_on, x = make_block("caching-checkpoints"), draw(1, 3 * SEGMENT, DIM)
    state = going_on(x)[1]
    ends = [going_on.memory(x[:, : n * SEGMENT])[1].rule.weights for n in (1, 2, 3)]
    for kept, *true in zip(state.weights, *ends, strict=True):
        assert difference([kept], [torch.stack(true, 1)]) < 1e-10
    anew = make_block("caching-reset")
    state = anew(x)[1]
    ends = [anew.memory(span)[1].rule.weights for span in x.split(SEGMENT, 1)]
    for kept, *true in zip(state.weights, *ends, strict=True):
        assert difference([kept], [torch.stack(true, 1)]) < 1e-10
    means = torch.stack([span.mean(1) for span in x.split(SEGMENT, 1)], 1)
    assert difference([state.means], [means]) < 1e-12


def test_rows_with_more_and_fewer_segments_go_on_together() -> None:
    block = make_block("caching-reset")
    states = [block(draw(1, n, DIM, seed=n))[1] for n in (2, 3 * SEGMENT, SEGMENT + 2)]
    x, together = draw(3, 10, DIM), State.cat(states)
    assert together.means.shape[1] == 3
    y, end = block(x, together)
    for i, state in enumerate(states):
        assert_close((y[[i]], None), (block(x[[i]], state)[0], None))
    assert end.position.tolist() == [12, 3 * SEGMENT + 10, SEGMENT + 12]


def test_a_wrong_config_or_state_is_named() -> None:
    with pytest.raises(ValueError, match="segment: expected an int >= 1"):
        MemoryCachingConfig(segment=0)
    with pytest.raises(ValueError, match="top_k: expected an int >= 1"):
        MemoryCachingConfig(top_k=0)
    with pytest.raises(ValueError, match="memory: expected AtlasMemoryConfig, got int"):
        MemoryCachingConfig(memory=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("segment", [2, 8, 11, 100])
def test_a_state_of_other_segments_is_refused(reset: bool, segment: int) -> None:
    """Longer ones too, whose sums and memories would be read as others than they are."""
    block, x = linear(reset=reset), draw(1, 3 * SEGMENT, DIM)
    other = linear(reset=reset, segment=segment)
    for length in (2, SEGMENT, 3 * SEGMENT):
        _, state = block(x[:, :length])
        for tokens in (0, 1, 5):
            with pytest.raises(ValueError, match=rf"state\.segment: expected {segment}, .*\[7\]"):
                other(x[:, :tokens], state)
    _, state = block(x)
    with pytest.raises(ValueError, match=r"state\.memory\.rule\.position: .*, as reset"):
        linear(reset=not reset)(x, state)
    few = state.replace(means=state.means[:, 1:])
    with pytest.raises(ValueError, match=r"state\.means: expected at least 3 segments.*got 2"):
        block(x, few)


def test_a_saved_state_that_does_not_know_its_segment_is_refused_by_name() -> None:
    _, state = linear()(draw(1, 9, DIM))
    old = {name: part for name, part in state.to_dict().items() if name != "segment"}
    with pytest.raises(ValueError, match=r"CachingState: expected the fields .*'segment'.*, got"):
        State.from_dict(old)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.slow(compile_nodes=False)
def test_compiled_is_eager_and_breaks_where_a_state_goes_in() -> None:
    torch._dynamo.reset()
    block, x = linear(), draw(2, 2 * SEGMENT + 3, DIM)
    backend = Recorder()
    assert_close(torch.compile(block, backend=backend, fullgraph=True)(x), block(x))
    _, state = block(x[:, :5])
    ours = torch.compile(block, backend=backend)(x[:, 5:], state)
    assert_close(ours, block(x[:, 5:], state))


def test_the_recipe_generates_as_it_reads() -> None:
    torch.manual_seed(0)
    model, tokens = build("memory-caching-tiny", depth=1).double(), torch.randint(256, (2, 70))
    with torch.no_grad():
        whole, _ = model(tokens)
        _, state = model(tokens[:, :60])
        for t in range(60, 70):
            logits, state = model(tokens[:, t : t + 1], state)
            assert difference([logits[:, 0]], [whole[:, t]]) < 1e-9
