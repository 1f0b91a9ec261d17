"""What somebody brings from outside computes what it says: memory, objective, update, features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DIM,
    HEADS,
    difference,
    draw,
    leaves,
    named_leaves,
    omega_rule,
    omega_rule_op,
    omega_rule_reference,
    rule_in_pieces,
    rule_inputs,
)
from marks import slow_as_it_is
from torch import Tensor, nn

from atlas_blocks import (
    AtlasMemoryConfig,
    Rule,
    register_feature_map,
    register_memory,
    register_objective,
    register_update,
)
from atlas_blocks.kernels.tiles import unknown
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.feature_maps import FEATURE_MAPS
from atlas_blocks.omega.flops import rule_backward_flops, rule_flops
from atlas_blocks.omega.memories import MEMORIES, Linearised, Memory, gated_mlp, mlp
from atlas_blocks.omega.objectives import OBJECTIVES, Objective
from atlas_blocks.omega.op import flatten
from atlas_blocks.omega.updates import UPDATES, Update


@dataclass(frozen=True)
class Signed:
    """phi(x) = (x, s |x|), with a learned s."""

    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.scale.to(x.dtype) * x.abs()], -1)

    def width_of(self, dim: int) -> int:
        return 2 * dim

    @staticmethod
    def of(width: int, degree: int) -> nn.Module:
        return SignedFeatures(width)


@dataclass(frozen=True)
class Undeclared(Signed):
    names: list


class SignedFeatures(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self) -> Signed:
        return Signed(self.scale)


@pytest.fixture(autouse=True)
def brought() -> Iterator[None]:
    tables = (MEMORIES, OBJECTIVES, UPDATES, FEATURE_MAPS)
    before = [dict(table) for table in tables]

    def slope(z: Tensor) -> Tensor:
        return 1 - z.tanh().square()

    register_memory("tanh_mlp", mlp(torch.tanh, slope))
    register_memory("gated_tanh", gated_mlp(torch.tanh, slope))
    register_objective(
        "huber",
        Objective(
            lambda y, v: F.huber_loss(y, v.expand_as(y), reduction="none").sum(-1),
            lambda y, v: (y - v).clamp(-1, 1),
        ),
    )
    register_update(
        "normalised",
        Update(lambda s, steps: s / (s.square().sum((-2, -1), keepdim=True) + 1).sqrt(), 0.1),
    )
    register_feature_map("signed", Signed)
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


CASES = {
    "memory": {"memory": "tanh_mlp", "errors": "online"},
    "gated memory": {"memory": "gated_tanh", "errors": "online"},
    "memory at M^(0)": {"memory": "tanh_mlp", "errors": "chunk"},
    "memory, stepwise": {"memory": "tanh_mlp", "update": "normalised"},
    "objective": {"memory": "mlp", "objective": "huber", "errors": "online"},
    "objective of a matrix": {"memory": "matrix", "objective": "huber", "errors": "online"},
    "objective, dot's twin": {"memory": "matrix", "objective": "huber", "errors": "chunk"},
    "update": {"memory": "matrix", "update": "normalised"},
    "update, few steps": {"memory": "mlp", "update": "normalised", "ns_every": 3},
    "all": {"memory": "gated_tanh", "objective": "huber", "update": "normalised"},
}


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_definition_equals_reference(case: str, window: int) -> None:
    """Outputs, state and gradients, at once and in pieces; the reference differentiates the loss
    and the memory's forward, and knows neither `error` nor `linearise`."""
    settings = {"chunk_size": 4, **CASES[case]}
    inputs = rule_inputs(settings["memory"], length=11, window=window)
    # Of keys of one length the limit's maximum is any one's, and so is its gradient.
    inputs["k"] = inputs["k"] * (0.5 + draw(1, 11, 2, 1, seed=9).abs())
    inputs = leaves(inputs)
    results = []
    for rule in (omega_rule, omega_rule_reference):
        y, state = rule(**inputs, **settings)
        outputs = [y, *state.weights, *state.momentum]
        ends = [(t * draw(*t.shape, seed=i)).sum() for i, t in enumerate(outputs)]
        gradients = torch.autograd.grad(
            sum(ends), list(named_leaves(inputs).values()), materialize_grads=True
        )
        results.append((outputs, gradients))
    (ours, our_gradients), (true, true_gradients) = results
    assert difference(ours, true) < 1e-10
    assert difference(our_gradients, true_gradients) < 1e-8
    pieces, _ = rule_in_pieces(inputs, (1, 6, 4), **settings)
    assert difference([pieces], [ours[0]]) < 1e-10


