"""The memory layer is what section 9 says, and its config what it starts from."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DIM,
    HEADS,
    MEMORIES,
    OBJECTIVES,
    UPDATES,
    assert_close,
    difference,
    draw,
    make_block,
    omega_rule_reference,
    small_memory,
    unit,
)
from torch import Tensor, nn

from atlas_blocks import AtlasMemory, AtlasMemoryConfig, ShortConv, SwiGLU
from atlas_blocks.functional import PolynomialMap, SketchMap, sketch_tables


def conv_by_hand(weight: Tensor, x: Tensor) -> Tensor:
    """Causal depthwise convolution, weight [width, dim]; weight[-1] is the token's own."""
    width, dim = weight.shape
    padded = F.pad(x.mT, (width - 1, 0))
    return F.conv1d(padded, weight.T.unsqueeze(1), groups=dim).mT


def sigmoid_gate(gate: nn.Sequential, x: Tensor, top: float = 1.0) -> Tensor:
    return top / (1 + torch.exp(-(x @ gate[0].weight.T @ gate[1].weight.T + gate[1].bias)))


@pytest.mark.parametrize(
    ("memory", "update", "features", "momentum"),
    [
        ("matrix", "gd", "polynomial", True),
        ("mlp", "gd", "sketch", False),
        ("gated_mlp", "muon", "identity", True),
        ("mlp", "muon", "taylor_exp", True),
    ],
)
def test_the_layer_is_its_formula(memory: str, update: str, features: str, momentum: bool) -> None:
    config = small_memory(memory=memory, update=update, feature_map=features, momentum=momentum)
    block = AtlasMemory(DIM, HEADS, config).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.4)
    # Strong retention and small steps, where rounding is not magnified (see rule_inputs).
    nn.init.constant_(block.alpha[1].bias, 4.0)
    nn.init.constant_(block.eta[1].bias, -4.0)
    x, width = draw(2, 20, DIM), DIM // HEADS

    qkv = F.silu(conv_by_hand(block.conv.weight, x @ block.qkv.weight.T))
    q, k, v = (t.reshape(2, 20, HEADS, width) for t in qkv.split(DIM, -1))
    phi = None
    if features == "taylor_exp":
        phi = PolynomialMap(torch.tensor([1.0, 1.0, 0.5]))
    elif features == "polynomial":
        phi = PolynomialMap(block.log_coefficients.exp())
    elif features == "sketch":
        coefficients = block.log_coefficients.exp()
        phi = SketchMap(coefficients, *sketch_tables(width, 2 * width, 2), 2 * width)
    read, _ = omega_rule_reference(
        unit(q),
        unit(k),
        v,
        alpha=sigmoid_gate(block.alpha, x),
        eta=sigmoid_gate(block.eta, x),
        theta=sigmoid_gate(block.theta, x, 0.99) if momentum else None,
        gamma=sigmoid_gate(block.gamma, x).reshape(2, 20, HEADS, 5),
        weights=block.memory(),
        memory=memory,
        feature_map=phi,
        update=update,
        chunk_size=8,
        errors="online" if update == "gd" else "chunk",
        decay_to="zero" if memory == "matrix" else "initial",
    )
    square = read.square().mean(-1, keepdim=True)
    read = read / (square + block.norm.eps).sqrt() * block.norm.weight
    gated = read.flatten(-2) * F.silu(x @ block.gate.weight.T)
    assert difference([block(x)[0]], [gated @ block.out.weight.T]) < 1e-10


def test_gates_and_coefficients_start_where_the_config_says() -> None:
    config = AtlasMemoryConfig(
        feature_map="polynomial",
        degree=3,
        retention_init=0.97,
        eta_init=0.3,
        momentum_init=0.6,
        lag_init=0.05,
    )
    block, x = AtlasMemory(DIM, HEADS, config), draw(2, 5, DIM, dtype=torch.float32)
    for name, start in (("alpha", 0.97), ("eta", 0.3), ("theta", 0.6)):
        torch.testing.assert_close(getattr(block, name)(x), torch.full((2, 5, HEADS), start))
    gamma = block.gamma(x).reshape(2, 5, HEADS, 16)
    torch.testing.assert_close(gamma[..., 0], torch.full((2, 5, HEADS), 0.98))
    torch.testing.assert_close(gamma[..., 1:], torch.full((2, 5, HEADS, 15), 0.05))
    phi = block.feature_map()
    torch.testing.assert_close(phi.coefficients, torch.tensor([1, 1, 1 / 2, 1 / 6]))


