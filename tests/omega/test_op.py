"""The rule as an op: torch's own checks of it, and compiled = eager."""

from unittest import mock

import pytest
import torch
from helpers import omega_rule, omega_rule_op
from marks import slow_as_it_is
from torch.utils.flop_counter import FlopCounterMode

from atlas_blocks.functional import OmegaState, PolynomialMap
from atlas_blocks.graph import saved_graphs
from atlas_blocks.omega import backward as omega_backward
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.definition import run
from atlas_blocks.omega.memories import MEMORIES as MEMORY_STRUCTURES
from atlas_blocks.omega.op import flatten, unflatten
from atlas_blocks.omega.rule import Rule
from tests.helpers import (
    MEMORIES,
    STEPS,
    UPDATES,
    assert_close,
    difference,
    errors_for,
    everything,
    leaves,
    named_leaves,
    rows,
    rule_inputs,
    tokens,
)

OPS = torch.ops.atlas


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch):
    """The backward from the memory at every chunk's start; test_saved_graphs.py has the other."""
    monkeypatch.setattr(saved_graphs, "LARGEST", -1)


def flat(inputs, rule, state=None):
    names = ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights", "feature_map")
    return flatten(Arguments(*(inputs[name] for name in names), rule=rule, state=state))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
def test_opcheck_passes_forward_and_backward(memory, update, errors, features):
    """With and without a state and momentum; the chunk starts asked for and not."""
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    forward, backward = OPS.omega_rule.default, OPS.omega_rule_backward.default
    for momentum, places in ((True, None), (False, (1, 6))):
        inputs = rule_inputs(
            memory, batch=2, length=6, features=features, update=update, momentum=momentum
        )
        rule = Rule(memory, "l2", update, 5, 1, 4, errors, inputs["gamma"].shape[-1])
        options = {n: getattr(rule, n) for n in ("memory", "update", "chunk_size", "errors")}
        state = begun(inputs, places, options)
        tensors, settings = flat(inputs, rule, state)
        for save in (False, True):
            arguments = (tensors, *settings.flat(), "definition", save)
            torch.library.opcheck(forward, arguments, {}, **checks)
        outputs, saved = outputs_of(tensors, settings)
        grads = [torch.ones_like(t) for t in outputs[:-1]]
        arguments = (grads, tensors, saved, *settings.flat(), "definition")
        torch.library.opcheck(backward, arguments, {}, **checks)


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("memory", [m if m == "matrix" else slow_as_it_is(m) for m in MEMORIES])
@pytest.mark.parametrize("update", UPDATES)
def test_compiled_equals_eager_in_one_graph(memory, update):
    torch._dynamo.reset()
    window = 3
    options = {"memory": memory, "update": update, "chunk_size": 4, "errors": errors_for(update)}

    def two_calls(rule, inputs):
        y, state = rule(**tokens(inputs, 0, 5), **options)
        z, state = rule(**tokens(inputs, 5, 9), **options, state=state)
        return torch.cat([y, z], 1), state

    # The feature map is made inside: a compiled function takes tensors.
    def compiled_calls(inputs, coefficients):
        return two_calls(omega_rule_op, inputs | {"feature_map": PolynomialMap(coefficients)})

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
    ours, true = (rule(**inputs, memory="mlp") for rule in (omega_rule_op, omega_rule))
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(true), strict=True))


def begun(inputs, places, options):
    """The state of rows that have seen so many tokens each; None for a new sequence."""
    if places is None:
        return None
    return OmegaState.cat(
        [omega_rule(**tokens(rows(inputs, [i]), 0, n), **options)[1] for i, n in enumerate(places)]
    )


def outputs_of(tensors, settings):
    """y and the state's tensors, then the chunk starts, of the op's definition."""
    outputs = OPS.omega_rule.default(tensors, *settings.flat(), "definition", True)
    count = MEMORY_STRUCTURES[settings.rule.memory].weights * (2 if settings.momentum else 1) + 1
    return outputs[:-count], outputs[-count:]


