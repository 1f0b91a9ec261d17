"""Compiled graphs kept from one process to the next, as a file of torch's cache artifacts."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from atlas_blocks.recipes import files


@contextlib.contextmanager
def compile_cache(folder: Path | None) -> Iterator[None]:
    """What an earlier process compiled is there inside, and what this one compiles is saved at the
    end, however that comes; None for neither.

    The files' names say what the graphs depend on: the versions of torch and Python, the device,
    the sources of this library. Another machine of the same kind may use them. They hold
    programs: take them from nobody whose code you would not run. Raises ValueError where the folder
    cannot be written.
    """
    if folder is None:
        yield
        return
    files.check_folder("cache", folder)
    known: set[str] = set()
    for path in sorted(folder.glob(f"graphs-{key()}-*.bin")):
        known |= _loaded(path)
    try:
        yield
    finally:
        saved = torch.compiler.save_cache_artifacts()
        found = set() if saved is None else _graphs(saved[1])
        # A file for what is new: models that share a folder do not take each other's place.
        if saved is not None and not found <= known:
            digest = hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]
            with files.replacing(folder / f"graphs-{key()}-{digest}.bin") as partial:
                partial.write_bytes(hashlib.sha256(saved[0]).digest() + saved[0])


def _loaded(path: Path) -> set[str]:
    """What the artifacts of a file are of. One that is damaged is said to be, and taken away."""
    checksum, saved = (content := path.read_bytes())[:32], content[32:]
    # Looked at first: of what it cannot read torch logs a traceback, and a graph may load damaged.
    whole = hashlib.sha256(saved).digest() == checksum
    info = torch.compiler.load_cache_artifacts(saved) if whole else None
    if info is None:
        words = "the file of compiled graphs is damaged; it is removed, and they are compiled anew"
        print(f"{path}: {words}", file=sys.stderr)
        path.unlink(missing_ok=True)
    return _graphs(info)


def _graphs(info: Any) -> set[str]:
    """What artifacts are of."""
    artifacts = {} if info is None else info.artifacts
    return {f"{kind} {name}" for kind, names in artifacts.items() for name in names}


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