@pytest.mark.parametrize("case", ["memory", "objective of a matrix", "update"])
def test_another_one_is_another_function(case: str) -> None:
    settings = {"chunk_size": 4, **CASES[case]}
    theirs = {"tanh_mlp": "mlp", "huber": "l2", "normalised": "gd"}
    ours = {name: theirs.get(str(value), value) for name, value in settings.items()}
    inputs = rule_inputs(settings["memory"], length=11, window=3)
    y, _ = omega_rule(**inputs, **settings)
    assert difference([omega_rule(**inputs, **ours)[0]], [y]) > 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_it_is_a_node_of_a_graph(case: str) -> None:
    """Its gradients too; the registered features' own among them."""
    settings = {"chunk_size": 4, **CASES[case]}
    inputs = rule_inputs(settings["memory"], length=9, window=2)
    inputs["feature_map"] = Signed(draw(3).abs())
    inputs["weights"] = [
        torch.cat([w, w], -1) if w.shape[-1] == 3 else w for w in inputs["weights"]
    ]
    scale = inputs["feature_map"].scale.requires_grad_()
    tensors = [inputs[n].requires_grad_() for n in ("q", "k", "v")] + [scale]

    def run(provider: str) -> list[Tensor]:
        y, _ = omega_rule_op(**inputs, **settings, provider=provider)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    true = run("auto")
    assert true[-1].abs().max() > 1e-6
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: omega_rule_op(**x, **settings, provider="definition")[0],
        backend="aot_eager",
        fullgraph=True,
    )
    y = compiled(inputs)
    ours = [y, *torch.autograd.grad(y.square().sum(), tensors)]
    assert difference(ours, true) < 1e-9


LAYERS = {
    "memory": {"memory": "tanh_mlp", "update": "gd"},
    "objective": {"objective": "huber", "update": "gd"},
    "update": {"update": "normalised"},
    "feature map": {"feature_map": "signed", "update": "gd"},
}


def config_of(name: str) -> AtlasMemoryConfig:
    return AtlasMemoryConfig(window=3, chunk_size=4, **LAYERS[name])


@pytest.mark.parametrize("name", [n if n == "objective" else slow_as_it_is(n) for n in LAYERS])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_layer_takes_it(name: str) -> None:
    """In pieces as at once, compiled as eager, every parameter trained, saved and loaded."""
    config = config_of(name)
    layer, x = config.build(DIM, HEADS).double(), draw(2, 11, DIM)
    y, _ = layer(x)
    first, state = layer(x[:, :5])
    second, _ = layer(x[:, 5:], state)
    assert difference([torch.cat([first, second], 1)], [y]) < 1e-10
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert difference([compiled(x)[0]], [y]) < 1e-9
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    again = config.build(DIM, HEADS).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[0], y)
    assert type(config).from_dict(config.to_dict()) == config


def test_a_layer_s_write_strength_starts_where_the_update_says() -> None:
    layer = config_of("update").build(DIM, HEADS)
    torch.testing.assert_close(layer.eta(torch.randn(1, 3, DIM)), torch.full((1, 3, HEADS), 0.1))


