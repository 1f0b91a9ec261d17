"""What one process compiled another finds, and only where nothing that matters has changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_blocks.recipes import compile_cache

PROGRAM = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from atlas_blocks import AtlasMemory, AtlasMemoryConfig
from atlas_blocks.recipes.compile_cache import compile_cache

torch.manual_seed(0)
config = AtlasMemoryConfig(memory="matrix", update="gd", feature_map="identity", window=2)
layer, x = AtlasMemory(16, int(sys.argv[2]), config), torch.randn(1, 20, 16)
with compile_cache(Path(sys.argv[1])):
    layer.compile(backend="atlas")
    y, _ = layer(x)
    y.sum().backward()
torch.testing.assert_close(y, layer.forward(x)[0])
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def run(folder: Path, home: Path, heads: int = 2) -> tuple[int, int]:
    """Hits and misses in a process whose own cache of compiled graphs is `home`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, str(heads)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hits, misses = done.stdout.split()[-2:]
    return int(hits), int(misses)


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Not even on a machine whose own cache is empty; nor where another model came between."""
    cache = tmp_path / "cache"
    hits, misses = run(cache, tmp_path / "first")
    assert hits == 0
    assert misses >= 2
    assert run(cache, tmp_path / "second", heads=4) == (0, misses)
    assert len(list(cache.iterdir())) == 2
    assert run(cache, tmp_path / "third") == (misses, 0)
    assert len(list(cache.iterdir())) == 2  # nothing new, nothing written


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


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with compile_cache.compile_cache(None):
        pass
    assert not list(tmp_path.iterdir())
