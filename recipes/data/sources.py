"""Documents of text, one after the other: a folder, a file, JSON lines, Parquet, or a Hugging Face
dataset on disk. None is ever whole in memory but a row of a table.

A text file is one document; of JSON lines and tables every row is one. A folder is its files, in
the order of their names, hidden ones and those that are no text left out.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from atlas_blocks import check
from atlas_blocks.recipes import text

JSON_LINES = {".jsonl", ".ndjson"}
PARQUET = ".parquet"
# What `datasets` writes beside the rows of a dataset, and beside the folders of several.
DATASET, DATASETS = "state.json", "dataset_dict.json"
# Of shards. Where one lies, and no record of them all, tokens would pass as text.
SHARD = "*-00000.idx"
# Bytes of a text file that are read at a time, and rows of a table.
PIECE, ROWS = 2**20, 256

Document = Iterable[str]
"""A document as consecutive pieces of text."""


class Source:
    """Where documents come from. path: None is the Python standard library; field: the column of
    tables, or the key of JSON lines, that holds the text.

    files: what is read. left_out: files that are no text, known once all have been read. splits:
    those of a dataset that are not read, as "train" is.
    Raises ValueError where there is nothing to read.
    """

    def __init__(self, path: Path | None, field: str = "text") -> None:
        self.path, self.field, self.left_out = path, field, 0
        self.splits: list[str] = []
        if path is None:
            self.name, self.root = text.standard_library_name(), text.standard_library_root()
            self.files = text.standard_library_files()
            return
        self.name = path.resolve().name
        if not path.exists():
            check.fail("data", "a folder or a file", f"{path} (not found)")
        self.root = path if path.is_dir() else path.parent
        if (path / DATASETS).is_file():
            splits = [p.parent.name for p in sorted(path.glob(f"*/{DATASET}"))]
            if "train" not in splits:
                check.fail("data", f'a dataset with "train", or one of {path}/', ", ".join(splits))
            self.splits = [split for split in splits if split != "train"]
            self.path, self.root = path / "train", path / "train"
        if path.is_dir() and any(path.glob(SHARD)):
            check.fail("data", "text, or a folder that `prepare` has finished", path)
        found = sorted(self.root.rglob("*")) if path.is_dir() else [path]
        self.files = [f for f in found if f.is_file() and self._visible(f)]
        if not any(f.stat().st_size for f in self.files):
            what = f"{path} (empty)" if self.files else f"{path} (no files in it)"
            check.fail("data", "some text", what)

    def _visible(self, file: Path) -> bool:
        return file == self.path or not any(
            part.startswith(".") for part in file.relative_to(self.root).parts
        )

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.stat().st_size for f in self.files)

    @property
    def identity(self) -> str:
        """Tells these files from others, and from themselves when they have changed."""
        found = hashlib.sha256(self.field.encode())
        for file in self.files:
            at = file.stat()
            name = file.relative_to(self.root).as_posix()
            found.update(f"{name}\0{at.st_size}\0{at.st_mtime_ns}\n".encode())
        return found.hexdigest()[:16]

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, as pieces to be read before the next one is asked for.

        Raises ValueError that names the file, and the line or the row, of what cannot be read.
        """
        if self.path is not None and (self.path / DATASET).is_file():
            yield from _dataset(self.path, self.field)
            return
        self.left_out = 0
        for file in self.files:
            if not file.stat().st_size:
                continue
            if file.suffix in JSON_LINES:
                yield from _json_lines(file, self.field)
            elif file.suffix == PARQUET:
                yield from _parquet(file, self.field)
            elif (pieces := _text(file)) is not None:
                yield pieces
            elif file == self.path:
                check.fail("data", "text", f"{file} (binary data)")
            else:
                self.left_out += 1


def needed(module: str, what: str, extra: str = "train") -> Any:
    """The optional library. Raises ValueError that says how to install it."""
    try:
        found: ModuleType = importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(
            f"{what}: expected the library {package}, got none (pip install "
            f"'atlas-blocks[{extra}]')"
        ) from None
    return found


def _text(file: Path) -> Document | None:
    return None if is_binary(file) else _pieces(file)


def is_binary(file: Path) -> bool:
    """Whether the file is no text, by a NUL in its first piece."""
    with file.open("rb") as opened:
        return b"\0" in opened.read(PIECE)


def _pieces(file: Path) -> Iterator[str]:
    """The text of a file cut at ends of lines, where a tokenizer cuts words too."""
    decoder, rest, read = codecs.getincrementaldecoder("utf-8")(), "", 0
    with file.open("rb") as opened:
        while True:
            data = opened.read(PIECE)
            pending = len(decoder.getstate()[0])
            try:
                rest += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = read - pending + error.start
                got = f"{file} (byte {error.object[error.start]:#04x} at {at:,})"
                check.fail("data", "text in UTF-8", got)
            if read == 0:
                rest = rest.removeprefix("\ufeff")  # the mark that some editors begin UTF-8 with
            read += len(data)
            if not data:
                break
            cut = rest.rfind("\n") + 1 or rest.rfind(" ") + 1 or len(rest)
            if cut:
                yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _json_lines(file: Path, field: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                got = f"{file}, line {number}: {error}"
                raise ValueError(f"data: expected JSON in every line, got {got}") from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                keys = f" of {', '.join(row)}"[:200] if isinstance(row, dict) else ""
                wanted = f'an object with a string "{field}" in every line (--field names another)'
                check.fail("data", wanted, f"{file}, line {number}{keys}")
            if row[field]:
                yield [_encodable(row[field])]


def _parquet(file: Path, field: str) -> Iterator[Document]:
    parquet: Any = needed("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(file) as table:
            _check_column(field, table.schema_arrow.names, file)
            batches = table.iter_batches(ROWS, columns=[field])
            yield from _rows((batch.column(0).to_pylist() for batch in batches), field, file)
    except (OSError, needed("pyarrow", "data").ArrowException) as error:
        raise ValueError(f"data: cannot read {file}: {error}") from error


def _dataset(folder: Path, field: str) -> Iterator[Document]:
    datasets: Any = needed("datasets", "data")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever it stumbles over in files that are not its own
        raise ValueError(f"data: cannot read {folder}: {error}") from error
    _check_column(field, found.column_names, folder)
    tables = found.select_columns([field]).with_format("arrow").iter(ROWS)
    yield from _rows((table.column(0).to_pylist() for table in tables), field, folder)


def _check_column(field: str, columns: list[str], place: Path) -> None:
    if field not in columns:
        wanted = f'a column "{field}" (--field names another)'
        check.fail("data", wanted, f"{place} of {', '.join(columns)}")


def _rows(batches: Iterable[list[Any]], field: str, place: Path) -> Iterator[Document]:
    number = 0
    for batch in batches:
        for value in batch:
            number += 1
            if not isinstance(value, str):
                got = f"{place}, row {number}: {type(value).__name__}"
                check.fail("data", f'a string "{field}" in every row', got)
            if value:
                yield [_encodable(value)]


def _encodable(found: str) -> str:
    """Without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return found.encode(errors="replace").decode()