def test_kernels_refuse_it_by_name() -> None:
    assert "'tanh_mlp' has no kernel" in str(unknown(Rule(memory="tanh_mlp"), "identity"))
    assert "'huber' has no kernel" in str(unknown(Rule(objective="huber"), "identity"))
    assert "'normalised' has no kernel" in str(unknown(Rule(update="normalised"), "identity"))
    assert "'signed' has no kernel" in str(unknown(Rule(), "signed"))


@dataclass(frozen=True)
class Turned:
    """phi(x) = x turned by a fixed matrix, columns in another order."""

    turn: Tensor
    order: Tensor
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.turn.to(x.dtype))[..., self.order]

    def width_of(self, dim: int) -> int:
        return self.width

    @staticmethod
    def of(width: int, degree: int) -> Turned:
        return Turned(torch.randn(width, width), torch.randperm(width), width)


def test_the_tensors_of_a_map_are_saved_moved_and_counted() -> None:
    register_feature_map("turned", Turned)
    config = AtlasMemoryConfig(feature_map="turned", update="gd", window=2, chunk_size=4)
    layer, again, x = config.build(DIM, HEADS), config.build(DIM, HEADS), draw(1, 9, DIM).float()
    assert not torch.equal(layer(x)[0], again(x)[0])
    again.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], again(x)[0])
    assert all(t.device.type == "meta" for t in layer.to("meta").state_dict().values())
    inputs = rule_inputs("mlp", length=9, window=2)
    inputs["feature_map"] = Turned(draw(3, 3), torch.tensor([2, 0, 1]), 3)
    names = ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights", "feature_map")
    a = Arguments(*(inputs[n] for n in names), rule=Rule("mlp", window=2, chunk_size=4), state=None)
    tensors, settings = flatten(a)
    shapes = tuple(tuple(t.shape) for t in tensors)
    assert rule_backward_flops(shapes, settings) > rule_flops(shapes, settings) > 0


def test_a_map_of_a_registered_name_s_class_is_not_that_map() -> None:
    """As where a cell of a notebook runs again."""
    register_feature_map("Other", Signed)
    other = type("Other", (Signed,), {})(draw(3).abs())
    inputs = rule_inputs("matrix", length=5) | {"feature_map": other}
    inputs["weights"] = [torch.cat([w, w], -1) for w in inputs["weights"]]
    omega_rule(**inputs)
    a = Arguments(**inputs, rule=Rule(window=2), state=None)
    with pytest.raises(ValueError, match=r"feature_map: expected one of .*, got .*Other"):
        flatten(a)


