"""Text as bytes: the Python standard library's sources, or any folder or file of text.

A .jsonl file is the "text" of its lines. What is no text, a file with NUL bytes, is not read.

B batch, L length of a crop.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from atlas_blocks import check

VOCAB_SIZE = 256
HELD_OUT_ONE_IN = 20
JSON_LINES = {".jsonl", ".ndjson"}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """uint8 bytes to train on and bytes no training crop can touch, and where they came from."""

    train: Tensor
    held_out: Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        """Tells this text from others, and from itself with other bytes held out."""
        parts = (self.train, self.held_out)
        sums = "-".join(f"{len(p)}:{zlib.crc32(p.numpy().data):08x}" for p in parts)
        return f"{self.source} ({sums})"


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _read(file: Path) -> bytes | None:
    """The text of a file; None where it is none. Raises ValueError for JSON lines without."""
    data = file.read_bytes()
    if file.suffix in JSON_LINES:
        lines = enumerate(data.split(b"\n"), 1)
        return b"\n".join(_text_of(line, file, n) for n, line in lines if line.strip())
    return None if b"\0" in data else data


def _text_of(line: bytes, file: Path, number: int) -> bytes:
    try:
        found = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, str):
        check.fail("text", f'an object with a "text" in every line of {file}', f"line {number}")
    return str(found).encode(errors="replace")


def _corpus(root: Path, files: list[Path], source: str) -> Corpus:
    """Held out by file: a hash of the path decides, so that the split does not depend on order."""
    split: tuple[list[bytes], list[bytes]] = ([], [])
    left_out = 0
    for file in sorted(files):
        name, data = file.relative_to(root).as_posix(), _read(file)
        if data is None:
            left_out += 1
        else:
            split[zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0].append(data)
    train, held_out = (b"\n".join(part) for part in split)
    count = len(files) - left_out
    if not (train and held_out):
        check.fail("text", "a folder with enough text files to hold some out", f"{count} of them")
    note = f", {count} files, {left_out} that are no text left out" if left_out else ""
    return Corpus(_tensor(train), _tensor(held_out), source + note)


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
    """The .py files of the running Python's standard library, its tests left out."""
    return _corpus(standard_library_root(), standard_library_files(), standard_library_name())


def load_text(path: Path | None) -> Corpus:
    """A folder (split by file), one file (its last twentieth held out), or None: the library.

    Hidden files and folders are left out. Raises ValueError where there is no text to read.
    """
    if path is None:
        return standard_library()
    if path.is_dir():
        return _corpus(path, [f for f in path.rglob("*") if _visible(path, f)], path.name)
    if not path.is_file():
        check.fail("text", "a folder or a file", f"{path} (not found)")
    read = _read(path)
    if not read:
        check.fail("text", "text", f"{path}, {'an empty file' if read == b'' else 'binary data'}")
    data = _tensor(read or b"")
    cut = len(data) - len(data) // HELD_OUT_ONE_IN
    return Corpus(data[:cut], data[cut:], path.name)


def _visible(root: Path, file: Path) -> bool:
    parts = file.relative_to(root).parts
    return file.is_file() and not any(part.startswith(".") for part in parts)


def printable(tokens: Iterable[int]) -> str:
    """Bytes as text that is safe to show: whatever would steer a terminal becomes U+FFFD."""
    return "".join(printable_parts([tokens]))


def printable_parts(parts: Iterable[Iterable[int]]) -> Iterator[str]:
    """The same as the bytes come: a character is shown when its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for part in parts:
        yield safe(decoder.decode(bytes(part)))
    yield safe(decoder.decode(b"", final=True))


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
