"""Data: whatever holds text becomes the same documents; what is wrong is named; all or nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_blocks.recipes.data import Shards, Source, Tokenizer, prepare, shards, train_tokenizer
from atlas_blocks.recipes.data.sources import PIECE

TEXTS = [f"document {i}\nof é and 日本 {'x' * (i % 7)}" for i in range(60)]


def write_folder(place):
    place.mkdir()
    for i, content in enumerate(TEXTS):
        (place / f"{i:02}.txt").write_text(content)


def write_json_lines(place):
    lines = [json.dumps({"id": i, "text": t}) for i, t in enumerate(TEXTS)]
    place.write_text("\n".join([*lines[:30], "", *lines[30:]]) + "\n")


def write_parquet(place):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    parquet.write_table(table, place, row_group_size=7)


def write_dataset(place):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(place, num_shards=2)


def write_datasets(place):
    import datasets

    parts = {"train": TEXTS, "test": ["not this"]}
    found = {name: datasets.Dataset.from_dict({"text": t}) for name, t in parts.items()}
    datasets.DatasetDict(found).save_to_disk(place)


KINDS = {
    "folder": write_folder,
    "rows.jsonl": write_json_lines,
    "rows.parquet": write_parquet,
    "dataset": write_dataset,
    "datasets": write_datasets,
}


def texts(source):
    return ["".join(document) for document in source.documents()]


def contents(split):
    """The tokens of every document."""
    return [split.read(i, 0, n).tolist() for i, n in enumerate(split.lengths)]


def held_out_numbers(count, share=0.05):
    return {i for i in range(count) if shards._is_held_out(i, share)}


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([[t] for t in TEXTS], 300)


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that datasets imports
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_documents(tmp_path, kind):
    KINDS[kind](tmp_path / kind)
    source = Source(tmp_path / kind)
    assert texts(source) == TEXTS
    assert source.splits == (["test"] if kind == "datasets" else [])


def test_the_mark_before_utf8_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfsome text, \xef\xbb\xbf")
    assert texts(Source(tmp_path / "a.txt")) == ["some text, \ufeff"]


def test_a_folder_is_its_visible_text_in_order_of_names(tmp_path):
    write_folder(tmp_path / "folder")
    (tmp_path / "folder" / "00.png").write_bytes(b"\x89PNG\x00")
    (tmp_path / "folder" / "00a.txt").write_bytes(b"")
    (tmp_path / "folder" / ".git").mkdir()
    (tmp_path / "folder" / ".git" / "config").write_text("hidden")
    write_json_lines(tmp_path / "folder" / "zz.jsonl")
    source = Source(tmp_path / "folder")
    assert texts(source) == [*TEXTS, *TEXTS]
    assert source.left_out == 1


@pytest.mark.parametrize("line", ["é" * 80 + "\n", "é" * 80 + " ", "é"])
def test_a_large_file_comes_in_pieces_and_loses_nothing(tmp_path, line):
    whole = "x" + line * (5 * PIECE // 2 // len(line.encode()))
    (tmp_path / "a.txt").write_text(whole)
    (document,) = Source(tmp_path / "a.txt").documents()
    pieces = list(document)
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) < 2 * PIECE
    assert all(piece[-1] == line[-1] for piece in pieces)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert texts(Source(tmp_path / "a.jsonl")) == ["a?b"]


def test_a_field_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}')
    assert texts(Source(tmp_path / "a.jsonl", "content")) == ["yes"]


# --- what is wrong ------------------------------------------------------------------------------


def refused(path, words, **options):
    with pytest.raises(ValueError, match=words):
        list(map(list, Source(path, **options).documents()))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"data: expected some text, got .*a.txt \(empty\)"),
        (b"GIF89a\x00\x01", r"data: expected text, got .*a.txt \(binary data\)"),
        ("x".encode("utf-16"), "binary data"),
        (b"x" * PIECE + "é".encode("latin-1"), r"UTF-8, got .*a.txt \(byte 0xe9 at 1,048,576\)"),
        (b"x" * (PIECE - 1) + b"\xc3x", r"byte 0xc3 at 1,048,575"),
        ("é".encode()[:1], r"byte 0xc3 at 0"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    refused(tmp_path / "a.txt", words)


def test_places_without_text_are_named(tmp_path):
    refused(tmp_path / "none", r"data: expected a folder or a file, got .*none \(not found\)")
    refused(tmp_path, r"data: expected some text, got .* \(no files in it\)")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"txt": "a"}', r'string "text" in every line \(--field names another\).*line 2 of txt'),
        ("plain", r"expected JSON in every line, got .*a.jsonl, line 2"),
        ('{"text": "a', "line 2"),
        ('["text"]', "line 2"),
        ('{"text": 3}', "line 2"),
        ('{"text": null}', "line 2"),
        ('"text"', "line 2"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_line_without_text_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    refused(tmp_path / "a.jsonl", words)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tables_without_the_column_or_with_gaps_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    write_dataset(tmp_path / "dataset")
    words = r'a column "content" \(--field names another\), got .* of (id, )?text'
    for name in ("a.parquet", "dataset"):
        refused(tmp_path / name, words, field="content")
    refused(tmp_path / "a.parquet", r"row 1: int", field="id")
    (tmp_path / "b.parquet").write_text("no table")
    refused(tmp_path / "b.parquet", "data: cannot read .*b.parquet")
    (tmp_path / "dataset" / "state.json").write_text("{}")
    refused(tmp_path / "dataset", "data: cannot read .*dataset")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_dict_of_datasets_without_train_names_those_it_has(tmp_path):
    write_datasets(tmp_path / "all")
    (tmp_path / "all" / "train").rename(tmp_path / "all" / "other")
    refused(tmp_path / "all", r'a dataset with "train", or one of .*/all/, got other, test')
    assert texts(Source(tmp_path / "all" / "test")) == ["not this"]


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(tmp_path / "a.parquet", r"library pyarrow, .*pip install 'atlas-blocks\[train\]'")


# --- the tokenizer ------------------------------------------------------------------------------


def test_text_comes_back_from_tokens(bpe):
    for tokenizer in (Tokenizer(), bpe):
        for tokens, content in zip(tokenizer.encode(TEXTS), TEXTS, strict=True):
            assert tokenizer.decode(tokens.tolist()).decode() == content
            assert tokens.dtype == tokenizer.dtype
            assert tokens.max() < tokenizer.vocab_size


def test_a_trained_tokenizer_has_the_size_that_was_asked_for(bpe):
    assert bpe.vocab_size == 300
    assert 0 <= bpe.end < 300
    assert sum(map(len, bpe.encode(TEXTS))) < sum(len(t.encode()) for t in TEXTS)
    assert train_tokenizer([["ab"]], 10_000).vocab_size == 258
    with pytest.raises(ValueError, match="size: expected an int >= 257"):
        train_tokenizer([["ab"]], 256)


def test_text_that_spells_a_special_token_is_text(bpe):
    (tokens,) = bpe.encode(["a<|endoftext|>b"])
    assert bpe.end not in tokens.tolist()


def test_what_a_file_says_of_truncation_and_padding_is_not_applied(bpe):
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(bpe.json)
    inner.enable_truncation(3)
    inner.enable_padding(length=9)
    cut = Tokenizer(inner.to_str())
    assert [t.tolist() for t in cut.encode(TEXTS)] == [t.tolist() for t in bpe.encode(TEXTS)]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer: cannot read .*t.json"):
        Tokenizer.read(tmp_path / "t.json")
    with pytest.raises(ValueError, match="tokenizer: cannot read"):
        Tokenizer.read(tmp_path / "none.json")


def test_a_vocabulary_with_gaps_counts_to_its_highest_token():
    import tokenizers

    model = tokenizers.models.WordLevel({"a": 0, "b": 70_000}, unk_token="a")
    tokenizer = Tokenizer(tokenizers.Tokenizer(model).to_str())
    assert (tokenizer.vocab_size, tokenizer.dtype, tokenizer.end) == (70_001, np.uint32, None)


# --- the shards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 200, shards.SHARD])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_shards_hold_every_document_once(tmp_path, bpe, kind, shard_tokens):
    write_json_lines(tmp_path / "a.jsonl")
    tokenizer = Tokenizer() if kind == "bytes" else bpe
    source = Source(tmp_path / "a.jsonl")
    found = prepare(source, tmp_path / "out", tokenizer, shard_tokens=shard_tokens)
    end = [] if tokenizer.end is None else [tokenizer.end]
    true = [[*t.tolist(), *end] for t in tokenizer.encode(TEXTS)]
    held = held_out_numbers(len(TEXTS))
    assert contents(found.train) == [t for i, t in enumerate(true) if i not in held]
    assert contents(found.held_out) == [t for i, t in enumerate(true) if i in held]
    assert found.tokenizer == tokenizer
    assert found.train.token_count == sum(map(len, contents(found.train)))
    assert (len(found.train.tokens) == 1) == (shard_tokens == shards.SHARD)
    if shard_tokens == 1:
        assert len(found.train.tokens) == len(found.train.lengths)


def test_one_of_twenty_is_held_out_wherever_one_stops():
    held = held_out_numbers(2000)
    assert all(sum(20 * turn <= i < 20 * (turn + 1) for i in held) == 1 for turn in range(100))
    assert len({i % 20 for i in held}) == 20
    assert held_out_numbers(2) == {1}
    assert held_out_numbers(8, 0.25) < set(range(8))


def test_a_single_document_holds_out_its_end(tmp_path):
    whole = bytes(range(1, 101))
    (tmp_path / "a.txt").write_bytes(whole)
    found = prepare(Source(tmp_path / "a.txt"), tmp_path / "out", Tokenizer())
    assert (contents(found.train), contents(found.held_out)) == ([[*whole[:95]]], [[*whole[95:]]])


def test_chunks_do_not_show(tmp_path, monkeypatch):
    """Where documents and pieces are encoded together, and where each is by itself."""
    write_folder(tmp_path / "folder")
    source = Source(tmp_path / "folder")
    whole = prepare(source, tmp_path / "whole", Tokenizer())
    monkeypatch.setattr(shards, "CHUNK", 1)
    assert prepare(source, tmp_path / "out", Tokenizer()).fingerprint == whole.fingerprint


def test_the_fingerprint_tells_text_split_and_tokenizer_apart(tmp_path, bpe):
    write_json_lines(tmp_path / "a.jsonl")
    source = Source(tmp_path / "a.jsonl")
    prints = [
        prepare(source, tmp_path / f"{i}", tokenizer, held_out=share).fingerprint
        for i, (tokenizer, share) in enumerate(
            [(Tokenizer(), 0.05), (Tokenizer(), 0.1), (bpe, 0.1)]
        )
    ]
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("docu", "codu"))
    prints.append(prepare(source, tmp_path / "changed", Tokenizer()).fingerprint)
    assert len(set(prints)) == 4


def test_files_that_change_are_known(tmp_path):
    write_folder(tmp_path / "folder")
    before = Source(tmp_path / "folder").identity
    assert Source(tmp_path / "folder").identity == before
    assert Source(tmp_path / "folder", "content").identity != before
    os.utime(tmp_path / "folder" / "00.txt", (1, 1))
    assert Source(tmp_path / "folder").identity != before


# --- all or nothing -----------------------------------------------------------------------------


def test_bad_input_leaves_nothing(tmp_path):
    lines = ['{"text": "a"}'] * 50_000
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"txt": "a"}']))
    with pytest.raises(ValueError, match="line 50001"):
        prepare(Source(tmp_path / "a.jsonl"), tmp_path / "out", Tokenizer())
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match=r"to train on and to hold out, got one\.txt"):
        prepare(Source(tmp_path / "one.txt"), tmp_path / "out", Tokenizer())
    assert {p.name for p in tmp_path.iterdir()} == {"a.jsonl", "one.txt"}


def test_places_that_do_not_serve_are_named(tmp_path):
    write_folder(tmp_path / "folder")
    source = Source(tmp_path / "folder")
    for place, words in (("folder/00.txt", "new folder"), ("folder", "new folder")):
        with pytest.raises(ValueError, match=f"out: expected a {words}, got"):
            prepare(source, tmp_path / place, Tokenizer())
    with pytest.raises(ValueError, match="out: expected a folder outside of the data"):
        prepare(source, tmp_path / "folder" / "shards", Tokenizer())
    (tmp_path / "empty").mkdir()
    prepare(source, tmp_path / "empty", Tokenizer())


def test_a_full_disk_is_named_first(tmp_path, monkeypatch):
    write_folder(tmp_path / "folder")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"out: expected a disk with .* free"):
        prepare(Source(tmp_path / "folder"), tmp_path / "out", Tokenizer())


def test_killed_it_leaves_no_folder_of_that_name(tmp_path):
    code = f"""
