"""explain: what it says of models that break, recompile, and do neither."""

from pathlib import Path

import pytest
import torch
from helpers import DIM, Layers, Recorder, draw, make_block
from helpers import omega_rule_op as omega_rule
from rich.console import Console
from torch import nn
from torch._dynamo import utils as dynamo

from atlas_blocks import Rule
from atlas_blocks.compile_passes import explain
from atlas_blocks.compile_passes.survey import Survey
from atlas_blocks.omega.flops import rule_flops
from atlas_blocks.omega.op import Settings
from atlas_blocks.ops import use_provider

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_node():
    """The rule as one node, for which Inductor compiles no C++."""
    with use_provider("definition"):
        yield


class Breaking(nn.Module):
    """Products around a line that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        y = x @ self.w
        print("not traceable")  # the deliberate break
        return y @ self.w


class Whole(nn.Module):
    """The rule alone."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.eye(4).repeat(2, 1, 1))

    def forward(self, x, gate, gamma):
        gates = {"alpha": gate, "eta": gate, "theta": None, "gamma": gamma}
        return omega_rule(x, x, x, **gates, weights=[self.memory], chunk_size=8)[0]


def whole_inputs(length):
    return torch.rand(1, length, 2, 4), torch.rand(1, length, 2), torch.rand(1, length, 2, 3)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.rstrip().endswith(text))


@pytest.mark.slow(compile_nodes=False)
def test_a_graph_break_is_named_by_file_and_line(capsys):
    report = explain(Breaking(), torch.randn(3, 4))
    (found,) = report.breaks
    assert (found.file, found.line) == (__file__, line_of("# the deliberate break"))
    assert "print" in found.code
    assert "print" in found.reason
    assert "move it out" in found.hint
    assert [g.call for g in report.graphs] == [0, 0]
    console = Console(width=500, record=True)
    console.print(report)
    text = console.export_text()
    assert "1 graph break" in text
    assert Path(__file__).name in text


@pytest.mark.slow(compile_nodes=False)
def test_recompiles_are_found_though_torch_forgets_old_compiles():
    """It keeps the last 64, here 8: later reports begin with as many as there may be."""
    dynamo.set_compilation_metrics_limit(8)
    try:
        reports = [explain(Whole(), *map(whole_inputs, (20, 28))) for _ in range(4)]
    finally:
        dynamo.set_compilation_metrics_limit(dynamo.DEFAULT_COMPILATION_METRICS_LIMIT)
    assert [len(r.recompiles) for r in reports] == 4 * [1]


def test_ops_providers_passes_work_and_recompiles():
    model, lengths = Whole(), (20, 28, 36)
    report = explain(model, *map(whole_inputs, lengths))
    assert report.breaks == ()
    # The first length, then any; the third finds a graph.
    assert [(g.call, g.dynamic) for g in report.graphs] == [(0, False), (1, True)]
    (recompile,) = report.recompiles
    assert recompile.call == 1
    assert recompile.function == "forward"
    assert "size mismatch" in recompile.guard
    assert "20" in recompile.guard
    assert [(u.graph, u.direction, u.op, u.provider) for u in report.ops] == [
        (graph, way, "omega_rule", "definition")
        for graph in (0, 1)
        for way in ("forward", "backward")
    ]
    assert "cpu" in report.ops[0].reason
    assert "triton" in report.ops[0].refusals
    assert [(p.graph, p.direction, p.name, p.matches) for p in report.passes] == [
        (graph, way, name, 0)
        for graph in (0, 1)
        for way, name in (
            ("forward", "select_attention"),
            ("forward", "lower_ops"),
            ("forward", "clean_up"),
            ("backward", "lower_ops"),
            ("backward", "clean_up"),
        )
    ]
    assert len(report.compile_seconds) == 3
    assert min(report.compile_seconds[:2]) > 0
    # q, k, v; alpha, eta, gamma; the weight; T as it was when the graph was traced.
    for graph, length in zip(report.graphs, lengths, strict=False):
        (work,) = [w for w in report.work if (w.graph, w.op) == (graph.number, "atlas.omega_rule")]
        shapes = [t.shape for t in (*3 * [torch.empty(1, length, 2, 4)], *whole_inputs(length))]
        shapes = [*shapes[:3], shapes[4], shapes[4], shapes[5], (2, 4, 4)]
        settings = Settings(False, False, "identity", (), Rule(chunk_size=8, window=shapes[5][-1]))
        assert work.flops == rule_flops(tuple(tuple(s) for s in shapes), settings)
        assert work.bytes >= 4 * sum(torch.Size(s).numel() for s in shapes)
        assert work.bound in ("compute", "memory")


