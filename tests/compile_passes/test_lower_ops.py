"""lower_ops: how many nodes it changed, the ops before and after, and the numbers both ways."""

import pytest
import torch
from helpers import (
    DIM,
    Recorder,
    difference,
    draw,
    everything,
    make_block,
    omega_rule_step,
    rule_inputs,
    small_memory,
)

from atlas_blocks import AtlasMemory, ops, use_provider
from atlas_blocks.compile_passes.graph_pass import Passes
from atlas_blocks.compile_passes.lower_ops import LowerOps, op_nodes
from atlas_blocks.graph import providers
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import initial_state

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")


@pytest.fixture(autouse=True)
def one_node():
    """The rule as one node, which is not what a CPU would take."""
    with use_provider("definition"):
        yield


def served(graph) -> list[tuple[str, bool, str]]:
    return [(n.op, n.backward, n.provider) for n in op_nodes(graph)]


def memory() -> AtlasMemory:
    """One that the kernels serve, on a CPU by Triton's interpreter."""
    torch.manual_seed(0)
    config = small_memory(memory="matrix", update="gd", feature_map="identity", chunk_size=16)
    return AtlasMemory(32, 2, config.replace(errors="chunk"))


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for a CPU")
def test_a_provider_asked_for_serves_forward_and_backward():
    block, runs = memory(), []
    recorder = Recorder(Passes([LowerOps("triton")], record=runs.append))
    compiled = torch.compile(block, backend=recorder, fullgraph=True)
    x = draw(2, 20, 32, dtype=torch.float32)
    results = []
    for function in (compiled, block):
        leaves = [x.clone().requires_grad_(), *block.parameters()]
        y, state = function(leaves[0])
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        results.append((everything((y, state)), gradients))
    (ours, our_gradients), (true, true_gradients) = results
    assert difference(ours, true) < 1e-5
    assert difference(our_gradients, true_gradients) < 1e-4
    assert [served(g) for g in recorder.graphs] == [
        [("omega_rule", False, "triton")],
        [("omega_rule", True, "triton")],
    ]
    assert [(r.name, r.direction, r.matches) for r in runs] == [
        ("lower_ops", "forward", 1),
        ("lower_ops", "backward", 1),
    ]
    # It exchanges an argument: no op comes or goes.
    assert all(r.before == r.after > 10 and not r.changed for r in runs)


def test_auto_keeps_what_was_asked_for():
    block, runs = memory(), []
    recorder = Recorder(Passes([LowerOps()], record=runs.append))
    with use_provider("definition"), torch.no_grad():
        torch.compile(block, backend=recorder, fullgraph=True)(draw(1, 9, 32, dtype=torch.float32))
    assert served(recorder.graphs[0]) == [("omega_rule", False, "definition")]
    assert [r.matches for r in runs] == [0]


def test_auto_replaces_a_provider_that_cannot_serve(monkeypatch):
    """As where a graph was traced for another device."""
    never = providers.Provider("never", lambda call: "it serves nothing", print, print)
    monkeypatch.setitem(providers._PROVIDERS, "omega_rule", {})
    providers.register_provider("omega_rule", never, automatic_on=())
    block, runs = make_block("memory-matrix-gd-identity"), []

    def pretend(graph):
        for node in op_nodes(graph):
            node.node.update_arg(len(node.node.args) - (1 if node.backward else 2), "never")

    lower = Passes([LowerOps()], record=runs.append)
    recorder = Recorder(lambda graph: (pretend(graph), lower(graph)))
    x = draw(1, 20, DIM)
    y, _ = torch.compile(block, backend=recorder, fullgraph=True)(x)
    y.sum().backward()
    assert difference([y], [block(x)[0]]) < 1e-12
    assert [r.matches for r in runs] == [1, 1]
    assert {u for g in recorder.graphs for u in served(g)} == {
        ("omega_rule", False, "definition"),
        ("omega_rule", True, "definition"),
    }


def test_a_provider_that_cannot_serve_is_refused_with_the_reason():
    block = make_block("memory-mlp-muon-sketch")
    recorder = Recorder(Passes([LowerOps("triton")]))
    with pytest.raises(RuntimeError, match=r"provider: 'triton' cannot serve this call of omega"):
        torch.compile(block, backend=recorder, fullgraph=True)(draw(1, 9, DIM))
    with pytest.raises(ValueError, match=r"provider: expected one of .*triton.*, got 'cuda'"):
        LowerOps("cuda")


@pytest.mark.parametrize("provider", ["inline", "fla", "definition"])
def test_an_op_without_the_provider_that_is_asked_for_keeps_its_own(provider):
    """Such as Newton-Schulz, forward and backward, in the graph of a rule that has it."""
    recorder = Recorder(Passes([LowerOps(provider)]))
    compiled = torch.compile(ops.newton_schulz, backend=recorder, fullgraph=True)
    results = []
    for function in (compiled, ops.newton_schulz):
        s = draw(3, 4, 5).requires_grad_()
        y = function(s)
        results.append([y, *torch.autograd.grad(y.sin().sum(), s)])
    assert difference(*results) < 1e-12
    assert {u for g in recorder.graphs for u in served(g)} == {
        ("newton_schulz", False, "definition"),
        ("newton_schulz", True, "definition"),
    }


