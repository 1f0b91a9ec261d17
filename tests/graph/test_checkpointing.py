"""Activation checkpointing: gradients as without it, of every block and of every op's node.

Non-reentrant checkpointing hands each saved tensor out once, and asks that a recomputation saves
what the forward saved.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import (
    BLOCKS,
    DIM,
    difference,
    draw,
    leaves,
    make_block,
    named_leaves,
    omega_rule_op,
    rule_inputs,
)
from marks import slow_as_it_is
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from atlas_blocks import ops
from atlas_blocks.blocks import lstm_op as long_short
from atlas_blocks.blocks import memory_as_context_op as context
from atlas_blocks.graph import providers, saved_graphs
from atlas_blocks.kernel_attention import op as phi_star
from atlas_blocks.omega import inline
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.polynomial_node import _node
from atlas_blocks.omega.rule import Rule
from atlas_blocks.ops import checkpoint_policy

KINDS = {
    "all": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, checkpoint_policy)},
}


def assert_same_gradients(
    run: Callable[..., list[Tensor]], tensors: list[Tensor], others: list[Tensor], kind: str
) -> None:
    """Of all results of run(*tensors), with respect to the tensors and the others."""
    found = []
    for inside in (partial(checkpoint, run, use_reentrant=False, **KINDS[kind]), run):
        outputs = [t for t in inside(*tensors) if t.requires_grad]
        weights = [draw(*t.shape, seed=3, dtype=t.dtype) for t in outputs]
        wanted = [t for t in [*tensors, *others] if t.requires_grad]
        found.append(torch.autograd.grad(outputs, wanted, weights, materialize_grads=True))
    assert difference(*found) < 1e-10  # of another order of sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block(name: str, kind: str) -> None:
    """Begun with a state, the gradient of what it leaves as well."""
    block = make_block(name)
    with torch.no_grad():
        _, state = block(draw(2, 5, DIM, seed=2))

    def run(x: Tensor) -> list[Tensor]:
        y, after = block(x, state)
        return [y, *([] if after is None else after.tensors())]

    x = draw(2, 11, DIM).requires_grad_()
    assert_same_gradients(run, [x], list(block.parameters()), kind)


@pytest.fixture
def as_provider(monkeypatch: pytest.MonkeyPatch) -> str:
    """The definitions as another provider, which is a node in eager mode too."""
    table = {op: dict(entries) for op, entries in providers._PROVIDERS.items()}
    monkeypatch.setattr(providers, "_PROVIDERS", table)
    for op in ("omega_rule", "newton_schulz"):
        serve = providers.find(op, "definition")
        one = ops.Provider("other", lambda call: None, serve.forward, serve.backward)
        ops.register_provider(op, one, automatic_on=())
    return "other"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [saved_graphs.LARGEST, 0], ids=["kept", "again"])
@pytest.mark.parametrize("update", ["gd", "muon"])
def test_the_rule_s_node(
    update: str, largest: int, kind: str, as_provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_graphs, "LARGEST", largest)
    inputs = leaves(rule_inputs("mlp", features="polynomial", update=update))
    tensors = list(named_leaves(inputs).values())

    def run(*tensors: Tensor) -> list[Tensor]:
        y, state = omega_rule_op(
            **inputs, memory="mlp", update=update, chunk_size=4, provider=as_provider
        )
        return [y, *state.tensors()]

    assert_same_gradients(run, tensors, [], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_small_nodes(kind: str, as_provider: str) -> None:
    x, coefficients = draw(2, 5, 4).requires_grad_(), draw(3).requires_grad_()

    def run(x: Tensor, coefficients: Tensor) -> list[Tensor]:
        features = _node([x, coefficients])[0]
        return [ops.newton_schulz(features, provider=as_provider)]

    assert_same_gradients(run, [x, coefficients], [], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [saved_graphs.LARGEST, 0], ids=["kept", "again"])
@pytest.mark.parametrize("name", ["as-context", "as-context-muon"])
def test_the_node_of_segments(
    name: str, largest: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_graphs, "LARGEST", largest)
    block = make_block(name)
    with torch.no_grad():
        _, state = block(draw(2, 5, DIM, seed=2))

    def run(x: Tensor) -> list[Tensor]:
        y, after = context.memory_as_context(block, x, state)
        return [y, *after.tensors()]

    x = draw(2, 17, DIM).requires_grad_()
    assert_same_gradients(run, [x], context.tensors_of(block)[0], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [saved_graphs.LARGEST, 0], ids=["kept", "again"])
def test_nodes_that_compute_again(largest: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact phi*, an LSTM, and the walk over chunks of a rule that is traced into a graph."""
    monkeypatch.setattr(saved_graphs, "LARGEST", largest)
    weights = [draw(8, 2, seed=i).requires_grad_() for i in (1, 2)]
    weights += [draw(8, seed=i).requires_grad_() for i in (3, 4)]
    before = [draw(2, 2, seed=i).requires_grad_() for i in (5, 6)]
    x = draw(2, 9, 2).requires_grad_()
    assert_same_gradients(lambda *t: long_short._node([*t, *weights]), [x, *before], weights, kind)

    q, k, v = (draw(1, 9, 2, 4, seed=i).requires_grad_() for i in (1, 2, 3))
    s = phi_star.settings(q, None, "l2", None, True, 4, "chunk")
    gates, state = phi_star.complete(s, q, v, None, None, None, None)
    rest = [*gates, *(t.clone() for t in state.tensors())]
    assert_same_gradients(lambda *t: phi_star._node([*t, *rest], *s), [q, k, v], [], kind)

    inputs = leaves(rule_inputs("mlp", features="polynomial", length=13))
    rule = Rule("mlp", "l2", "gd", 5, 1, 4, "online", 2)
    streams = [inputs[n] for n in ("q", "k", "v", "alpha", "eta", "theta", "gamma")]
    a = Arguments(*streams, inputs["weights"], inputs["feature_map"], rule, None)

    def run(*tensors: Tensor) -> list[Tensor]:
        y, after = inline.trace(a)
        return [y, *after.tensors()]

    assert_same_gradients(run, list(named_leaves(inputs).values()), [], kind)


# Dynamo instantiates every autograd.Function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    ["memory-mlp-muon-sketch", *map(slow_as_it_is, ("memory-mlp-gd-sketch", "as-context"))],
)
def test_a_compiled_block(name: str) -> None:
    """Its nodes keep their graphs on a CPU, which are nothing to the checkpoint."""
    torch._dynamo.reset()
    block = make_block(name)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)

    def run(x: Tensor) -> list[Tensor]:
        y, after = compiled(x)
        return [y, *after.tensors()]

    x = draw(2, 11, DIM).requires_grad_()
    assert_same_gradients(run, [x], list(block.parameters()), "all")
