"""Compiled graphs kept from one process to the next, as a file of torch's cache artifacts."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from atlas_blocks.recipes import files


@contextlib.contextmanager
def compile_cache(folder: Path | None) -> Iterator[None]:
    """What an earlier process compiled is there inside, and what this one compiles is saved at the
    end, however that comes; None for neither.

    The file's name says what the graphs depend on: the versions of torch and Python, the device,
    the sources of this library. Another machine of the same kind may use it. The file holds
    programs: take it from nobody whose code you would not run. Raises ValueError where the folder
    cannot be written.
    """
    if folder is None:
        yield
        return
    files.check_folder("cache", folder)
    path = folder / f"graphs-{key()}.bin"
    if path.exists():
        torch.compiler.load_cache_artifacts(path.read_bytes())
    try:
        yield
    finally:
        saved = torch.compiler.save_cache_artifacts()
        if saved is not None:
            with files.replacing(path) as partial:
                partial.write_bytes(saved[0])


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
