"""Tokens on disk: memory-mapped shards of whole documents, prepared once.

DIR/shards.json         what is in them; the folder gets its name when all of it is written
DIR/tokenizer.json      of tokens that are not bytes
DIR/train-00000.bin     tokens, one document after the other
DIR/train-00000.idx     int64, little endian: where each of its documents ends
DIR/held_out-00000.bin  ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from atlas_blocks import check
from atlas_blocks.recipes import files
from atlas_blocks.recipes.data.sources import Document, Source
from atlas_blocks.recipes.data.tokenizer import Tokenizer

VERSION = 1
META, TOKENIZER = "shards.json", "tokenizer.json"
TRAIN, HELD_OUT = "train", "held_out"
ENDS = np.dtype("<i8")
# Tokens after which a shard takes no further document.
SHARD = 2**28
# Characters that are encoded at a time.
CHUNK = 2**22


# --- reading ----------------------------------------------------------------------------------


class Split:
    """Documents of tokens, numbered through all shards: tokens[i] and, in int64, ends[i] of one.

    lengths: tokens of every document, int64. predictions: those that are predicted, all of a
    document but its first.
    """

    def __init__(self, tokens: list[np.ndarray], ends: list[np.ndarray]) -> None:
        self.tokens, self.ends = tokens, ends
        self.lengths = np.concatenate([np.diff(e, prepend=0) for e in ends])
        self.predictions = int(np.maximum(self.lengths - 1, 0).sum())
        self._first = np.cumsum([0, *(len(e) for e in ends)])

    @property
    def token_count(self) -> int:
        return sum(map(len, self.tokens))

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop) of a document."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        inner = document - int(self._first[shard])
        before = int(self.ends[shard][inner - 1]) if inner else 0
        return self.tokens[shard][before + start : before + stop]


class Shards:
    """What `prepare` wrote to a folder. Raises ValueError where that is not all there.

    train, held_out: of different documents. meta: the record of shards.json; source: what in it
    tells where the text came from.
    """

    def __init__(self, folder: Path) -> None:
        where = f"data {folder}"
        self.folder = folder
        if not is_prepared(folder):
            check.fail("data", f"a folder that `prepare` has finished ({META})", folder)
        self.meta = files.read_json("data", folder / META)
        if (version := self.meta.get("version")) != VERSION:
            wanted = f"shards of version {VERSION}, as this library prepares them"
            check.fail(where, wanted, f"version {version!r}")
        try:
            coded = self.meta["tokenizer"]
            self.source = self.meta["source"]
            self.train, self.held_out = (self._split(part) for part in (TRAIN, HELD_OUT))
        except (KeyError, TypeError, OSError) as error:
            raise ValueError(f"{where}: damaged: {error!r}") from error
        self.tokenizer = Tokenizer.read(folder / TOKENIZER) if coded else Tokenizer()
        if self.tokenizer.name != self.meta["vocabulary"]:
            check.fail(where, f"the tokenizer {self.meta['vocabulary']}", self.tokenizer.name)

    def _split(self, part: str) -> Split:
        tokens, ends = [], []
        if not self.meta[part]:
            raise KeyError(part)
        for shard in self.meta[part]:
            for name, dtype, kept in (("bin", self.meta["dtype"], tokens), ("idx", ENDS, ends)):
                file = self.folder / f"{shard['name']}.{name}"
                dtype, count = np.dtype(dtype), shard["tokens" if name == "bin" else "documents"]
                size = file.stat().st_size if file.is_file() else 0
                if size != count * dtype.itemsize:
                    wanted = f"{count * dtype.itemsize:,} bytes in {file}"
                    check.fail(f"data {self.folder}", wanted, f"{size:,}")
                # As a plain array, of which slices are cheap.
                kept.append(np.asarray(np.memmap(file, dtype, mode="r")))
            if ends[-1][-1] != shard["tokens"]:
                wanted = f"documents up to token {shard['tokens']:,} in {shard['name']}.idx"
                check.fail(f"data {self.folder}", wanted, f"{ends[-1][-1]:,}")
        return Split(tokens, ends)

    @property
    def fingerprint(self) -> str:
        """Tells these tokens from others, and from themselves split otherwise."""
        sums = json.dumps([self.meta[part] for part in ("vocabulary", TRAIN, HELD_OUT)])
        return f"{self.source['name']} ({hashlib.sha256(sums.encode()).hexdigest()[:16]})"


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` has finished this folder."""
    return (folder / META).is_file()


# --- writing ----------------------------------------------------------------------------------


def prepare(
    source: Source,
    out: Path,
    tokenizer: Tokenizer,
    *,
    held_out: float = 0.05,
    shard_tokens: int = SHARD,
    on_progress: Callable[[int], None] | None = None,
) -> Shards:
    """Tokens of every document of `source`, in the folder `out`, which is there whole or not at
    all. on_progress: told the tokens so far.

    held_out: the share of the documents that is never trained on: one of each 1 / held_out, at a
    place drawn for it. Of a single document it is the end. Where the tokenizer has a token that
    ends a document, every one gets it. Raises ValueError for bad input, OSError where the disk
    fails.
    """
    check.between("held_out", held_out, 0.001, 0.5)
    check.at_least("shard_tokens", shard_tokens, 1)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check.fail("out", "a new folder", f"{out} (exists)")
    inside = source.path is not None and source.path.is_dir()
    if inside and out.resolve().is_relative_to(source.root.resolve()):
        check.fail("out", f"a folder outside of the data in {source.path}", out)
    files.check_folder("out", out.parent, room=source.size)
    partial = out.with_name(f"{out.name}.partial")
    try:
        # Of one that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(source, partial, tokenizer, held_out, shard_tokens, on_progress)
        # On the disk before the folder has its name.
        for file in [*partial.iterdir(), partial]:
            files.sync(file)
        os.replace(partial, out)
        files.sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Shards(out)


