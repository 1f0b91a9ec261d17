"""Files: written whole or not at all, and places tried before the work that is to fill them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atlas_blocks import check
from atlas_blocks.recipes.describe import human


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes the place of `path` at the end, all at once.

    Where anything fails, or the process is killed, `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # As any new file may be read: safetensors makes its own for this user alone.
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        # On the disk before it has its name: a power cut must not leave the name to nothing.
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have what was written to a file, or to the list of a folder, on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_json(path: Path, record: Any) -> None:
    """In one atomic replacement."""
    with replacing(path) as partial:
        partial.write_text(as_json(record))


def as_json(record: Any) -> str:
    """As `write_json` writes it."""
    return json.dumps(record, indent=2) + "\n"


def read_json(name: str, path: Path) -> dict[str, Any]:
    """The record that `write_json` wrote. Raises ValueError where the file holds none."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: cannot read {path}: {error}") from error
    if not isinstance(record, dict):
        check.fail(name, f"results in {path}", type(record).__name__)
    return record


def check_writable(name: str, path: Path, room: int = 0) -> None:
    """Make the folder of `path` and try to write there. room: bytes that will be needed.

    Raises ValueError that names the argument, the path and why it cannot be written.
    """
    if path.is_dir():
        check.fail(name, "a file to write", f"{path}, a folder")
    check_folder(name, path.parent, room)


def check_folder(name: str, folder: Path, room: int = 0) -> None:
    """The same for a folder in which files will be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"{name}: cannot write in {folder}: {error.strerror or error}") from error
    if free < room:
        check.fail(name, f"a disk with {human(room, 'B')} free", f"{folder}, {human(free, 'B')}")


@contextlib.contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Where what is done inside fails before it has written anything, a folder that was made to try
    is taken away again."""
    there = folder.exists()
    try:
        yield
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()
        raise
