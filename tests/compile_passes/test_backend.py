"""backend="atlas": found by its name, its options, its cache, and nothing left behind.

The models are products and the rule alone, for which Inductor compiles no C++.
"""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import Recorder, difference, make_block
from helpers import omega_rule_op as omega_rule
from marks import slow_as_it_is
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import atlas_blocks
from atlas_blocks.compile_passes import backend
from atlas_blocks.compile_passes.graph_pass import GraphPass
from atlas_blocks.graph import one_program
from atlas_blocks.ops import use_provider
from atlas_blocks.recipes import build

# Dynamo instantiates every autograd.Function that it traces; Inductor warns of its own parts.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_node():
    """The rule as one node, which is not what a CPU would take: that is C++ to compile."""
    with use_provider("definition"):
        yield


class Model(nn.Module):
    """The rule alone, over x [B, T, H, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.eye(4).repeat(2, 1, 1))

    def forward(self, x, gate, gamma):
        gates = {"alpha": gate, "eta": gate, "theta": None, "gamma": gamma}
        return omega_rule(x, x, x, **gates, weights=[self.memory], chunk_size=8)[0]


def inputs(length: int = 20) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x = 0.3 * torch.randn(1, length, 2, 4)
    return x, torch.full((1, length, 2), 0.5), torch.rand(1, length, 2, 3)


def run(model, function, arguments):
    y = function(*arguments)
    return y.detach(), torch.autograd.grad(y.square().sum(), list(model.parameters()))[0]


def test_equal_to_eager_and_nothing_process_wide_is_left():
    model, arguments = Model(), inputs()
    before = inductor.save_config_portable()
    compiled = torch.compile(model, backend="atlas", fullgraph=True)
    ours, true = run(model, compiled, arguments), run(model, model, arguments)
    torch.testing.assert_close(ours, true)
    assert inductor.save_config_portable() == before
    assert inductor.post_grad_custom_pre_pass is None


def test_the_second_compile_finds_the_first_ones_graphs(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, arguments = Model(), inputs()
    for hits, misses in ((0, 2), (2, 0)):  # a forward and a backward graph
        torch._dynamo.reset()
        counters.clear()
        run(model, torch.compile(model, backend="atlas", fullgraph=True), arguments)
        found = counters["inductor"]
        assert (found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]) == (hits, misses)
        assert found["fxgraph_cache_bypass"] == 0
    # Another choice of passes is another graph.
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="atlas", options={backend.DISABLE: "lower_ops"})
    run(model, compiled, arguments)
    assert counters["inductor"]["fxgraph_cache_hit"] == 0


FRESH = """
import json, sys, torch
import warnings; warnings.simplefilter("ignore")
assert not any(m.startswith("atlas_blocks") for m in sys.modules)
w = torch.randn(4, 4)
f = torch.compile(lambda x: x @ w, backend="atlas", fullgraph=True)
x = torch.randn(3, 4)
torch.testing.assert_close(f(x), x @ w)
assert "atlas_blocks.compile_passes.backend" in sys.modules
from torch._dynamo.utils import counters
print(json.dumps(counters["inductor"]))
"""


def fresh_process(tmp_path, **env: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        env={**os.environ, **env},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow(compile_nodes=False)
def test_a_fresh_process_needs_no_import(tmp_path):
    fresh_process(tmp_path)


@pytest.mark.slow
def test_a_fresh_process_finds_the_graphs_of_another(tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    assert fresh_process(tmp_path, **cache).get("fxgraph_cache_miss") == 1
    assert fresh_process(tmp_path, **cache).get("fxgraph_cache_miss", 0) == 0


@pytest.fixture
def seen(monkeypatch):
    """The passes' names on each graph that is compiled."""
    found = []
    true = backend.Passes

    def spy(passes, *arguments):
        found.extend(p.name for p in passes)
        return true(passes, *arguments)

    monkeypatch.setattr(backend, "Passes", spy)
    return found


@pytest.mark.slow(compile_nodes=False)
def test_mode_options_and_dynamic_are_torchs(seen):
    model, arguments = Model(), inputs()
    true = model(*arguments)
    graphs = []

    def count(graph):
        graphs.append(len(graph.nodes))

    for options in (
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"max_autotune": False, "post_grad_custom_pre_pass": count}},
        {"dynamic": True},
    ):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="atlas", **options)
        torch.testing.assert_close(compiled(*arguments), true)
        assert inductor.post_grad_custom_pre_pass is None
    assert len(graphs) >= 1, "the user's own pass did not run"
    assert set(seen) == set(backend.PASSES)
    assert seen.count("lower_ops") == seen.count("select_attention") == 3
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(model, backend="atlas", options={"no_such_option": 1})(*arguments)


