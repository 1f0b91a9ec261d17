"""TNT: spans begin anew, queries are projected, the sum is that of its memories."""

from __future__ import annotations

import pytest
import torch
from helpers import DIM, Recorder, assert_close, difference, draw, make_block, small_memory, unit
from torch import Tensor

from atlas_blocks import TNT, AtlasMemory, TNTConfig
from atlas_blocks.blocks.tnt import projected
from atlas_blocks.recipes import build

SPAN = 12
PLAIN = small_memory(update="gd", feature_map="identity", window=1, chunk_size=4)
LINEAR = PLAIN.replace(
    memory="matrix", objective="dot", momentum=False, conv_width=1, initial_memory="zero"
)


def plain(block: TNT) -> AtlasMemory:
    """An AtlasMemory with the parameters of the first local memory."""
    layer = AtlasMemory(DIM, 2, block.config.local[0]).double()
    layer.load_state_dict(block.local[0].state_dict())
    return layer


def test_a_local_memory_is_the_plain_layer_on_every_span_apart() -> None:
    block, x = make_block("tnt-unprojected"), draw(2, 45, DIM)
    layer = plain(block)
    apart = torch.cat([layer(span)[0] for span in x.split(SPAN, 1)], 1)
    assert difference([block(x)[0]], [block.memory(x)[0] + apart]) < 1e-10


