"""Text as bytes in memory, for the laboratories: the Python standard library's sources.

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


def standard_library_files() -> list[Path]:
    """The .py files of the running Python's standard library, its tests left out."""
    root = standard_library_root()
    return sorted(
        f for f in root.rglob("*.py") if not SKIPPED_FOLDERS & set(f.relative_to(root).parts[:-1])
    )


def standard_library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def standard_library_name() -> str:
    return f"Python {sysconfig.get_python_version()} standard library"


def standard_library() -> Corpus:
    """The standard library's files, joined.

    Held out by file: a hash of the path decides, so that the split does not depend on order.
    """
    split: tuple[list[bytes], list[bytes]] = ([], [])
    for file in standard_library_files():
        name = file.relative_to(standard_library_root()).as_posix()
        split[zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0].append(file.read_bytes())
    train, held_out = (b"\n".join(part) for part in split)
    return Corpus(_tensor(train), _tensor(held_out), standard_library_name())


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def printable(tokens: Iterable[int]) -> str:
    """Bytes as text that is safe to show: whatever would steer a terminal becomes U+FFFD."""
    return safe(bytes(tokens).decode(errors="replace"))


def safe(text: str) -> str:
    """Whatever would steer a terminal as U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def random_batch(data: Tensor, batch: int, length: int, seed: int, step: int) -> Tensor:
    """Random crops int64 [B, L + 1]. The same (seed, step) always gives the same crops."""
    if len(data) < length + 1:
        check.fail("text", f"at least {length + 1} bytes", len(data))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
    return data[starts + torch.arange(length + 1)].long()


def window_count(data: Tensor, length: int, limit: int) -> int:
    """How many windows of `length` predicted bytes the first `limit` bytes hold."""
    return max(0, (min(len(data), limit) - 1) // length)


def windows(data: Tensor, batch: int, length: int, limit: int) -> Iterator[Tensor]:
    """Consecutive windows int64 [<= B, L + 1] over the first `limit` bytes, each byte once."""
    count = window_count(data, length, limit)
    if count < 1:
        check.fail("text", f"at least {length + 1} held-out bytes", min(len(data), limit))
    rows = data[: count * length + 1].unfold(0, length + 1, length)
    for part in rows.split(batch):
        yield part.long()
