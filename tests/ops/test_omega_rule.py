"""The rule as an op: torch's own checks of it, and compiled = eager."""

import pytest
import torch

from atlas_blocks import ops
from atlas_blocks.functional import OmegaState, PolynomialMap, omega_rule
from atlas_blocks.functional.memories import MEMORIES as MEMORY_STRUCTURES
from atlas_blocks.functional.rule import Arguments, Rule
from atlas_blocks.ops.omega_rule import flatten
from tests.helpers import (
    MEMORIES,
    UPDATES,
    assert_close,
    difference,
    everything,
    leaves,
    named_leaves,
    rows,
    rule_inputs,
    tokens,
)

OPS = torch.ops.atlas
PLACES = ((0, 0), (1, 3), (2, 4))  # row, tokens it has seen


def flat(inputs, rule, state=None):
    names = ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights", "feature_map")
    return flatten(Arguments(*(inputs[name] for name in names), rule=rule, state=state))


def flat_call(inputs, rule, state=None):
    tensors, settings = flat(inputs, rule, state)
    return tensors, *settings


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
def test_opcheck_passes_forward_and_backward(update, features):
    inputs = rule_inputs("mlp", length=6, features=features, update=update)
    rule = Rule("mlp", "l2", update, 5, 1, 4, True, inputs["gamma"].shape[-1])
    tensors, settings = flat(inputs, rule)
    checks = ("test_schema", "test_faketensor")
    forward, backward = OPS.omega_rule.default, OPS.omega_rule_backward.default
    for save in (False, True):
        arguments = (tensors, *settings, "definition", save)
        torch.library.opcheck(forward, arguments, {}, test_utils=checks)
    outputs = forward(*arguments)
    saved = outputs[-5:]
    grads = [torch.ones_like(t) for t in outputs[:-6]]
    arguments = (grads, tensors, saved, *settings, "definition")
    torch.library.opcheck(backward, arguments, {}, test_utils=checks)


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


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_chunk_starts_are_the_states_there(memory, update):
    """Rows of one batch at positions 0, 3 and 4 of chunks of 4, then 6 tokens more."""
    options = {"memory": memory, "update": update, "chunk_size": 4, "write_discount": True}
    inputs = rule_inputs(memory, batch=3, length=10, update=update)
    inputs["eta"] *= 0.1  # rows that go together are batched, which rounds otherwise
    begun = [omega_rule(**tokens(rows(inputs, [i]), 0, n), **options)[1] for i, n in PLACES]
    state = OmegaState.cat(begun)
    rest = tokens(inputs, 4, 10)
    rule = Rule(memory, "l2", update, 5, 1, 4, True, 2)
    outputs = OPS.omega_rule.default(*flat_call(rest, rule, state), "definition", True)
    count = 2 * MEMORY_STRUCTURES[memory].weights + 1
    saved = outputs[-count:]
    assert {t.shape[:3] for t in saved} == {(3, 3, 2)}  # ceil((6 + 3) / 4) chunks
    for row, place in PLACES:
        ends = [n for n in range(7) if n == 0 or ((place + n) % 4 == 0 and n < 6)]
        for chunk in range(3):
            found = [t[row, chunk] for t in saved]
            if chunk >= len(ends):
                assert not any(t.any() for t in found)
                continue
            start = begun[row]
            piece = tokens(rows(rest, [row]), 0, ends[chunk])
            _, there = omega_rule(**piece, **options, state=start)
            true = [t[0] for t in (*there.weights, *there.momentum, there.scale)]
            assert difference(found, true) < 1e-10