def linear_attention(layer: AtlasMemory, x: Tensor) -> Tensor:
    """Of one head each, token by token, with queries projected; x [T, dim]."""
    heads, width = layer.heads, layer.width
    gates = {n: getattr(layer, n)(x) for n in ("alpha", "eta", "gamma")}
    q, k, v = (layer.qkv(x) * layer.conv.weight[0]).view(-1, 3, heads, width).unbind(1)
    q, k, v = (torch.nn.functional.silu(t) for t in (q, k, v))
    q, k = unit(q), unit(k)
    memory, keys = x.new_zeros(heads, width, width), x.new_zeros(heads, width, width)
    outputs = []
    for t in range(len(x)):
        for h in range(heads):
            keys[h] = keys[h] + torch.outer(k[t, h], k[t, h]) / (k[t, h] @ k[t, h])
            step = gates["eta"][t, h] * gates["gamma"][t, h] * torch.outer(v[t, h], k[t, h])
            memory[h] = gates["alpha"][t, h] * memory[h] + step
        read = torch.stack([memory[h] @ (keys[h] @ q[t, h]) for h in range(heads)])
        read = read / (read.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()
        outputs.append((read * layer.norm.weight).flatten())
    return layer.out(torch.stack(outputs) * torch.nn.functional.silu(layer.gate(x)))


@torch.no_grad()
def test_token_by_token() -> None:
    torch.manual_seed(0)
    block, x = TNTConfig(PLAIN, (LINEAR,), SPAN).build(DIM, 2).double(), draw(1, 30, DIM)
    torch.nn.init.normal_(block.local[0].alpha[1].weight)
    spans = torch.cat([linear_attention(block.local[0], span) for span in x[0].split(SPAN)])
    assert difference([block(x)[0][0]], [block.memory(x)[0][0] + spans]) < 1e-10


@pytest.mark.parametrize("length", [1, 64, 150])
def test_projection_is_a_loop_over_tokens(length: int) -> None:
    q, k = draw(2, length, 2, 5), draw(2, length, 2, 5, seed=2)
    k[:, 0] = 0  # counts for nothing
    total, loop = torch.zeros(2, 2, 5, 5, dtype=torch.float64), []
    for t in range(length):
        square = k[:, t].square().sum(-1)[..., None, None]
        outer = k[:, t, :, :, None] * k[:, t, :, None]
        total = total + torch.where(square == 0, 0, outer / square.where(square != 0, 1))
        loop.append((total @ q[:, t, :, :, None])[..., 0])
    whole, state = projected(q, k, None)
    assert difference([whole], [torch.stack(loop, 1)]) < 1e-10
    first, before = projected(q[:, : length // 3], k[:, : length // 3], None)
    rest, after = projected(q[:, length // 3 :], k[:, length // 3 :], before)
    assert_close((torch.cat([first, rest], 1), after), (whole, state))


def test_nothing_crosses_a_span_but_the_global_memory() -> None:
    block, x = make_block("tnt"), draw(1, 30, DIM)
    other = torch.cat([draw(1, SPAN, DIM, seed=5), x[:, SPAN:]], 1)
    y, z = block(x)[0] - block.memory(x)[0], block(other)[0] - block.memory(other)[0]
    assert difference([y[:, SPAN:]], [z[:, SPAN:]]) < 1e-12
    assert difference([y[:, :SPAN]], [z[:, :SPAN]]) > 1e-2


def test_spans_of_a_call_are_rows_of_one_batch() -> None:
    block, rows = make_block("tnt"), []
    block.local[0].register_forward_hook(lambda module, inputs, result: rows.append(inputs[0]))
    block(draw(2, 5 * SPAN + 3, DIM))
    assert [tuple(x.shape[:2]) for x in rows] == [(10, SPAN), (2, 3)]


def test_gradients_are_differences() -> None:
    block = make_block("tnt")
    x = draw(1, 2 * SPAN + 2, DIM).requires_grad_()
    weight, direction = draw(*x.shape, seed=3), draw(*x.shape, seed=4)
    (found,) = torch.autograd.grad((block(x)[0] * weight).sum(), x)
    step = 1e-6
    with torch.no_grad():
        ends = [(block(x + sign * step * direction)[0] * weight).sum() for sign in (1, -1)]
    assert abs((found * direction).sum() - (ends[0] - ends[1]) / (2 * step)) < 1e-6


def test_stage_two_loads_into_smaller_chunks() -> None:
    block, x = make_block("tnt"), draw(1, 30, DIM)
    c = block.config
    smaller = c.replace(local=tuple(local.replace(chunk_size=2) for local in c.local))
    other = smaller.build(DIM, 2).double()
    other.load_state_dict(block.state_dict())
    assert difference([other(x)[0]], [block(x)[0]]) > 1e-6
    same = c.build(DIM, 2).double()
    same.load_state_dict(other.state_dict())
    assert torch.equal(same(x)[0], block(x)[0])


def test_a_wrong_config_or_state_is_named() -> None:
    with pytest.raises(ValueError, match=r"local: expected a tuple of AtlasMemoryConfig.*got \(\)"):
        TNTConfig(local=())
    with pytest.raises(ValueError, match=r"local\.1: expected AtlasMemoryConfig, got int"):
        TNTConfig(local=(PLAIN, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="span: expected an int >= 1"):
        TNTConfig(span=0)
    block, x = make_block("tnt"), draw(1, 3, DIM)
    _, state = block(x)
    with pytest.raises(ValueError, match=r"state\.local: expected 2 states.*got 1"):
        block(x, state.replace(local=state.local[:1]))
    _, state = make_block("tnt-unprojected")(x)
    with pytest.raises(
        ValueError, match=r"state\.local\[0\]: expected LocalState, got MemoryState"
    ):
        make_block("tnt", local=block.config.local[:1])(x, state)


@pytest.mark.parametrize("span", [4, 5, 13, 100])
def test_a_state_of_other_spans_is_refused(span: int) -> None:
    block, x = make_block("tnt"), draw(2, 2 * SPAN, DIM)
    _, state = block(x[:, : SPAN + 6])
    other = make_block("tnt", span=span)
    other.load_state_dict(block.state_dict())
    for tokens in (0, 1, 5):
        with pytest.raises(ValueError, match=r"state\.local\[0\]\.rule\.position: .*got \[6, 6\]"):
            other(x[:, :tokens], state)
    # Within both first spans the local memories are the same.
    _, state = block(x[:, :4])
    assert_close(other(x[:, 4:], state), other(x[:, 4:], other(x[:, :4])[1]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.slow(compile_nodes=False)
def test_compiled_is_eager_and_breaks_only_where_a_state_goes_in() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x = TNTConfig(PLAIN, (PLAIN,), SPAN).build(DIM, 2).double(), draw(2, 2 * SPAN + 3, DIM)
    backend = Recorder()
    whole = torch.compile(block, backend=backend, fullgraph=True)
    assert_close(whole(x), block(x))
    _, state = block(x[:, : SPAN - 1])
    for t in range(SPAN - 1, SPAN + 2):
        (ours, _), (true, state) = whole(x[:, [t]], state), block(x[:, [t]], state)
        assert difference([ours], [true]) < 1e-9
    _, state = block(x[:, :5])
    ours = torch.compile(block, backend=backend)(x[:, 5:], state)
    assert_close(ours, block(x[:, 5:], state))


def test_the_recipe_generates_as_it_reads() -> None:
    torch.manual_seed(0)
    model, tokens = build("tnt-tiny", depth=1).double(), torch.randint(256, (2, 132))
    with torch.no_grad():  # a span is 128 tokens
        whole, _ = model(tokens)
        _, state = model(tokens[:, :125])
        for t in range(125, 132):
            logits, state = model(tokens[:, t : t + 1], state)
            assert difference([logits[:, 0]], [whole[:, t]]) < 1e-9