@pytest.mark.slow(compile_nodes=False)
def test_compile_takes_our_choices_by_name(seen):
    model, arguments = Model(), inputs()
    true = model(*arguments)
    for options, passes in (
        ({}, ["select_attention", "lower_ops", "clean_up"]),
        ({"disable": ["lower_ops", "clean_up"]}, ["select_attention"]),
        (
            {"disable": ["select_attention"], "mode": "default", "dynamic": True},
            ["lower_ops", "clean_up"],
        ),
        ({"provider": "definition", "disable": list(backend.PASSES)}, []),
        ({"mode": "max-autotune-no-cudagraphs", "options": {"epilogue_fusion": False}}, None),
    ):
        torch._dynamo.reset()
        seen.clear()
        compiled = atlas_blocks.compile(model, fullgraph=True, **options)
        torch.testing.assert_close(compiled(*arguments), true)
        assert passes is None or seen == passes
    with pytest.raises(ValueError, match="disable: expected one of clean_up, lower_ops, sel"):
        atlas_blocks.compile(model, disable=["fast"])
    with pytest.raises(ValueError, match=r"provider: expected one of .*, got 'fast'"):
        atlas_blocks.compile(model, provider="fast")
    with pytest.raises(AttributeError, match="no attribute 'compiles'"):
        _ = atlas_blocks.compiles


def test_compile_asks_for_its_provider_while_the_model_is_traced(monkeypatch):
    """Where the pass would come too late: the rule is then taken into the graph, or it is not."""
    model, arguments = Model(), inputs()
    true = model(*arguments)
    for function in (model, lambda *x: model(*x)):
        for provider, op in (("inline", "omega_walk"), ("definition", "omega_rule")):
            recorder = Recorder()
            monkeypatch.setattr(one_program, "inductor", lambda g, x, _, r=recorder: r(g, x))
            torch._dynamo.reset()
            compiled = atlas_blocks.compile(function, provider=provider, fullgraph=True)
            with use_provider("auto"):
                torch.testing.assert_close(compiled(*arguments), true)
            assert recorder.count(f"atlas.{op}.default")[0] == 1
    with use_provider("auto"), pytest.raises(Exception, match="provider: 'triton' cannot serve"):
        atlas_blocks.compile(model.double(), provider="triton")(*(t.double() for t in arguments))


@pytest.mark.parametrize(
    "name", [*map(slow_as_it_is, ("omeganet-tiny", "atlas-mag-tiny", "titans-mac-tiny"))]
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_blocks_of_one_kind_are_compiled_once(monkeypatch, name):
    """In each direction, and once more at a second length; not at a third, whatever the depth.
    Outputs and gradients are those of the model."""
    recorder = Recorder()
    monkeypatch.setattr(one_program, "inductor", lambda g, x, *_: recorder(g, x))
    torch._dynamo.reset()
    model = build(name, depth=5).double()
    compiled = atlas_blocks.compile_blocks(copy.deepcopy(model), provider="definition")
    counts = []
    for length in (40, 72, 90):
        tokens = torch.randint(256, (2, length))
        outputs = []
        for one in (model, compiled):
            loss = one(tokens).logits.square().mean()
            outputs.append([loss, *torch.autograd.grad(loss, list(one.parameters()))])
        assert difference(*outputs) < 1e-6
        counts.append(recorder.compiles)
    assert counts[0] == 1
    assert counts[1] <= 2
    assert counts[2] == counts[1]


def test_blocks_of_two_kinds_are_compiled_twice(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(one_program, "inductor", lambda g, x, *_: recorder(g, x))
    torch._dynamo.reset()
    model = atlas_blocks.compile_blocks(build("2*gated-deltanet+sliding-window-tiny", depth=6))
    with torch.no_grad():
        model(torch.randint(256, (2, 40)))
    assert recorder.compiles == 2


def test_a_model_without_blocks_is_named():
    with pytest.raises(ValueError, match="model: expected a module with blocks of atlas_blocks"):
        atlas_blocks.compile_blocks(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"provider: expected one of .*, got 'fast'"):
        atlas_blocks.compile_blocks(make_block("lstm"), provider="fast")


def test_a_copy_asks_for_the_provider_as_the_model_does(monkeypatch):
    """For an average of the weights, or the best so far: on a GPU another provider rounds
    otherwise."""
    recorder = Recorder()
    monkeypatch.setattr(one_program, "inductor", lambda g, x, *_: recorder(g, x))
    model, arguments = Model(), inputs()
    compiled = atlas_blocks.compile(model, provider="definition", fullgraph=True)
    copies = [copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))]
    copies.append(copy.deepcopy(copies[0]))
    for one in copies:
        torch._dynamo.reset()
        recorder.graphs.clear()
        with torch.no_grad(), use_provider("auto"):
            one.memory.mul_(2)
            y = one(*arguments)
        assert recorder.count("atlas.omega_rule.default") == [1]
        assert list(one.state_dict()) == list(compiled.state_dict())
        # It is a copy: the model's own weights stay.
        torch.testing.assert_close(y, one._orig_mod(*arguments))
        assert (y - model(*arguments)).abs().max() > 0.01


def test_every_pass_has_a_name_and_a_uuid():
    for name, make in backend.PASSES.items():
        one = make("auto")
        assert isinstance(one, GraphPass)
        assert one.name == name
        assert one.uuid() == make("auto").uuid()
    assert backend.make_passes({backend.DISABLE: tuple(backend.PASSES)}) == []
