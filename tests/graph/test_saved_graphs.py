"""A node keeps what its backward needs: no work twice, nothing left over, nothing lost."""

import gc

import pytest
import torch
from helpers import DIM, difference, draw, errors_for, make_block, omega_rule, rule_inputs
from marks import slow_as_it_is

from atlas_blocks.blocks.lstm_op import definition, lstm
from atlas_blocks.graph import saved_graphs
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.op import _largest, flatten, unflatten
from atlas_blocks.omega.rule import Rule

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")
NAMES = [
    "memory-mlp-gd-sketch", "memory-mlp-muon-sketch", "as-context", "as-context-muon", "lstm"
]  # fmt: skip


def training_step(function, x):
    y, _ = function(x)
    return torch.autograd.grad(y.square().sum(), list(function.parameters()))


@pytest.fixture
def work(monkeypatch):
    """How often a backward computed its forward again, or found it kept."""
    found, true = [], saved_graphs.gradients

    def gradients(*arguments):
        result = true(*arguments)
        found.append("again" if result is None else "kept")
        return result

    monkeypatch.setattr(saved_graphs, "gradients", gradients)
    return found


@pytest.mark.parametrize(
    "name",
    [n if n == "lstm" else slow_as_it_is(n) for n in NAMES],
)
@pytest.mark.usefixtures("nodes_compile")
def test_a_compiled_backward_finds_it_and_leaves_nothing(name, work):
    block, x = make_block(name), draw(1, 9, DIM)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert difference(training_step(compiled, x), training_step(block, x)) < 1e-8
    assert len(work) >= 2  # a rule inside a segment has its own
    assert set(work) == {"kept"}
    gc.collect()
    assert len(saved_graphs._graphs) == 0


def leaves():
    tensors = [draw(2, 5, 3), draw(2, 3), draw(2, 3), draw(12, 3), draw(12, 3), draw(12), draw(12)]
    return [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]


def node(tensors):
    """The node, which a call of `lstm` is where it is compiled."""
    run = torch.compile(lambda *t: lstm(*t[:3], t[3:]), backend="aot_eager", fullgraph=True)
    return run(*tensors)


def gradients(outputs, inputs, **options):
    weights = [draw(*t.shape, seed=9) for t in outputs]
    return torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], weights, **options)


def test_a_second_backward_and_a_long_call_compute_it_again(work, monkeypatch):
    inputs = leaves()
    true = gradients(definition(inputs), inputs)
    outputs = node(inputs)
    for _ in range(2):
        found = gradients(outputs, inputs, retain_graph=True)
        assert difference(found, true) < 1e-12
    monkeypatch.setattr(saved_graphs, "LARGEST", inputs[0].numel() - 1)
    assert difference(gradients(node(inputs), inputs), true) < 1e-12
    assert work == ["kept", "again", "again"]


def test_what_no_backward_comes_for_is_freed(work):
    inputs = leaves()
    outputs = node(inputs)
    assert len(saved_graphs._graphs) == 1
    del outputs
    gc.collect()
    assert len(saved_graphs._graphs) == 0
    with torch.no_grad():
        node(inputs)
    assert len(saved_graphs._graphs) == 0
    assert not work


@pytest.mark.parametrize("update", ["gd", "muon"])
def test_a_rule_s_chunk_starts_are_its_key_and_serve_without_it(update, work, monkeypatch):
    """From a state in the middle of a chunk, and with every gradient."""
    inputs = rule_inputs("mlp", batch=2, length=19, window=3, update=update)
    errors = errors_for(update)
    rule = Rule("mlp", "l2", update, 5, 1, 8, errors, 3)
    first = rule_inputs("mlp", batch=2, length=5, window=3, update=update)
    _, state = omega_rule(**first, memory="mlp", update=update, chunk_size=8, errors=errors)
    tensors, settings = flatten(Arguments(**inputs, rule=rule, state=state.detach()))
    tensors = [t.detach() for t in tensors]
    found = []
    for largest in (saved_graphs.LARGEST, _largest(unflatten(tensors, settings)) - 1):
        monkeypatch.setattr(saved_graphs, "LARGEST", largest)
        outputs = torch.ops.atlas.omega_rule.default(tensors, *settings.flat(), "definition", True)
        count = len(state.tensors())
        grads = [draw(*t.shape, seed=9) for t in outputs[:count]]  # of all but the position
        backward = torch.ops.atlas.omega_rule_backward.default
        found.append(backward(grads, tensors, outputs[count + 1 :], *settings.flat(), "definition"))
        again = backward(grads, tensors, outputs[count + 1 :], *settings.flat(), "definition")
        assert difference(again, found[0]) < 1e-7
    assert difference(*found) < 1e-7
    assert work == ["kept", "again", "again", "again"]
