"""`atlas-blocks bench AtlasMemory --peers`: who takes part, what it writes, what it refuses."""

import importlib.util
import json
import sys
import types

import pytest
import torch
from torch import nn

from atlas_blocks.recipes.bench import model, peers, subjects
from atlas_blocks.recipes.bench.subjects import Size
from atlas_blocks.recipes.command_line import main as cli

CPU = torch.device("cpu")
TINY = ("AtlasMemory", "--peers", "--batch", 1, "--tokens", 70, "--dim", 8, "--heads", 2)
INSTALLED = importlib.util.find_spec("titans_pytorch") is not None


class MemoryMLP(nn.Module):
    """The arguments of titans-pytorch's class of this name."""

    def __init__(self, dim: int, depth: int, expansion_factor: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(dim, dim) for _ in range(depth)))


class NeuralMemory(nn.Module):
    """The arguments of titans-pytorch's, and that it returns a pair."""

    def __init__(self, *, dim, chunk_size, batch_size, heads, dim_head, model) -> None:
        super().__init__()
        assert (chunk_size, dim_head * heads) == (peers.CHUNK, dim)
        assert batch_size in (None, peers.CHUNK)
        self.heads, self.model = heads, model

    def forward(self, x):
        return self.model.layers(x.unflatten(-1, (self.heads, -1))).flatten(-2), object()


@pytest.fixture
def titans(monkeypatch):
    """The true library where it is installed, else what has its interface."""
    if not INSTALLED:
        module = types.ModuleType("titans_pytorch")
        module.MemoryMLP, module.NeuralMemory = MemoryMLP, NeuralMemory
        monkeypatch.setitem(sys.modules, "titans_pytorch", module)


@pytest.fixture
def run(capsys, monkeypatch):
    """run("AtlasMemory") -> exit code, stdout, stderr; "aot_eager" stands for inductor."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(model, "CONTENDERS", (subjects.EAGER, "aot_eager"))

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["bench", *(str(a) for a in arguments)])
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    return call


@pytest.mark.filterwarnings("ignore")  # the compiler and the other library warn of their own parts
@pytest.mark.slow(compile_nodes=False)
@pytest.mark.usefixtures("titans")
def test_a_run_writes_every_figure(run, tmp_path):
    options = (*TINY, "--modes", "forward", "--rounds", 2, "--out", tmp_path)
    code, out, err = run(*options)
    assert (code, err) == (0, "")
    assert "titans-pytorch / it" in out
    file = tmp_path / "AtlasMemory_peers.json"
    assert file.with_suffix(".png").stat().st_size > 1000
    record = json.loads(file.read_text())
    assert record["complete"]
    assert record["what"].items() >= {"peers": True, "chunk": 64, "dim": 8, "tokens": 70}.items()
    rows = {(r["mode"], r["contender"]): r for r in record["rows"]}
    for memory in ("matrix", "mlp"):
        names = [name for mode, name in rows if mode == f"{memory}, forward"]
        assert names[0] == "titans-pytorch"
        assert len(names) == (9 if memory == "matrix" else 8)
        for name in names:
            row = rows[f"{memory}, forward", name]
            if name.startswith("fla"):
                assert row["problem"] == "its kernels need a CUDA device"
                continue
            low, median, high = row["ratio"]
            assert low <= median <= high
            assert row["samples"] == 2
            assert row["peak_bytes"] > 0
            assert bool(row["errors"]) == name.startswith("AtlasMemory")
        assert rows[f"{memory}, forward", "titans-pytorch"]["ratio"] == [1, 1, 1]
    assert run(*options, "--against", file)[0] == 0
    assert run(*options, "--tokens", 71, "--against", file)[0] == 2


@pytest.mark.usefixtures("titans")
def test_all_have_the_same_memory_and_gradients_everywhere():
    size = Size(batch=1, tokens=70, dim=8, heads=2)
    for memory, weights in peers.MEMORIES.items():
        found = peers.entrants(memory, size, CPU, ())
        ours = [e for e in found if e.checked]
        assert [len(list(e.model.memory.parameters())) for e in ours] == [weights, weights]
        assert [e.model.config.rule.window for e in ours] == [peers.WINDOW, 1]
        for entrant in found:
            if entrant.model is not None:
                subject = subjects.Subject(entrant.model, subjects.EAGER, subjects.BOTH, size)
                gradients = subject.backward()
                assert gradients
                assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.usefixtures("titans")
def test_what_unrolls_is_not_compiled_at_any_length():
    for tokens, problems in ((512, 0), (513, 1)):
        size = Size(batch=1, tokens=tokens, dim=8, heads=2)
        found = peers.entrants("mlp", size, CPU, ("inductor",))
        assert [e.name for e in found if "chunks" in e.problem] == [
            "titans-pytorch, batch_size=64, inductor"
        ] * problems


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.usefixtures("titans")
def test_a_peer_that_is_not_finite_is_not_timed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(peers.Foreign, "forward", lambda self, x: (x / 0, None))
    run(*TINY, "--modes", "forward", "--rounds", 1, "--out", tmp_path)
    rows = json.loads((tmp_path / "AtlasMemory_peers.json").read_text())["rows"]
    for row in rows:
        foreign = row["contender"].startswith("titans-pytorch")
        assert (row["problem"] == "its results are not finite") == foreign
        assert row["ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("SwiGLU", "--peers"), "peers: expected the name AtlasMemory, got 'SwiGLU'"),
        ((*TINY, "--modes", "decode"), "modes: expected one of forward, forward+backward, got"),
    ],
)
def test_bad_input_is_named(run, tmp_path, arguments, words):
    code, out, err = run(*arguments, "--out", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(f"atlas-blocks: {words}")


def test_a_missing_package_is_one_line_that_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    code, out, err = run(*TINY, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    words = "peers: titans-pytorch is not installed (pip install 'atlas-blocks[bench]')"
    assert err == f"atlas-blocks: {words}\n"
    assert not (tmp_path / "out").exists()
