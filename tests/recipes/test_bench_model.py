"""`atlas-blocks bench NAME`: checked before it is timed; what it writes; what moved since."""

import copy
import json

import pytest
import torch
from functorch.compile import make_boxed_func, nop
from marks import slow_as_it_is
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from atlas_blocks.recipes.bench import against, cold, model, subjects
from atlas_blocks.recipes.bench.subjects import MODES, Size
from atlas_blocks.recipes.command_line import main as cli

CPU = torch.device("cpu")
TINY = ("--batch", 2, "--tokens", 12, "--dim", 8, "--heads", 2, "--rounds", 2, "--no-cold")


@pytest.fixture
def run(capsys, monkeypatch):
    """run("AtlasMemory") -> exit code, stdout, stderr; "aot_eager" stands for inductor."""
    monkeypatch.setenv("COLUMNS", "160")
    contenders = (subjects.EAGER, "aot_eager", subjects.ATLAS)
    monkeypatch.setattr(model, "CONTENDERS", contenders)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["bench", *(str(a) for a in arguments)])
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return call


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
@pytest.mark.parametrize(
    ("name", "modes"),
    [
        slow_as_it_is("AtlasMemory", MODES),
        slow_as_it_is("deltanet+sliding-window-tiny", ("training step", "decode")),
        slow_as_it_is("transformer-tiny", ("training step",)),
    ],
)
def test_a_run_writes_every_figure(run, tmp_path, name, modes):
    code, out, err = run(name, *TINY, "--modes", ",".join(modes), "--out", tmp_path)
    assert (code, err) == (0, "")
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["complete"]
    assert record["what"]["name"] == name
    assert ("dim" in record["what"]) == (name in subjects.BLOCKS)
    assert record["versions"]["torch"] == torch.__version__
    rows = {(r["contender"], r["mode"]): r for r in record["rows"]}
    assert [m for c, m in rows if c == "eager"] == list(modes)
    for mode in modes:
        eager, compiled, atlas = (rows[c, mode] for c in ("eager", "aot_eager", "atlas"))
        assert eager["ratio"] == [1, 1, 1]
        for row in (eager, compiled):
            low, high = row["quartiles_ms"]
            assert low <= row["median_ms"] <= high
            tokens = 2 if mode == "decode" else 24
            assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["median_ms"])
            assert 0 < max(row["errors"].values()) < 1e-3
            assert row["peak_bytes"] > 0
        if subjects.unavailable("atlas"):
            assert atlas["problem"]
            assert atlas["problem"] in " ".join(out.split())
            assert atlas["median_ms"] is None


def refused(run, tmp_path, contender, mode):
    """What is said of a contender that is not timed, and its errors."""
    model.CONTENDERS = (subjects.EAGER, contender)
    code, _, err = run("SwiGLU", *TINY, "--modes", mode, "--out", tmp_path)
    row = json.loads((tmp_path / "SwiGLU.json").read_text())["rows"][1]
    assert (code, row["median_ms"]) == (1, None)
    return err, row["errors"]


def test_a_wrong_backend_is_not_timed(run, tmp_path):
    def wrong(graph, inputs):
        return lambda *arguments: [1.01 * t for t in graph(*arguments)]

    torch._dynamo.register_backend(wrong, name="wrong_by_a_hundredth")
    err, errors = refused(run, tmp_path, "wrong_by_a_hundredth", "forward")
    assert "wrong_by_a_hundredth is wrong (forward): the error of its outputs" in err
    assert errors["outputs"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
def test_a_step_of_wrong_gradients_is_not_timed(run, tmp_path):
    """Its loss is right: it is that of the weights before the step."""

    def wrong(graph, inputs):
        def scaled(*arguments):
            return [None if t is None else 1.01 * t for t in graph(*arguments)]

        return make_boxed_func(scaled)

    backend = aot_autograd(fw_compiler=nop, bw_compiler=wrong)
    torch._dynamo.register_backend(backend, name="wrong_backwards")
    err, errors = refused(run, tmp_path, "wrong_backwards", "training step")
    assert "wrong_backwards is wrong (training step): the error of its gradients" in err
    assert errors["gradients"] > 1e-3


def record(**changes):
    row = {"contender": "eager", "mode": "forward", "median_ms": 10.0, "quartiles_ms": [9.0, 11.0]}
    row |= {"samples": 5}
    return {
        "benchmark": "model",
        "what": {"name": "x"},
        "rows": [row | {"peak_bytes": 1000} | changes],
    }


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"median_ms": 10.9, "quartiles_ms": [10.5, 12.0]}, []),
        ({"median_ms": 11.5, "quartiles_ms": [11.1, 12.0]}, ["ms"]),
        ({"median_ms": 8.0, "quartiles_ms": [7.0, 8.9]}, ["ms"]),
        ({"median_ms": 8.0, "quartiles_ms": [7.0, 8.9], "samples": 4}, []),
        ({"median_ms": 12.0, "quartiles_ms": [11.0, 12.5]}, []),
        ({"peak_bytes": 1005}, []),
        ({"peak_bytes": 1100}, ["bytes"]),
        ({"median_ms": None, "quartiles_ms": None, "peak_bytes": None}, []),
        ({"mode": "decode"}, []),
    ],
)
def test_what_moved_is_apart_by_more_than_the_quartiles(changes, moved):
    found = against.moves(record(), record(**changes))
    assert [m.figure for m in found if m.moved] == moved


