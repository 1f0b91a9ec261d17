"""Compiled graphs kept from one process to the next: Inductor's own cache, in the user's folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch

from atlas_blocks.recipes import files

# Inductor keeps everything below it: traced graphs, code, and what the C++ compiler made of it.
PLACE = "TORCHINDUCTOR_CACHE_DIR"


@contextlib.contextmanager
def compile_cache(folder: Path | None) -> Iterator[None]:
    """What an earlier process compiled is there inside, and what this one compiles is kept; None
    for neither.

    The name of the folder within `folder` says what the graphs depend on: the versions of torch and
    Python, the device, the sources of this library. Another machine of the same kind may use it.
    It holds programs: take them from nobody whose code you would not run. Raises ValueError where
    the folder cannot be written.

    (torch.compiler.save_cache_artifacts lacks what the C++ compiler made: with it the second
    process on a CPU compiled every program again.)
    """
    if folder is None:
        yield
        return
    files.check_folder("cache", folder)
    before = os.environ.get(PLACE)
    os.environ[PLACE] = str((folder / f"graphs-{key()}").absolute())
    try:
        with _traced_graphs_kept():
            yield
    finally:
        if before is None:
            os.environ.pop(PLACE, None)
        else:
            os.environ[PLACE] = before


def _traced_graphs_kept() -> contextlib.AbstractContextManager[Any]:
    """AOTAutograd's too, of graphs with an autograd.Function in them. What it does is in the graph,
    and where it is ours in `sources` as well."""
    name = "autograd_cache_allow_custom_autograd_functions"
    if not hasattr(functorch, name):
        return contextlib.nullcontext()
    return functorch.patch({name: True})


@functools.cache
def key() -> str:
    """Of this process's graphs."""
    parts = [torch.__version__, platform.python_version(), platform.machine(), _device()]
    digest = hashlib.sha256(repr(parts).encode())
    for file in sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def sources() -> list[Path]:
    """What is compiled, what compiles it, and what serves its nodes."""
    import atlas_blocks
    from atlas_blocks import compile_passes, kernels

    folders = (Path(m.__path__[0]) for m in (atlas_blocks, compile_passes, kernels))
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return torch.backends.cpu.get_cpu_capability()
