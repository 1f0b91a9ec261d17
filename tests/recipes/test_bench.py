"""`atlas-blocks bench kernels` on a CPU: what it writes, and when it refuses to time anything."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from atlas_blocks import ops
from atlas_blocks.graph import providers
from atlas_blocks.recipes.bench import contenders, kernels, measure
from atlas_blocks.recipes.bench.contenders import (
    PRODUCT,
    Contender,
    Shape,
    Subject,
    Variant,
    leaves_of,
    served_by,
)
from atlas_blocks.recipes.command_line import main as cli

CPU = torch.device("cpu")
TINY = ("--device", "cpu", "--batch", 1, "--tokens", 96, "--heads", 1, "--dims", "8,4")
TINY += ("--rounds", 2, "--quick", "--no-compiled")
DEFINITION = providers.find("omega_rule", "definition")


@pytest.fixture
def run(capsys, monkeypatch):
    """run("--device", "cpu") -> exit code, stdout, stderr of `bench kernels`."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["bench", "kernels", *(str(a) for a in arguments)])
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return call


@pytest.fixture
def register(monkeypatch):
    """Replace the providers of the rule by one: the definition with changed functions."""
    monkeypatch.setitem(providers._PROVIDERS, "omega_rule", {})

    def register(name, **changes):
        provider = dataclasses.replace(DEFINITION, name=name, **changes)
        ops.register_provider("omega_rule", provider, automatic_on=())

    return register


def test_a_run_on_the_cpu_writes_every_figure(run, register, tmp_path):
    register("twin")
    register("picky", supports=lambda call: "it is Tuesday")
    code, out, err = run(*TINY, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert "on the CPU, by the wall clock" in out
    assert "picky (matrix, gd): it is Tuesday" in out
    assert (tmp_path / "kernels.png").stat().st_size > 1000

    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["complete"]
    assert record["machine"]["device"] == "cpu"
    assert record["what"]["timer"] == "wall clock, on a CPU"
    assert record["versions"]["torch"] == torch.__version__
    assert {"date", "commit"} <= set(record)
    checked = [v for v in record["gate"]["verdicts"] if v["name"] == "twin"]
    assert len(checked) == sum(not extra for _, extra in contenders.VARIANTS)
    assert all(v["passed"] for v in checked)
    assert checked[0]["errors"] == pytest.approx(checked[0]["definition"], rel=0.05)
    assert {"y", "memory[0]", "the gradient of theta"} <= set(checked[0]["errors"])
    assert all(
        v["refusal"] == "it is Tuesday" for v in record["gate"]["verdicts"] if v["name"] == "picky"
    )

    rows = record["rows"]
    assert {r["part"] for r in rows} == {"main"}
    assert {r["shape"]["dim"] for r in rows} == {8}
    timed = {(r["contender"], r["what"], r["direction"]): r for r in rows if not r["problem"]}
    for direction in (measure.FORWARD, measure.BOTH):
        product = timed["matrix product", PRODUCT.what, direction]
        assert product["share_of_product"] == 1
        assert product["tokens_per_s"] is None
        for variant, extra in contenders.VARIANTS:
            names = [n for n, w, d in timed if (w, d) == (str(variant), direction)]
            assert names == ([] if extra else ["definition", "twin"])
        for (_, _, way), row in timed.items():
            if way == direction:
                low, high = row["quartiles_ms"]
                assert low <= row["median_ms"] <= high
                assert row["samples"] == 2
    definition, twin = (timed[n, "matrix, gd", measure.BOTH] for n in ("definition", "twin"))
    assert definition["flops"] == twin["flops"] > 0
    # A contender without figures says why.
    assert all(r["problem"] for r in rows if r["median_ms"] is None)
    assert {r["contender"] for r in rows} >= {"fla", "FlashAttention", "titans-pytorch", "picky"}


def test_the_kernels_pass_the_gate_and_are_not_timed_by_the_interpreter(tmp_path):
    """Under Triton's interpreter here, on the device where there is one."""
    if torch.cuda.is_available():
        pytest.skip("the gate on a GPU is `bench kernels` itself")
    pytest.importorskip("triton")
    candidate = contenders.Candidate("triton", Variant(), served_by("triton"), False)
    shape = kernels.plan(CPU, **dict.fromkeys(OPTIONS, None), **FLAGS).gate_shape
    (verdict,) = kernels.gate.check([candidate], shape, CPU)
    assert verdict.errors
    assert not verdict.problem
    with pytest.raises(contenders.Unavailable, match="interpreter"):
        candidate.contender().build(shape, CPU)


def wrong_forward(*arguments):
    y, *rest = DEFINITION.forward(*arguments)
    return [1.1 * y, *rest]


def wrong_backward(*arguments):
    first, *rest = DEFINITION.backward(*arguments)
    return [float("nan") * first, *rest]


def broken(*arguments):
    raise RuntimeError("no such tile\nand a trace")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forward": wrong_forward}, "bad is wrong (matrix, gd): the error of y against float64"),
        ({"backward": wrong_backward}, "the error of the gradient of q against float64 is nan"),
        ({"forward": broken}, "bad fails (matrix, gd): RuntimeError: no such tile;"),
    ],
)
def test_a_wrong_provider_stops_everything(run, register, tmp_path, changes, words):
    register("bad", **changes)
    code, _, err = run(*TINY, "--out", tmp_path)
    assert code == 1
    assert err.startswith("atlas-blocks: ")
    assert words in err
    assert err.endswith("nothing was timed\n")
    assert len(err.splitlines()) == 1
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["rows"] == []
    assert not record["complete"]
    assert not record["gate"]["verdicts"][0]["passed"]
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.json"]