def test_newton_schulz_is_served_by_who_is_asked_for(monkeypatch):
    monkeypatch.setitem(providers._PROVIDERS, "newton_schulz", {})
    serve = providers.find("newton_schulz", "definition")

    def supports(call):
        return None if (call.rows, call.columns) == (4, 5) else f"{call.rows} x {call.columns}"

    mine = providers.Provider("mine", supports, serve.forward, serve.backward)
    providers.register_provider("newton_schulz", mine, automatic_on=())
    recorder = Recorder(Passes([LowerOps("mine")]))
    compiled = torch.compile(ops.newton_schulz, backend=recorder, fullgraph=True)
    compiled(draw(3, 4, 5).requires_grad_()).sum().backward()
    assert {u for g in recorder.graphs for u in served(g)} == {
        ("newton_schulz", False, "mine"),
        ("newton_schulz", True, "mine"),
    }
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="'mine' cannot serve this call of newton_schulz: 5 x 4"):
        compiled(draw(3, 5, 4))


@pytest.mark.parametrize("context", [False, True], ids=["by the pass", "while traced"])
def test_inside_a_node_of_segments_ops_choose_where_inline_is_asked_for(context):
    """What they compute there is in no graph."""
    block, x = make_block("as-context"), draw(1, 20, DIM)
    recorder = Recorder(Passes([LowerOps("inline")]) if not context else Passes([]))
    compiled = torch.compile(block, backend=recorder, fullgraph=True)
    with use_provider("inline" if context else "auto"), torch.no_grad():
        y, _ = compiled(x)
    assert difference([y], [block(x)[0]]) < 1e-10


@pytest.mark.slow(compile_nodes=False)
def test_a_provider_is_not_asked_for_where_the_rule_was_inlined():
    recorder = Recorder(Passes([LowerOps("triton")]))
    with use_provider("auto"), pytest.raises(RuntimeError, match="it was traced for 'inline'"):
        torch.compile(memory(), backend=recorder)(draw(1, 9, 32, dtype=torch.float32))
    block, one = memory(), draw(1, 1, 32, dtype=torch.float32)
    with torch.no_grad(), use_provider("auto"):
        _, state = block(one)
        with pytest.raises(RuntimeError, match="call of omega_rule: it was traced for 'inline'"):
            torch.compile(block, backend=recorder)(one, state)
    recorder = Recorder(Passes([LowerOps("inline")]))
    with pytest.raises(RuntimeError, match=r"'inline' cannot serve .* before there is a n"):
        torch.compile(memory(), backend=recorder)(draw(1, 9, 32, dtype=torch.float32))


def test_segments_hand_the_name_on():
    block = make_block("as-context")
    recorder = Recorder(Passes([LowerOps("definition")]))
    x = draw(1, 30, DIM)
    with torch.no_grad():
        y, _ = torch.compile(block, backend=recorder, fullgraph=True)(x)
    assert difference([y], [block(x)[0]]) < 1e-12
    assert ("memory_as_context", False, "definition") in served(recorder.graphs[0])


@pytest.mark.parametrize("provider", ["definition", "auto"])
def test_the_decode_step_is_seen_where_it_writes_to_its_state(provider):
    """As one node, or taken in: then none is left."""
    inputs = rule_inputs("matrix", length=1, window=2)
    rule = Rule("matrix", "l2", "gd", 5, 1, 8, "chunk", 2)
    state = initial_state(inputs["q"], inputs["v"], inputs["weights"], rule, True)
    state = state.map(torch.clone)
    names = ("q", "k", "v", "alpha", "eta", "theta", "gamma")
    token = {name: inputs[name][:, 0] for name in names}

    def step(token, tensors):
        parts = iter(tensors)
        state_here = state.map(lambda _: next(parts))
        return omega_rule_step(**token, chunk_size=8, state=state_here)

    seen = []
    recorder = Recorder(lambda graph: seen.extend((n, n.call) for n in op_nodes(graph)))
    other = state.map(torch.clone)
    with torch.no_grad(), use_provider(provider):
        ours = torch.compile(step, backend=recorder, fullgraph=True)(token, state.tensors())
        true = step(token, other.tensors())
    assert difference([ours, *state.tensors()], [true, *other.tensors()]) < 1e-12
    if provider == "auto":
        assert seen == []
        return
    ((found, call),) = seen
    assert (found.op, found.provider) == ("omega_rule_step", "definition")
    assert (call.memory if hasattr(call, "memory") else call.rule.memory) == "matrix"
    assert call.chunks == "token"


def test_the_uuid_knows_the_settings():
    one, same, other = (Passes([LowerOps(m)]).uuid() for m in ("auto", "auto", "definition"))
    assert one == same != other
    assert Passes([LowerOps()], then=[lambda graph: None]).uuid() is None