def test_against_an_earlier_run(run, tmp_path):
    options = (*TINY, "--modes", "forward", "--out", tmp_path, "--rounds", 5)
    assert run("SwiGLU", *options)[0] == 0
    file = tmp_path / "SwiGLU.json"
    earlier = json.loads(file.read_text())
    for row in earlier["rows"]:
        if row["median_ms"] is not None:
            row["quartiles_ms"] = [1e6, 1e6]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(earlier))
    code, out, _ = run("SwiGLU", *options, "--against", old)
    assert code == 0
    moved = out[out.index("what moved beyond noise") :]
    assert "aot_eager" in moved
    assert "ms" in moved
    # Another size, another file, no file.
    code, _, err = run("SwiGLU", *options, "--tokens", 13, "--against", old)
    assert code == 2
    assert err.startswith("atlas-blocks: against: expected a run of ")
    (tmp_path / "odd.json").write_text("[]")
    assert run("SwiGLU", *options, "--against", tmp_path / "odd.json")[0] == 2
    assert run("SwiGLU", *options, "--against", tmp_path / "none.json")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("omeganet-tin",), "name: expected a recipe, a block or kernels, got 'omeganet-tin'; did"),
        (("SwiGLU", "--modes", "backwards"), "modes: expected one of "),
        (("SwiGLU", "--rounds", 0), "rounds: "),
        (("SwiGLU", "--tokens", 0), "tokens: "),
        (("SwiGLU", "--device", "meta"), "device: "),
    ],
)
def test_bad_input_is_named(run, tmp_path, arguments, words):
    code, out, err = run(*arguments, "--out", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(f"atlas-blocks: {words}")
    assert list(tmp_path.iterdir()) == []


def test_errors_see_what_is_wrong_and_what_is_missing():
    true = {"gradients": {"a": torch.ones(3), "b": torch.ones(2)}}
    found = copy.deepcopy(true)
    found["gradients"]["b"][0] = float("nan")
    assert model._difference(model._errors(found, true), {"gradients": 1.0})
    assert not model._difference(model._errors(true, true), {"gradients": 0.0})
    with pytest.raises(model.Unavailable, match="other gradients"):
        model._errors({"gradients": {"a": torch.ones(3)}}, true)


@pytest.mark.parametrize("mode", MODES)
def test_a_subject_runs_the_same_at_every_call(mode):
    """A training step changes the weights of its own copy alone."""
    size = Size(batch=2, tokens=12, dim=8, heads=2)
    block = subjects.build("AtlasMemory", size, CPU)
    before = copy.deepcopy(block.state_dict())
    first = subjects.Subject(block, "eager", mode, size)
    first.call()
    assert isinstance(first.model, nn.Module)
    torch.testing.assert_close(block.state_dict(), before)
    if mode != subjects.TRAINING:
        one, two = first.results(), first.results()
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.slow
def test_a_fresh_process_finds_the_cache_of_another():
    size = Size(batch=1, tokens=8, dim=8, heads=2)
    found = cold.first_calls("SwiGLU", "inductor", subjects.FORWARD, size, CPU)
    assert 0 < found.warm_seconds < found.cold_seconds


def test_a_process_that_fails_says_so():
    size = Size(batch=1, tokens=8, dim=8, heads=2)
    with pytest.raises(cold.Unavailable, match="a fresh process ended with code 1"):
        cold.first_calls("SwiGLU", "no-such-backend", subjects.FORWARD, size, CPU)