def test_without_a_gpu_it_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err == (
        "atlas-blocks: device: cannot use 'cuda': no CUDA device is here "
        "(--device cpu runs the same by the wall clock, small)\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--dims", "64,x"), "dims"),
        (("--dims", ""), "dims"),
        (("--dims", "0"), "dims"),
        (("--heads", 0), "heads"),
        (("--batch", -1), "batch"),
        (("--tokens", 0), "tokens"),
        (("--rounds", 0), "rounds"),
        (("--device", "abacus"), "device"),
        (("--device", "meta"), "device"),
    ],
)
def test_bad_options_are_named(run, monkeypatch, tmp_path, arguments, name):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--device", "cpu", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"atlas-blocks: {name}: ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


OPTIONS = ("dims", "heads", "batch", "tokens", "rounds")
FLAGS = {"everything": False, "quick": False, "compiled": True}


def test_on_a_gpu_the_sweep_keeps_the_number_of_tokens():
    plan = kernels.plan(torch.device("cuda"), **dict.fromkeys(OPTIONS, None), **FLAGS)
    shapes = plan.shapes()
    assert [s for p, s in shapes if p == "main"] == [Shape(4, 8192, 16, d) for d in (64, 128)]
    sweep = [s for p, s in shapes if p == "sweep"]
    assert [s.tokens for s in sweep] == [1024, 2048, 4096, 8192, 16384, 32768]
    assert {s.batch * s.tokens for s in sweep} == {32768}
    assert {s.dim for s in sweep} == {64}
    everything = dataclasses.replace(plan, everything=True).shapes()
    assert {s.dim for p, s in everything if p == "sweep"} == {64, 128}
    assert dataclasses.replace(plan, quick=True).shapes() == [("main", Shape(4, 8192, 16, 64))]
    assert plan.gate_shape == Shape(1, 512, 2, 64)


@pytest.mark.slow(compile_nodes=False)
def test_a_contender_that_fails_is_a_row():
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def subject(call):
        return lambda shape, device: Subject(call, [], lambda both: None)

    def absent(shape, device):
        raise contenders.Unavailable("not installed")

    all_of_them = [
        Contender("large", "", subject(out_of_memory)),
        Contender("broken", "", subject(broken)),
        Contender("absent", "", absent),
        Contender("infinite", "", subject(lambda: torch.full((2,), float("inf")))),
        Contender("fine", "", subject(lambda: torch.ones(2))),
    ]
    steps = []
    rows = measure.compare(
        all_of_them,
        Shape(1, 8, 1, 4),
        measure.Meter(CPU),
        part="main",
        rounds=3,
        on_step=steps.append,
    )
    assert len(steps) == 2 * (len(all_of_them) + 3)
    problems = [r.problem for r in rows if r.direction == measure.FORWARD]
    assert problems == [
        "out of memory",
        "RuntimeError: no such tile",
        "not installed",
        "its results are not finite",
        "",
    ]
    assert rows[-1].samples == 3
    assert rows[-1].tflops is None


@pytest.mark.parametrize("variant", [v for v, _ in contenders.VARIANTS], ids=str)
def test_flops_are_what_torch_counts_for_the_op(register, variant):
    register("twin")
    ops.register_flop_formulas()
    a = variant.arguments(Shape(2, 70, 1, 4), CPU, torch.float32, torch.float32)
    a, leaves = leaves_of(a)
    for both in (False, True):
        with FlopCounterMode(display=False) as counter:
            y, _ = served_by("twin")(a)
            if both:
                torch.autograd.grad(y.sum(), list(leaves.values()))
        assert contenders.rule_flops(a, both) == counter.get_total_flops()


def results(run, a, leaves):
    y, memory = run(a)
    outputs = [y, *memory]
    loss = sum(t.square().sum() for t in outputs)
    return outputs + list(torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
def test_the_compiled_contender_is_the_definition():
    a = contenders.COMPILED_VARIANT.arguments(
        Shape(1, 150, 2, 16), CPU, torch.float32, torch.float32
    )
    a, leaves = leaves_of(a)
    (compiled,) = [
        c.run for c in contenders.candidates(CPU, compiled=True) if c.name == contenders.COMPILED
    ]
    true, found = (results(f, a, leaves) for f in (served_by("definition"), compiled))
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