def four_weights(linear: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
    return linear(0, linear(1, x).tanh() * linear(2, x) + linear(3, x))


def linearised(weights: Sequence[Tensor], x: Tensor) -> Linearised:
    w1, *inner = weights
    a, b, c = (x @ w.mT for w in inner)
    a, h = a.tanh(), a.tanh() * b + c
    slope = (1 - a * a) * b

    def factors(e: Tensor) -> list[tuple[Tensor, Tensor]]:
        back = e @ w1
        return [(e, h), (slope * back, x), (a * back, x), (back, x)]

    def along(s: Sequence[Tensor]) -> Tensor:
        first, second, third = (x @ t.mT for t in s[1:])
        return h @ s[0].mT + (slope * first + a * second + third) @ w1.mT

    return Linearised(h @ w1.mT, factors, along)


def one_weight(weights: Sequence[Tensor], x: Tensor) -> Linearised:
    (w,) = weights
    h = x.tanh()
    return Linearised(h @ w.mT, lambda e: [(e, h)], lambda s: h @ s[0].mT)


@pytest.mark.parametrize(
    "memory",
    [
        Memory(4, True, four_weights, linearised),
        Memory(1, False, lambda linear, x: linear(0, x.tanh()), one_weight),
        Memory(1, True, MEMORIES["matrix"].forward, MEMORIES["matrix"].linearise, linear=True),
    ],
    ids=["four weights", "one, not linear", "one, with a residual"],
)
@pytest.mark.parametrize("errors", ["chunk", "online"])
def test_memories_of_any_number_of_weights(memory: Memory, errors: str) -> None:
    register_memory("own", memory)
    x = rule_inputs("own", length=11, window=3)
    settings = {"memory": "own", "chunk_size": 4, "errors": errors}
    ours, state = omega_rule(**x, **settings)
    true, end = omega_rule_reference(**x, **settings)
    assert difference([ours, *state.weights], [true, *end.weights]) < 1e-10


def broken(**changes: Any) -> Memory:
    found = {"weights": 4, "residual": True, "forward": four_weights, "linearise": linearised}
    return Memory(**(found | changes))


def wrong_along(weights: Sequence[Tensor], x: Tensor) -> Linearised:
    return linearised(weights, x)._replace(along=lambda s: x @ s[1].mT @ weights[0].mT)


def wrong_factors(weights: Sequence[Tensor], x: Tensor) -> Linearised:
    found = linearised(weights, x)
    return found._replace(factors=lambda e: [(left, 2 * right) for left, right in found.factors(e)])


L2, DOT = OBJECTIVES["l2"], OBJECTIVES["dot"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_memory("m", torch.tanh), "memory: expected a Memory, got"),
        (lambda: register_memory("m", broken(weights=0)), "memory.weights: expected an int >= 1"),
        (lambda: register_memory("m", broken(linear=True)), "memory.linear: expected False"),
        (lambda: register_memory("m", broken(linearise=wrong_along)), "along: expected the deriv"),
        (
            lambda: register_memory("m", broken(linearise=wrong_factors)),
            r"factors\[0\]: expected",
        ),
        (
            lambda: register_memory("m", broken(forward=lambda f, x: 2 * four_weights(f, x))),
            "memory.forward: expected W_1 applied last",
        ),
        (lambda: register_objective("o", torch.sub), "objective: expected an Objective"),
        (
            lambda: register_objective("o", Objective(L2.loss, lambda y, v: v - y)),
            "objective.error: expected dl/dy of objective.loss",
        ),
        (
            lambda: register_objective("o", Objective(DOT.loss, DOT.error)),
            "objective.error: expected one of y - v alone",
        ),
        (
            lambda: register_objective("o", Objective(L2.loss, L2.error, reads=False)),
            "objective.reads: expected True",
        ),
        (
            lambda: register_objective(
                "o", Objective(lambda y, v: 2 * L2.loss(y, v), lambda y, v: 2 * (y - v), True, True)
            ),
            "objective.correctable: expected False",
        ),
        (lambda: register_update("u", torch.sign), "update: expected an Update"),
        (lambda: register_update("u", Update(None, 1.0)), "update.eta_init: expected a number in"),
        (
            lambda: register_update("u", Update(lambda s, steps: s.mT, 0.1)),
            "update.direction: expected U",
        ),
        (lambda: register_feature_map("f", int), "cls: expected a class with `of"),
        (lambda: register_update("", UPDATES["gd"]), "update's name: expected a str"),
    ],
)
def test_what_is_not_what_it_says_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: register_memory("mlp", MEMORIES["mlp"]),
            "memory's name: expected a str that",
        ),
        (lambda: register_update("gd", UPDATES["gd"]), "update's name: expected a str that is not"),
        (lambda: register_objective("l2", OBJECTIVES["l2"]), "objective's name: expected a str"),
        (lambda: register_feature_map("identity", Signed), "feature map's name: expected a str"),
        (lambda: register_feature_map("sketch", Signed), "feature map's name: expected a str"),
        (lambda: register_feature_map("other", Undeclared), "cls: expected a dataclass of tensors"),
        (lambda: Rule(update="normalised", errors="online"), 'errors: expected "chunk" with'),
    ],
)
def test_a_bad_registration_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