@pytest.mark.slow
def test_an_inlined_rule_is_told_of():
    with use_provider("auto"):
        report = explain(Whole(), *map(whole_inputs, (20, 28, 36)))
    assert [(g.call, g.dynamic) for g in report.graphs] == [(0, False), (1, True)]
    # What is compiled of the walk itself is no recompile of the model.
    assert [r.function for r in report.recompiles] == ["forward"]
    assert {(u.op, u.provider) for u in report.ops} == {("omega_rule", "inline")}
    assert {w.op for w in report.work} >= {"atlas.omega_walk", "atlas.omega_walk_backward"}


@pytest.mark.slow
def test_an_inlined_token_is_told_of_for_every_layer():
    model, x = Layers(make_block("memory-plain"), make_block("memory-plain")), draw(2, 4, DIM)
    with torch.no_grad():
        states = [block(x)[1] for block in model.blocks]
    # Parameters that a function has from outside require gradients too.
    with use_provider("auto"):
        report = explain(lambda *inputs: model(*inputs), (x[:, :1], states))
    assert [(u.direction, u.op, u.provider) for u in report.ops] == [
        (way, "omega_rule", "inline") for way in ("forward", "backward") for _ in range(2)
    ]


@pytest.mark.slow(compile_nodes=False)
def test_the_graph_does_not_grow_with_the_length():
    model = Whole()
    short, long = (explain(model, whole_inputs(length)).graphs for length in (16, 512))
    assert [(g.forward_nodes, g.backward_nodes) for g in short] == [
        (g.forward_nodes, g.backward_nodes) for g in long
    ]


def test_functions_keywords_and_models_without_gradients():
    w = torch.randn(4, 4)
    report = explain(lambda x: x @ w, {"x": torch.randn(2, 4)})
    assert [(g.forward_nodes, g.backward_nodes) for g in report.graphs] == [(1, 0)]
    assert {w.op for w in report.work} == {"aten.mm"}
    assert report.work[0].flops == 2 * 2 * 4 * 4
    with pytest.raises(ValueError, match="model: expected a module or a function, got int"):
        explain(3, torch.randn(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inputs: expected tensors"):
        explain(lambda x: x, (3,))


@pytest.mark.slow(compile_nodes=False)
def test_parameters_keep_their_gradients():
    model = Breaking()
    explain(model, torch.randn(3, 4))
    assert model.w.grad is None


def test_an_op_without_a_flop_formula_is_not_given_a_side():
    survey = Survey(0, balance=10.0)
    with torch.no_grad():
        torch.compile(make_block("as-context"), backend=Recorder(survey), fullgraph=True)(
            draw(1, 30, DIM)
        )
    by_name = {w.op: w for w in survey.work}
    assert by_name["atlas.memory_as_context"].flops is None
    assert by_name["atlas.memory_as_context"].bound == "unknown"
    assert by_name["aten.mm"].flops


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.usefixtures("nodes_compile")
def test_what_nodes_compile_for_themselves_is_not_the_model_s():
    report = explain(make_block("memory-mlp-muon-sketch"), draw(1, 20, DIM), draw(2, 20, DIM))
    assert [r.function for r in report.recompiles] == ["forward"]