import itertools
from pathlib import Path
from atlas_blocks.recipes.data import Source, Tokenizer, prepare
source = Source(Path({str(tmp_path / "a.txt")!r}))
source.documents = lambda: itertools.repeat(["text " * 100_000])
def told(tokens):
    print(tokens, flush=True)
prepare(source, Path({str(tmp_path / "out")!r}), Tokenizer(), on_progress=told)
"""
    (tmp_path / "a.txt").write_text("x")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def prepared(tmp_path, bpe):
    write_json_lines(tmp_path / "a.jsonl")
    return prepare(Source(tmp_path / "a.jsonl"), tmp_path / "out", bpe).folder


def edited(folder, **changes):
    meta = json.loads((folder / "shards.json").read_text())
    (folder / "shards.json").write_text(json.dumps(meta | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "shards.json").unlink(), r"folder that `prepare` has finished"),
        (lambda f: edited(f, version=2), "shards of version 1, .* got version 2"),
        (lambda f: (f / "shards.json").write_text("{"), "cannot read .*shards.json"),
        (lambda f: edited(f, train=[]), "damaged"),
        (lambda f: edited(f, dtype="nonsense"), "damaged"),
        (lambda f: os.truncate(f / "train-00000.bin", 8), "bytes in .*train-00000.bin, got 8"),
        (lambda f: (f / "held_out-00000.idx").unlink(), "bytes in .*held_out-00000.idx, got 0"),
        (lambda f: edited(f, dtype="<u4"), "bytes in .*train-00000.bin"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer: cannot read"),
        (
            lambda f: train_tokenizer([["other"]], 260).write(f / "tokenizer.json"),
            "expected the tokenizer 300 tokens",
        ),
        (
            lambda f: (f / "held_out-00000.idx").write_bytes(bytes(8 * 3)),
            "documents up to token",
        ),
    ],
)
def test_shards_that_are_not_as_they_were_are_refused(prepared, damage, words):
    Shards(prepared)
    damage(prepared)
    with pytest.raises(ValueError, match=words):
        Shards(prepared)


def test_shards_without_their_record_are_no_text(prepared):
    for left in (lambda: None, (prepared / "shards.json").unlink):
        left()
        with pytest.raises(ValueError, match="data: expected text, or a folder that `prepare`"):
            Source(prepared)


def test_the_standard_library_is_a_source():
    source = Source(None)
    assert len(source.files) > 500
    assert all(Path(f).suffix == ".py" for f in source.files)
