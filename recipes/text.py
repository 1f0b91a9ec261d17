"""Text as bytes: the Python standard library's sources, or any folder or file.

B batch, L length of a crop.
"""

from __future__ import annotations

import dataclasses
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from atlas_blocks import check

VOCAB_SIZE = 256
HELD_OUT_ONE_IN = 20
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """uint8 bytes to train on and bytes no training crop can touch, and where they came from."""

    train: Tensor
    held_out: Tensor
    source: str


def _join(files: list[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def _corpus(root: Path, files: list[Path], source: str) -> Corpus:
    """Held out by file: a hash of the path decides, so that the split does not depend on order."""
    split: tuple[list[Path], list[Path]] = ([], [])
    for file in sorted(files):
        name = file.relative_to(root).as_posix()
        split[zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0].append(file)
    if not (split[0] and split[1]):
        check.fail("text", "a folder with enough files to hold some out", f"{len(files)} files")
    return Corpus(_join(split[0]), _join(split[1]), source)


def standard_library() -> Corpus:
    """The .py files of the running Python's standard library, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        f for f in root.rglob("*.py") if not SKIPPED_FOLDERS & set(f.relative_to(root).parts[:-1])
    ]
    return _corpus(root, files, f"Python {sysconfig.get_python_version()} standard library")


def load_text(path: Path | None) -> Corpus:
    """A folder (split by file), one file (its last twentieth held out), or None: the library.

    Raises ValueError where there is nothing to read.
    """
    if path is None:
        return standard_library()
    if path.is_dir():
        return _corpus(path, [f for f in path.rglob("*") if f.is_file()], path.name)
    if not path.is_file():
        check.fail("text", "a folder or a file", f"{path} (not found)")
    data = torch.frombuffer(bytearray(path.read_bytes() or b" "), dtype=torch.uint8)
    cut = len(data) - len(data) // HELD_OUT_ONE_IN
    return Corpus(data[:cut], data[cut:], path.name)


def printable(tokens: Iterable[int]) -> str:
    """Bytes as text that is safe to show: whatever would steer a terminal becomes U+FFFD."""
    decoded = bytes(tokens).decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)


def random_batch(data: Tensor, batch: int, length: int, seed: int, step: int) -> Tensor:
    """Random crops int64 [B, L + 1]. The same (seed, step) always gives the same crops."""
    if len(data) < length + 1:
        check.fail("text", f"at least {length + 1} bytes", len(data))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
    return data[starts + torch.arange(length + 1)].long()


def windows(data: Tensor, batch: int, length: int, limit: int) -> Iterator[Tensor]:
    """Consecutive windows int64 [<= B, L + 1] over the first `limit` bytes, each byte once."""
    count = (min(len(data), limit) - 1) // length
    if count < 1:
        check.fail("text", f"at least {length + 1} held-out bytes", len(data))
    rows = data[: count * length + 1].unfold(0, length + 1, length)
    for part in rows.split(batch):
        yield part.long()