@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_chunk_starts_are_the_states_there(memory, update, errors):
    """Rows at positions 0, 3 and 4, chunks of 4, then 6 tokens more. A begun chunk is done again
    from its start, or with Muon goes on."""
    options = {"memory": memory, "update": update, "chunk_size": 4, "errors": errors}
    places = (0, 3, 4)
    inputs = rule_inputs(memory, batch=3, length=10, update=update)
    state = begun(inputs, places, options)
    rest = tokens(inputs, 4, 10)
    _, saved = outputs_of(*flat(rest, Rule(memory, "l2", update, 5, 1, 4, errors, 2), state))
    assert {t.shape[:3] for t in saved} == {(3, 3, 2)}  # ceil((6 + 3) / 4) chunks
    for row, place in enumerate(places):
        ends = [0, *(n for n in range(1, 6) if (place + n) % 4 == 0)]
        for chunk in range(3):
            found = [t[row, chunk] for t in saved]
            if chunk >= len(ends):
                assert not any(t.any() for t in found)
                continue
            piece = tokens(rows(rest, [row]), 0, ends[chunk])
            _, there = omega_rule(**piece, **options, state=state[[row]])
            true = [t[0] for t in starts_in(there)]
            assert difference(found, true) < 1e-10


def starts_in(state):
    """What the next token's chunk goes on from, of a rule with momentum."""
    if state.momentum_start:
        return [*state.chunk_start, *state.momentum_start, state.scale]
    return [*state.weights, *state.momentum, state.scale]


def test_where_chunks_lie_changes_nothing_they_begin_with_the_call():
    options = {"chunk_size": 4, "errors": "online"}
    inputs = rule_inputs(batch=2, length=10, window=1)
    state = begun(inputs, (1, 3), options)
    rest = tokens(inputs, 3, 10)
    _, saved = outputs_of(*flat(rest, Rule("matrix", "l2", "gd", 5, 1, 4, "online", 1), state))
    for chunk, end in enumerate((0, 4)):
        _, there = omega_rule(**tokens(rest, 0, end), **options, state=state)
        assert difference([t[:, chunk] for t in saved], starts_in(there)) < 1e-12
    assert not any(t[:, 2:].any() for t in saved)


@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_backward_from_chunk_starts_is_autograd_s(memory, update, errors, features):
    """A new sequence, rows at one position, and rows at three; pieces that split chunks."""
    options = {"memory": memory, "update": update, "chunk_size": 4, "errors": errors}
    for places, momentum, together in (
        (None, True, 2),
        ((2, 2, 2), False, 8),
        ((3, 5, 4), True, 1),
    ):
        inputs = rule_inputs(
            memory,
            batch=3,
            length=20,
            window=3,
            features=features,
            momentum=momentum,
            update=update,
        )
        rule = Rule(memory, "l2", update, 5, 1, 4, errors, 3)
        state = begun(inputs, places, options)
        for last in (6, 17):
            tensors, settings = flat(tokens(inputs, 5, last), rule, state)
            outputs, saved = outputs_of(tensors, settings)
            grads = [torch.randn_like(t) for t in outputs[:-1]]
            with mock.patch.object(omega_backward, "TOGETHER", together):
                ours = OPS.omega_rule_backward.default(
                    grads, tensors, saved, *settings.flat(), "definition"
                )
            leaf = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
            y, after = run(unflatten(leaf, settings))
            # The history and the scale need no gradient where there is nothing to differentiate.
            pairs = zip((y, *after.tensors()[:-1]), grads, strict=True)
            results, given = zip(*(p for p in pairs if p[0].requires_grad), strict=True)
            wanted = [t for t in leaf if t.requires_grad]
            true = torch.autograd.grad(results, wanted, given, materialize_grads=True)
            assert difference(ours, true) < 1e-10


def test_the_backward_is_the_same_under_a_dispatch_mode():
    tensors, settings = flat(
        rule_inputs(length=20), Rule("matrix", "l2", "gd", 5, 1, 4, "online", 2)
    )
    outputs, saved = outputs_of(tensors, settings)
    arguments = ([torch.ones_like(t) for t in outputs[:-1]], tensors, saved, *settings.flat())
    true = OPS.omega_rule_backward.default(*arguments, "definition")
    with FlopCounterMode(display=False):
        ours = OPS.omega_rule_backward.default(*arguments, "definition")
    assert all(t.any() for t in true[:6])
    assert all(torch.equal(a, b) for a, b in zip(ours, true, strict=True))