def training_documents(source: Source, held_out: float = 0.05) -> Iterator[Document]:
    """Those that `prepare` does not hold out; all of a single one."""
    for index, document in enumerate(source.documents()):
        if not _is_held_out(index, held_out):
            yield document


def _is_held_out(index: int, share: float) -> bool:
    """One of each 1 / share, at a place drawn for it; of the first the second, so that there is one
    as soon as there are two."""
    size = round(1 / share)
    turn, place = divmod(index, size)
    return place == (zlib.crc32(str(turn).encode()) % size if turn else 1)


def _write(
    source: Source,
    folder: Path,
    tokenizer: Tokenizer,
    held_out: float,
    shard_tokens: int,
    on_progress: Callable[[int], None] | None,
) -> None:
    parts = [_Writer(folder, name, tokenizer, shard_tokens) for name in (TRAIN, HELD_OUT)]
    pieces: list[tuple[_Writer, str | None]] = []
    waiting = count = 0

    def encode() -> None:
        coded = iter(tokenizer.encode([t for _, t in pieces if t is not None]))
        for part, piece in pieces:
            if piece is None:
                part.end_document()
            else:
                part.add(next(coded))
        pieces.clear()
        if on_progress:
            on_progress(sum(part.tokens for part in parts))

    with contextlib.ExitStack() as closing:
        for part in parts:
            closing.callback(part.end_shard)
        for document in source.documents():
            part = parts[_is_held_out(count, held_out)]
            for piece in document:
                pieces.append((part, piece))
                waiting += len(piece)
                if waiting >= CHUNK:
                    encode()
                    waiting = 0
            pieces.append((part, None))
            count += 1
        encode()
        train, held = parts
        if train.documents == 1 and not held.documents:
            held.add(train.cut(max(1, round(train.tokens * held_out))))
            held.end_document(whole=False)
    if not (train.documents and held.documents):
        check.fail("data", "text to train on and to hold out", f"{source.name} ({count} documents)")
    if tokenizer.json is not None:
        tokenizer.write(folder / TOKENIZER)
    record = {
        "version": VERSION,
        "source": {
            "name": source.name,
            "identity": source.identity,
            "field": source.field,
        },
        "vocabulary": tokenizer.name,
        "tokenizer": tokenizer.json is not None,
        "dtype": tokenizer.dtype.str,
        "share_held_out": held_out,
    }
    files.write_json(folder / META, record | {part.name: part.close() for part in parts})


@dataclasses.dataclass
class _Writer:
    """The shards of one split, as they are written."""

    folder: Path
    name: str
    tokenizer: Tokenizer
    shard_tokens: int

    def __post_init__(self) -> None:
        self.shards: list[dict[str, Any]] = []
        self.tokens = self.documents = self.length = 0
        self.bin: Any = None

    def add(self, tokens: np.ndarray) -> None:
        """Further tokens of the document in hand."""
        if not len(tokens):
            return
        if self.bin is None:
            name = f"{self.name}-{len(self.shards):05d}"
            self.shards.append({"name": name, "tokens": 0, "documents": 0})
            self.bin, self.idx = ((self.folder / f"{name}.{e}").open("wb") for e in ("bin", "idx"))
        data = tokens.astype(self.tokenizer.dtype, copy=False)
        self.bin.write(data)
        self.length += len(tokens)
        self.tokens += len(tokens)
        self.shards[-1]["tokens"] += len(tokens)

    def end_document(self, *, whole: bool = True) -> None:
        """whole: with the token that ends it. A document without tokens is none."""
        if not self.length:
            return
        if whole and self.tokenizer.end is not None:
            self.add(np.array([self.tokenizer.end]))
        shard = self.shards[-1]
        self.idx.write(np.array([shard["tokens"]], ENDS).tobytes())
        shard["documents"] += 1
        self.documents, self.length = self.documents + 1, 0
        if shard["tokens"] >= self.shard_tokens:
            self.end_shard()

    def end_shard(self) -> None:
        """What comes next goes to another file."""
        if self.bin is not None:
            self.bin.close()
            self.idx.close()
            self.bin = None

    def cut(self, count: int) -> np.ndarray:
        """Take the last tokens of the only document away."""
        self.end_shard()
        (shard,) = self.shards
        file, ends = (self.folder / f"{shard['name']}.{e}" for e in ("bin", "idx"))
        size = self.tokenizer.dtype.itemsize
        tail = np.fromfile(file, self.tokenizer.dtype, offset=(shard["tokens"] - count) * size)
        self.tokens = shard["tokens"] = shard["tokens"] - count
        self.documents = shard["documents"] = int(self.tokens > 0)
        os.truncate(file, self.tokens * size)
        ends.write_bytes(np.array([self.tokens], ENDS).tobytes())
        return tail

    def close(self) -> list[dict[str, Any]]:
        """The record of every shard, with its checksum."""
        self.end_shard()
        for shard in self.shards:
            found = hashlib.sha256()
            for ending in ("bin", "idx"):
                with (self.folder / f"{shard['name']}.{ending}").open("rb") as file:
                    while piece := file.read(CHUNK):
                        found.update(piece)
            shard["sha256"] = found.hexdigest()
        return self.shards