def test_gates_stay_in_their_ranges_at_extreme_logits() -> None:
    block = AtlasMemory(DIM, HEADS)
    x = draw(2, 5, DIM, dtype=torch.float32)
    for logit in (-1000.0, 1000.0):
        for name in ("alpha", "eta", "theta", "gamma"):
            gate = getattr(block, name)
            nn.init.constant_(gate[1].bias, logit)
            top = 0.99 if name == "theta" else 1.0
            torch.testing.assert_close(gate(x), torch.full_like(gate(x), top if logit > 0 else 0.0))


def test_gates_are_float32_under_autocast() -> None:
    block, x = AtlasMemory(DIM, HEADS), draw(2, 5, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert {g(x).dtype for g in (block.alpha, block.eta, block.theta, block.gamma)} == {
            torch.float32
        }


def test_gradient_descent_corrects_its_errors_and_keeps_deep_memories_alive() -> None:
    """errors and decay_to of None are what the layer's docstring says."""
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    for memory in ("matrix", "mlp"):
        found = {}
        for errors, decay_to in ((None, None), ("online", "zero"), ("online", "initial")):
            torch.manual_seed(0)
            config = small_memory(
                memory=memory, update="gd", errors=errors, decay_to=decay_to, eta_init=0.5
            )
            found[decay_to] = AtlasMemory(DIM, HEADS, config).double()(x)[0]
        default = "zero" if memory == "matrix" else "initial"
        assert torch.equal(found[None], found[default])
        assert difference([found["zero"]], [found["initial"]]) > 1e-4
    muon = small_memory(update="muon")
    assert (muon.rule.errors, muon.rule.decay_to) == ("chunk", "initial")
    with pytest.raises(ValueError, match="errors"):
        small_memory(update="muon", errors="online")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_token_is_written(memory: str, objective: str, update: str) -> None:
    """Another token anywhere in a chunk, the first or a later one, makes another memory of every
    head after it. A row for each token changed; no convolution, which would lend it neighbours."""
    config = AtlasMemoryConfig(memory=memory, objective=objective, update=update, conv_width=1)
    block, size = AtlasMemory(16, HEADS, config), config.chunk_size
    tokens, others = torch.randn(1, 4 * size, 16), torch.randn(size, 16)
    changed = torch.arange(size)
    with torch.no_grad():
        for first in (0, 3 * size):
            _, before = block(tokens[:, :first])
            x = tokens[:, first : first + size].repeat(1 + size, 1, 1)
            x[1 + changed, changed] = others
            _, after = block(x, before[[0] * (1 + size)])
            held = torch.cat([w.flatten(2) for w in after.rule.weights], -1)  # [rows, H, n]
            moved = (held[1:] - held[:1]).norm(dim=-1) / held[:1].norm(dim=-1)
            assert moved.min() > 1e-4, moved.amin(1)


def test_the_shortest_use_runs() -> None:
    block = AtlasMemory(dim=512, heads=8)
    x = draw(1, 6, 512, dtype=torch.float32)
    with torch.no_grad():
        y, state = block(x)
        again, _ = block(draw(1, 3, 512, seed=2, dtype=torch.float32), state)
    assert y.isfinite().all()
    assert y.std() > 1e-3
    assert again.isfinite().all()


@pytest.mark.parametrize("name", ["memory-mlp-muon-sketch", "memory-matrix-gd-polynomial"])
def test_recall_reads_without_writing(name: str) -> None:
    """`recall` is the layer's own read with fixed weights: token by token, nothing moves."""
    block, x = make_block(name), draw(2, 12, DIM)
    _, state = block(x)
    copy = state.map(Tensor.clone)
    y = block.recall(x, state.rule.weights)
    parts = [block.recall(x[:, t : t + 1], state.rule.weights) for t in range(12)]
    assert difference([torch.cat(parts, 1)], [y]) < 1e-13
    assert_close((y, state), (y, copy), 0.0)
    fresh = block.recall(x, block(x[:, :0])[1].rule.weights)
    assert difference([fresh], [y]) > 1e-3


def test_a_convolution_is_a_causal_depthwise_convolution() -> None:
    for width in (1, 2, 4):
        block, x = ShortConv(5, width).double(), draw(2, 9, 5)
        assert difference([block(x)[0]], [conv_by_hand(block.weight, x)]) < 1e-14


def test_swiglu_is_its_formula_and_two_thirds_of_four() -> None:
    block, x = SwiGLU(24).double(), draw(2, 9, 24)
    gate = x @ block.gate.weight.T
    true = (gate / (1 + torch.exp(-gate)) * (x @ block.up.weight.T)) @ block.down.weight.T
    assert difference([block(x)[0]], [true]) < 1e-14
    assert block.gate.out_features == 64
    assert SwiGLU(768).gate.out_features == 2048
    assert SwiGLU(24, 10).gate.out_features == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "tree"}, "memory: expected one of gated_mlp, matrix, mlp, got 'tree'"),
        ({"objective": "l1"}, "objective: expected one of dot, l2, got 'l1'"),
        ({"update": "adam"}, "update: expected one of gd, muon, got 'adam'"),
        ({"feature_map": "exp"}, "feature_map: expected one of identity, polynomial, sketch, tay"),
        ({"window": 0}, "window: expected an int >= 1, got 0"),
        ({"window": -3}, "window: expected an int >= 1, got -3"),
        ({"chunk_size": 0}, "chunk_size: expected an int >= 1, got 0"),
        ({"chunk_size": 2.0}, "chunk_size: expected an int >= 1, got 2.0"),
        ({"degree": 0}, "degree: expected an int >= 1, got 0"),
        ({"degree": 1}, "degree: expected an int >= 2, got 1"),
        ({"expansion": 0}, "expansion: expected an int >= 1, got 0"),
        ({"ns_steps": -1}, "ns_steps: expected an int >= 0, got -1"),
        ({"ns_every": 0}, "ns_every: expected an int >= 1, got 0"),
        ({"conv_width": 0}, "conv_width: expected an int >= 1, got 0"),
        ({"gate_rank": True}, "gate_rank: expected an int >= 1, got True"),
        ({"sketch_width": 0}, "sketch_width: expected an int >= 1, got 0"),
        ({"eta_init": 0.0}, r"eta_init: expected a number in \[1e-06, 0.999999\], got 0.0"),
        ({"retention_init": 1.0}, "retention_init: expected a number in"),
        ({"lag_init": math.nan}, "lag_init: expected a number in .*, got nan"),
        ({"momentum_init": 0.99}, "momentum_init: expected a number in"),
    ],
)
def test_a_wrong_config_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtlasMemoryConfig(**changes)


@pytest.mark.parametrize(
    ("dim", "heads", "message"),
    [
        (12, 5, "heads: expected a divisor of dim = 12, got 5"),
        (12, 0, "heads: expected an int >= 1, got 0"),
        (0, 1, "dim: expected an int >= 1, got 0"),
        (12, 2.0, "heads: expected an int >= 1, got 2.0"),
    ],
)
def test_wrong_widths_are_named(dim: int, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtlasMemory(dim, heads)


def test_a_sketch_too_narrow_is_named() -> None:
    with pytest.raises(ValueError, match=r"sketch width: expected at least 1 \+ D .* = 8, got 7"):
        AtlasMemory(DIM, HEADS, AtlasMemoryConfig(sketch_width=7))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (lambda: ShortConv(0), "dim: expected an int >= 1, got 0"),
        (lambda: ShortConv(4, 0), "width: expected an int >= 1, got 0"),
        (lambda: SwiGLU(0), "dim: expected an int >= 1, got 0"),
        (lambda: SwiGLU(4, -1), "width: expected an int >= 1, got -1"),
    ],
)
def test_wrong_small_blocks_are_named(block, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block()
