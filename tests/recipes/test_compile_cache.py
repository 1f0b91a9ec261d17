"""What one process compiled another finds, and only where nothing that matters has changed."""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_blocks.recipes import build, checkpoint, compile_cache
from atlas_blocks.recipes.command_line import main as cli
from atlas_blocks.recipes.command_line import measuring

PROGRAM = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from atlas_blocks import AtlasMemory, AtlasMemoryConfig, SwiGLU
from atlas_blocks.recipes.compile_cache import compile_cache

torch.manual_seed(0)
config = AtlasMemoryConfig(memory="matrix", update="gd", feature_map="identity", window=2)
layer = SwiGLU(16) if sys.argv[2] == "mlp" else AtlasMemory(16, 2, config)
x = torch.randn(1, 20, 16)
with compile_cache(Path(sys.argv[1])):
    layer.compile(backend="atlas")
    y, _ = layer(x)
    y.sum().backward()
torch.testing.assert_close(y, layer.forward(x)[0])
graphs, traced = counters["inductor"], counters["aot_autograd"]
print(traced["autograd_cache_hit"], graphs["fxgraph_cache_miss"], traced["autograd_cache_bypass"])
"""


def run(folder: Path, home: Path, model: str = "memory") -> tuple[int, int]:
    """Traced graphs that are found, and compiled ones that are not, in a process whose own cache is
    `home`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, model],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hits, misses, bypassed = map(int, done.stdout.split()[-3:])
    assert bypassed == 0
    return hits, misses


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Not even on a machine whose own cache is empty; nor where another model came between. No
    graph, and no C++."""
    cache = tmp_path / "cache"

    def programs() -> set[Path]:
        return set(cache.rglob("*.so"))

    hits, misses = run(cache, tmp_path / "first")
    assert hits == 0
    assert misses >= 2
    assert run(cache, tmp_path / "second", "mlp") == (0, 2)
    (place,) = cache.iterdir()
    before = programs()
    # A cache that has moved is as good.
    cache = tmp_path / "elsewhere"
    place.parent.rename(cache)
    assert run(cache, tmp_path / "third") == (1, 0)
    assert {p.relative_to(cache) for p in programs()} == {
        p.relative_to(tmp_path / "cache") for p in before
    }
    for home in ("first", "second", "third"):
        assert not list((tmp_path / home).rglob("*.so"))


def test_the_name_knows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the kernels and of the passes too."""
    names = {"/".join(file.parts[-2:]) for file in compile_cache.sources()}
    assert {"omega/walk.py", "compile_passes/lower_ops.py", "kernels/matrix.py"} <= names
    before = compile_cache.key()
    copy = tmp_path / "walk.py"
    copy.write_text("changed")
    monkeypatch.setattr(compile_cache, "sources", lambda: [copy])
    compile_cache.key.cache_clear()
    assert compile_cache.key() != before
    compile_cache.key.cache_clear()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="cache: cannot write in"),
        compile_cache.compile_cache(tmp_path / "file"),
    ):
        raise AssertionError("it is checked first")


def test_inductors_own_place_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "/elsewhere"):
        if before is None:
            monkeypatch.delenv(compile_cache.PLACE, raising=False)
        else:
            monkeypatch.setenv(compile_cache.PLACE, before)
        with contextlib.suppress(RuntimeError), compile_cache.compile_cache(tmp_path):
            inside = Path(os.environ[compile_cache.PLACE])
            assert inside == tmp_path / f"graphs-{compile_cache.key()}"
            raise RuntimeError
        assert os.environ.get(compile_cache.PLACE) == before


# --- of commands --------------------------------------------------------------------------------


class Recorder(list[str]):
    """Stands for `compile_cache`, and notes what happens in which order."""

    @contextlib.contextmanager
    def __call__(self, folder: Path | None):
        self.append(f"enter {folder}")
        yield
        self.append("exit")


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
    return left.value.code


def test_bench_runs_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas_blocks.recipes.bench import kernels, model

    events = Recorder()
    monkeypatch.setattr(measuring, "compile_cache", events)
    for module in (model, kernels):
        monkeypatch.setattr(module, "run", lambda *_: events.append("run") or "")
    options = ("--cache", tmp_path, "--device", "cpu")
    assert command("bench", "SwiGLU", *options) == 0
    assert command("bench", "kernels", *options) == 0
    assert events == [f"enter {tmp_path}", "run", "exit"] * 2


def test_a_server_saves_before_a_signal_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    from atlas_blocks.recipes.serving import server

    async def shut(self: object, sockets: object = None) -> None:
        events.append("shut down")

    def run(self: uvicorn.Server, sockets: object = None) -> None:
        events.append("serve")
        asyncio.run(self.shutdown())
        events.append("signal")

    events = Recorder()
    monkeypatch.setattr(server, "compile_cache", events)
    monkeypatch.setattr(uvicorn.Server, "shutdown", shut)
    monkeypatch.setattr(uvicorn.Server, "run", run)
    checkpoint.save(tmp_path / "model", build("atlas-tiny", depth=1))
    assert command("serve", tmp_path / "model", "--port", 0, "--cache", tmp_path / "graphs") == 0
    assert events == [f"enter {tmp_path / 'graphs'}", "serve", "shut down", "exit", "signal"]


@pytest.mark.parametrize("arguments", [("bench", "SwiGLU"), ("serve", "model")])
def test_a_command_names_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "serve" in arguments:
        checkpoint.save(Path("model"), build("atlas-tiny", depth=1))
    Path("file").write_text("")
    assert command(*arguments, "--cache", "file") == 2
    assert "cache: cannot write in" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_bench_compiles_nothing(tmp_path: Path) -> None:
    """On a machine whose own cache is empty it finds all graphs."""
    found = []
    options = ["--modes", "forward", "--no-cold", "--rounds", "1", "--dim", "8", "--tokens", "8"]
    for home in ("first", "second"):
        program = [sys.executable, "-m", "atlas_blocks.recipes", "bench", "SwiGLU", *options]
        subprocess.run(
            [*program, "--cache", tmp_path / "cache", "--out", tmp_path / home],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "home" / home)},
            capture_output=True,
            check=True,
        )
        found.append(sorted((tmp_path / "cache").rglob("*.so")))
    assert found[0]
    assert found[0] == found[1]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with compile_cache.compile_cache(None):
        pass
    assert not list(tmp_path.iterdir())
