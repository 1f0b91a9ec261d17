"""The text of a run: prepared by somebody, by an earlier run, or now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from rich.console import Console

from atlas_blocks import check
from atlas_blocks.recipes import describe, display
from atlas_blocks.recipes.data import Shards, Source, Tokenizer, prepare, train_tokenizer
from atlas_blocks.recipes.data.shards import SHARD, is_prepared, training_documents
from atlas_blocks.recipes.data.tokenizer import BYTES

DATA = "data"


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where text comes from. path: a folder that `prepare` wrote, or what `Source` reads, which is
    prepared first. tokenizer: "bytes", a tokenizer.json, or the size of one to be trained."""

    path: Path | None = None
    tokenizer: str = BYTES
    field: str = "text"
    held_out: float = 0.05


def prepared(
    console: Console,
    source: Source,
    options: DataOptions,
    out: Path,
    shard_tokens: int = SHARD,
) -> Shards:
    """Prepare the source in the folder `out`, as the options say, and tell of it."""
    with display.working(console, f"preparing {source.name}") as say:
        tokenizer = tokenizer_of(options, source, say)
        shards = prepare(
            source,
            out,
            tokenizer,
            held_out=options.held_out,
            shard_tokens=shard_tokens,
            on_progress=_progress(say, source, console.is_terminal),
        )
    note = f", {source.left_out} files that are no text left out" if source.left_out else ""
    note += (
        f', of its splits "train" alone, not {", ".join(source.splits)}' if source.splits else ""
    )
    console.print(f"prepared [bold]{out}[/]: {told(shards)}{note}")
    return shards


def tokenizer_of(options: DataOptions, source: Source, say: Callable[[str], None]) -> Tokenizer:
    """What the option says: bytes, a file, or one trained on the training documents."""
    if options.tokenizer == BYTES:
        return Tokenizer()
    if not options.tokenizer.isdecimal():
        return Tokenizer.read(Path(options.tokenizer))
    say(f"training a tokenizer of {int(options.tokenizer):,} tokens on {source.name}")
    return train_tokenizer(training_documents(source, options.held_out), int(options.tokenizer))


def _progress(say: Callable[[str], None], source: Source, terminal: bool) -> Callable[[int], None]:
    """Tells tokens so far: always where somebody watches, else whenever they have doubled."""
    told = 2**24

    def on_progress(tokens: int) -> None:
        nonlocal told
        if terminal or tokens > 2 * told:
            told = tokens
            say(f"preparing {source.name}: {tokens:,} tokens")

    return on_progress


def told(shards: Shards) -> str:
    parts = (
        f"{describe.human(part.token_count)} tokens of {len(part.lengths):,} documents {what}"
        for part, what in ((shards.train, "to train on"), (shards.held_out, "held out"))
    )
    return f"{shards.source['name']}, {', '.join(parts)}, {shards.tokenizer.name}"


def opened(options: DataOptions, given: Collection[str], own: Path | None) -> Shards | Source:
    """Data that is prepared, or what is to be. own: the shards of a run that goes on.

    Nothing is written yet.
    """
    if options.path is None and own is not None:
        return Shards(own)
    if options.path is None or not is_prepared(options.path):
        return Source(options.path, options.field)
    for name in sorted({"tokenizer", "field", "held_out"} & set(given)):
        what = f"nothing for data that is prepared ({options.path})"
        check.fail(name.replace("_", "-"), what, getattr(options, name))
    return Shards(options.path)


def shards_of_run(
    console: Console, data: Shards | Source, options: DataOptions, given: Collection[str], out: Path
) -> Shards:
    """The data of a run in `out`: prepared by somebody, in `out` before, or now.

    Raises ValueError where what is in `out` was prepared from other data, or otherwise than given.
    """
    place = out / DATA
    if isinstance(data, Source):
        if not is_prepared(place):
            return prepared(console, data, options, place)
        shards = Shards(place)
        if data.identity != shards.source["identity"]:
            wanted = f"{shards.source['name']} as it was when {place} was prepared from it"
            check.fail("data", wanted, f"{data.name}, other files or changed since")
    elif data.folder != place:
        return data
    else:
        shards = data
    before = {"field": shards.source["field"], "held_out": shards.meta["share_held_out"]}
    for name, value in before.items():
        if name in given and value != getattr(options, name):
            wanted = f"{value} (that of {place})"
            check.fail(name.replace("_", "-"), wanted, getattr(options, name))
    if "tokenizer" in given and not _is_as_asked(shards.tokenizer, options.tokenizer):
        check.fail("tokenizer", f"{shards.tokenizer.name} (that of {place})", options.tokenizer)
    return shards


def _is_as_asked(tokenizer: Tokenizer, option: str) -> bool:
    if option.isdecimal():
        # It may have fewer tokens than were asked for.
        return tokenizer.json is not None and tokenizer.vocab_size <= int(option)
    return tokenizer == (Tokenizer() if option == BYTES else Tokenizer.read(Path(option)))
