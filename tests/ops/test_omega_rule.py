"""The rule as an op: torch's own checks of it, and compiled = eager."""

import pytest
import torch

from atlas_blocks.functional import PolynomialMap, omega_rule
from atlas_blocks.functional.rule import Rule
from atlas_blocks.ops import omega_rule as ops
from tests.helpers import (
    MEMORIES,
    UPDATES,
    assert_close,
    difference,
    everything,
    leaves,
    named_leaves,
    rule_inputs,
    tokens,
)


def flat(inputs, rule, state=None):
    gates = [inputs[name] for name in ("q", "k", "v", "alpha", "eta", "theta", "gamma")]
    return ops.flatten(*gates, inputs["weights"], rule, inputs["feature_map"], state)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
def test_opcheck_passes_forward_and_backward(update, features):
    inputs = rule_inputs("mlp", length=6, features=features, update=update)
    rule = Rule("mlp", "l2", update, 5, 1, 4, True, inputs["gamma"].shape[-1])
    tensors, settings = flat(inputs, rule)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.atlas.omega_rule.default, (tensors, *settings), {}, test_utils=checks
    )
    outputs = torch.ops.atlas.omega_rule.default(tensors, *settings)
    grads = [torch.ones_like(t) for t in outputs[:-1]]
    backward = torch.ops.atlas.omega_rule_backward.default
    torch.library.opcheck(backward, (grads, tensors, *settings), {}, test_utils=checks)


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("update", UPDATES)
def test_compiled_equals_eager_in_one_graph(memory, update):
    torch._dynamo.reset()
    window = 3
    options = {"memory": memory, "update": update, "chunk_size": 4, "write_discount": True}

    def two_calls(rule, inputs):
        y, state = rule(**tokens(inputs, 0, 5), **options)
        z, state = rule(**tokens(inputs, 5, 9), **options, state=state)
        return torch.cat([y, z], 1), state

    # The feature map is made inside: a compiled function takes tensors.
    def compiled_calls(inputs, coefficients):
        return two_calls(ops.omega_rule, inputs | {"feature_map": PolynomialMap(coefficients)})

    inputs = rule_inputs(memory, window=window, features="polynomial", update=update)
    eager, compiled = leaves(inputs), leaves(inputs)
    true = two_calls(omega_rule, eager)
    coefficients = compiled["feature_map"].coefficients
    ours = torch.compile(compiled_calls, backend="aot_eager", fullgraph=True)(
        compiled | {"feature_map": None}, coefficients
    )
    assert_close(ours, true)
    for y, state in (true, ours):
        (y.square().sum() + sum(w.sum() for w in state.weights)).backward()
    for name, leaf in named_leaves(eager).items():
        gap = difference([named_leaves(compiled)[name].grad], [leaf.grad])
        assert gap < 1e-9, f"gradient of {name}: {gap:.3g}"


def test_eager_is_the_definition():
    inputs = rule_inputs("mlp")
    ours, true = (rule(**inputs, memory="mlp") for rule in (ops.omega_rule, omega_rule))
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(true), strict=True))
