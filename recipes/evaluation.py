"""What a model remembers, by the length of what it has read: tasks, and perplexity over a file.

A cell is one length. It is written as soon as it is done, so that a command that was interrupted
goes on where it stopped.

B batch, T tokens, L length.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes import display, files
from atlas_blocks.recipes.bench.report import commit, machine, versions
from atlas_blocks.recipes.data.sources import is_binary
from atlas_blocks.recipes.describe import human
from atlas_blocks.recipes.reading import Peak, Reader, even, file_digest, written
from atlas_blocks.recipes.tasks import (
    IGNORE,
    TASKS,
    Prose,
    TextTask,
    TokenTask,
    draws_of,
    effective,
    macro_accuracy,
    task,
    wilson,
)

RESULTS, PLOT = "eval.json", "eval.png"
# Samples of a task over tokens that are read together, at most.
ROWS = 32
# Tokens at the end of each text whose loss counts.
SCORED = 128
# Texts of at most so many tokens are all drawn before any is read.
TRIED = 16_384
SUFFIXES = {"k": 1024, "m": 1024 * 1024}
# Settings of tasks that have options of their own.
OPTIONS = ("length", "prose")
OWN_PROSE = "the task's own"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked. One of task and file is given.

    lengths: tokens, each a cell. samples: of each cell. segment: tokens of a call, whose state the
    next goes on from; memory grows with it and not with a length. settings: of the task, such as
    pairs=8. prose: a text to hide facts in, None: the task's own.
    Raises ValueError for what is out of range.
    """

    lengths: tuple[int, ...]
    task: str | None = None
    file: Path | None = None
    samples: int = 100
    seed: int = 0
    segment: int = 4096
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    prose: Path | None = None

    def __post_init__(self) -> None:
        if (self.task is None) == (self.file is None):
            check.fail("task", "one of --task and --file", "both" if self.task else "neither")
        if not self.lengths:
            check.fail("lengths", "at least one", "none")
        for length in self.lengths:
            check.at_least("lengths", length, 2)
        for name in ("samples", "segment"):
            check.at_least(name, getattr(self, name), 1)
        check.at_least("seed", self.seed, 0)
        if self.file is not None and (self.settings or self.prose):
            check.fail("set" if self.settings else "prose", "a --task beside it", "a --file")


def tokens_of(name: str, text: str) -> tuple[int, ...]:
    """Numbers of tokens such as "512,4k,1m": k is 1,024, m 1,048,576. Raises ValueError."""
    found = []
    for part in text.lower().split(","):
        part = part.strip()
        number, unit = (part[:-1], part[-1]) if part[-1:] in SUFFIXES else (part, "")
        if not (number.isascii() and number.isdigit()):
            check.fail(name, "numbers of tokens such as 512,4k,1m", repr(text))
        found.append(int(number) * SUFFIXES.get(unit, 1))
    return tuple(found)


# --- before anything is read --------------------------------------------------------------------


def tasks_of(plan: Plan, reader: Reader) -> dict[int, TokenTask | TextTask]:
    """The task at every length, tried. Raises ValueError that names the argument that is
    wrong: the task, one of its settings, or a length."""
    assert plan.task is not None
    check.choice("task", plan.task, TASKS)
    given, settings = TASKS[plan.task], dict(plan.settings)
    names = {field.name for field in dataclasses.fields(given)} - {*OPTIONS}  # type: ignore[arg-type]
    for name in settings:
        if name in OPTIONS:
            check.fail("set", "settings that have no option of their own", name)
        check.choice("set", name, names)
    if isinstance(given, TextTask):
        if not reader.has_text:
            wanted = "a model of bytes, or one with a tokenizer, for a task in text"
            check.fail("checkpoint", wanted, f"a vocabulary of {reader.vocab_size:,}")
        if plan.prose is not None:
            settings["prose"] = Prose.read(plan.prose)
    elif plan.prose is not None:
        check.fail("prose", "a task in text", plan.task)
    if getattr(given, "decoder", False):
        check.fail("task", "one for a language model", f"{plan.task}, whose decoder is another")
    found = {}
    for length in plan.lengths:
        reader.check_room("lengths", length)
        try:
            one = task(plan.task, length=length, **settings)
            if isinstance(one, TextTask):
                # Some samples need more room than others: of short texts every one is tried.
                for number in range(plan.samples if length <= TRIED else 1):
                    one.question(reader.coder, draws_of(plan.task, length, plan.seed, number))
            elif one.vocab_size > reader.vocab_size:
                got = f"{reader.vocab_size:,} in {reader.name}"
                check.fail("checkpoint", f"a vocabulary of at least {one.vocab_size:,}", got)
        except ValueError as error:
            words = str(error)
            raise ValueError(
                f"lengths{words.removeprefix('length')}" if words.startswith("length:") else words
            ) from None
        found[length] = one
    return found


def text_of(plan: Plan, reader: Reader) -> Tensor:
    """The file's tokens, [N]. Raises ValueError where they cannot be read or are too few."""
    assert plan.file is not None
    if not reader.has_text:
        got = f"a vocabulary of {reader.vocab_size:,}"
        check.fail("checkpoint", "a model of bytes, or one with a tokenizer, for --file", got)
    least, most = min(plan.lengths), max(plan.lengths)
    if least <= SCORED:
        check.fail("lengths", f"more than the {SCORED} tokens that count", least)
    reader.check_room("lengths", most)
    tokens = file_tokens(plan.file, reader)
    if len(tokens) < most:
        check.fail("file", f"at least {most:,} tokens, the longest length", f"{len(tokens):,}")
    return torch.from_numpy(tokens.astype(np.int64))


def file_tokens(path: Path, reader: Reader) -> np.ndarray:
    """The tokens [N] of a file, of bytes without a copy of it. Raises ValueError."""
    try:
        if is_binary(path):
            raise ValueError("binary data, no text")
        if not path.stat().st_size:  # which cannot be mapped
            return np.empty(0, np.uint8)
        if reader.coder.json is None:
            return np.memmap(path, np.uint8, mode="r")
        return reader.coder.encode([path.read_text(encoding="utf-8")])[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"file: cannot read {path}: {error}") from error


def settings_of(plan: Plan, reader: Reader) -> dict[str, Any]:
    """What the cells of one folder have in common, by the names of the arguments."""
    found: dict[str, Any] = {"checkpoint": f"{reader.name} {reader.fingerprint[:16]}"}
    if plan.file is not None:
        found |= {"file": file_digest(plan.file)[:16], "longest": max(plan.lengths)}
    else:
        found |= {"task": plan.task, "set": plan.settings}
        given = TASKS[plan.task or ""]
        if isinstance(given, TextTask):
            digest = None if plan.prose is None else file_digest(plan.prose)[:16]
            found["prose"] = digest or OWN_PROSE
    found |= {"samples": plan.samples, "seed": plan.seed, "segment": plan.segment}
    return found | {"device": reader.device.type}


def opened(out: Path, settings: dict[str, Any], results: str, what: str) -> dict[str, Any]:
    """The record in a folder as far as it has come, or an empty one. Raises ValueError, which names
    the argument, where it is of other settings."""
    path = out / results
    if not path.exists():
        files.check_folder("out", out)
        return {"what": what, "settings": settings, "cells": {}}
    record = files.read_json("out", path)
    before = record.get("settings")
    if not isinstance(before, dict) or not isinstance(record.get("cells"), dict):
        check.fail("out", "results of this command", path)
    check_same(path, before, settings)
    return record


def check_same(path: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ValueError, which names the argument, where settings are others than those of the
    record at `path`. Of a file, the longest length may be shorter."""
    old, new = (
        "a file" if "file" in found else f"the task {found.get('task')}"
        for found in (before, settings)
    )
    if "file" in {**before, **settings} and old != new:
        check.fail("out", f"results of {new}", f"{path}, of {old}: name another folder")
    for name in {**before, **settings}:
        old, new = before.get(name), settings.get(name)
        if name == "longest" and isinstance(old, int) and isinstance(new, int):
            if new > old:
                wanted = f"at most {old:,}, the longest that {path} began with"
                got = f"{new:,}, whose texts end elsewhere: name another folder"
                check.fail("lengths", wanted, got)
        elif old != new:
            check.fail(name, *_in_words(name, old, new, path))


def _in_words(name: str, old: Any, new: Any, path: Path) -> tuple[str, str]:
    """What was expected and what came, of a setting that is another. A digest says nothing to
    people."""
    if name == "checkpoint":
        old, new = (str(value).rpartition(" ")[0] for value in (old, new))
        if old == new:
            return f"{old} with the weights that {path} began with", "other weights"
    if name in ("file", "prose"):
        if old != OWN_PROSE:
            changed = "another one, or it has changed"
            return f"the text that {path} began with", new if new == OWN_PROSE else changed
        new = "a file"
    old, new = (
        (", ".join(f"{key}={one}" for key, one in value.items()) or "none")
        if isinstance(value, dict)
        else str(value)
        for value in (old, new)
    )
    return f"{old}, as in {path}", new


# --- one cell -------------------------------------------------------------------------------------


def answered(
    reader: Reader, given: TokenTask | TextTask, plan: Plan, length: int
) -> dict[str, Any]:
    """The cell of one length: how many answers are right, and what it took."""
    peak, began = Peak(reader.device), time.perf_counter()
    if isinstance(given, TextTask):
        rights, asked, tokens, seconds, macro = _in_text(reader, given, plan, length)
    else:
        rights, asked, tokens, seconds, macro = _in_tokens(reader, given, plan, length)
    share, worth = sum(rights) / sum(asked), effective(rights, asked)
    low, high = wilson(share * worth, worth)
    cell = {
        "samples": len(asked),
        "answers": sum(asked),
        "accuracy": share,
        "low": low,
        "high": high,
        "independent_answers": worth,
        "chance": given.chance,
    }
    return cell | macro | _cost(peak, tokens, seconds, began)


def _cost(peak: Peak, tokens: int, seconds: float, began: float) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak.bytes(),
        "peak_since_start": peak.since_start,
        "seconds": time.perf_counter() - began,
    }


Answers = tuple[list[float], list[int], int, float, dict[str, float]]


def _in_text(reader: Reader, given: TextTask, plan: Plan, length: int) -> Answers:
    rights: list[float] = []
    asked, tokens, seconds = [], 0, 0.0
    for number in range(plan.samples):
        # Of its own number alone: more samples begin with the same.
        draws = draws_of(plan.task, length, plan.seed, number)
        question = given.question(reader.coder, draws)
        began, state, logits = time.perf_counter(), None, torch.empty(0)
        for piece in even(question.tokens(), plan.segment):
            found, state = reader.read(piece, state)
            logits = found[0, -1].clone()
        seconds += time.perf_counter() - began
        tokens += len(question)

        def done(text: str, question: Any = question) -> bool:
            return given.finished(question, text)

        text = written(reader, int(logits.argmax()), state, given.new_tokens, done)
        asked.append(len(question.answers))
        rights.append(given.score(question, text) * asked[-1])
    return rights, asked, tokens, seconds, {}


def _in_tokens(reader: Reader, given: TokenTask, plan: Plan, length: int) -> Answers:
    rights: list[float] = []
    asked: list[int] = []
    told: list[Tensor] = []
    wanted: list[Tensor] = []
    count, seconds = 0, 0.0
    for tokens, targets in _batches(given, plan, length):
        began = time.perf_counter()
        answers, state = torch.full_like(targets, IGNORE), None
        width = max(1, plan.segment // len(tokens))
        for first in range(0, tokens.shape[1], width):
            logits, state = reader.read(tokens[:, first : first + width], state)
            answers[:, first : first + width] = logits.argmax(-1).cpu()
        seconds += time.perf_counter() - began
        count += tokens.numel()
        places = targets != IGNORE
        rights += ((answers == targets) & places).sum(1).tolist()
        asked += places.sum(1).tolist()
        told.append(answers[places])
        wanted.append(targets[places])
    if not getattr(given, "macro", False):
        return rights, asked, count, seconds, {}
    macro = macro_accuracy(torch.cat(told), torch.cat(wanted))
    return rights, asked, count, seconds, {"macro_accuracy": macro}


def _batches(given: TokenTask, plan: Plan, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples, as many together as a segment holds."""
    rows = max(1, min(ROWS, plan.segment // length))
    for first in range(0, plan.samples, rows):
        drawn = []
        for number in range(first, min(first + rows, plan.samples)):
            # Of its own number alone: more samples begin with the same.
            seed = draws_of(plan.task, length, plan.seed, number).getrandbits(62)
            drawn.append(given.sample(1, torch.Generator().manual_seed(seed)))
        yield torch.cat([t for t, _ in drawn]), torch.cat([t for _, t in drawn])


def perplexity_interval(losses: Sequence[float]) -> tuple[float | None, float | None]:
    """Of the mean loss in nats of samples, at 95 %, as perplexities; none of a single sample."""
    if len(losses) < 2:
        return None, None
    mean, error = statistics.fmean(losses), statistics.stdev(losses) / math.sqrt(len(losses))
    # No loss is below 0, and no perplexity below 1.
    return math.exp(max(0.0, mean - 1.96 * error)), math.exp(mean + 1.96 * error)


def predicted(
    reader: Reader, text: Tensor, plan: Plan, length: int, longest: int
) -> dict[str, Any]:
    """The cell of one length of a file: the loss of the last SCORED tokens of texts [L].

    The texts of all lengths end at the same places, spread evenly from `longest` on, so that the
    same tokens are predicted from more or less of what is before them.
    """
    peak, began = Peak(reader.device), time.perf_counter()
    losses, seconds = [], 0.0
    for number in range(plan.samples):
        end = longest + (len(text) - longest) * number // max(1, plan.samples - 1)
        tokens = text[end - length : end]
        start, state = time.perf_counter(), None
        before = tokens[: length - SCORED - 1]
        for piece in before.split(plan.segment) if len(before) else ():
            _, state = reader.read(piece[None], state)
        logits, _ = reader.read(tokens[None, length - SCORED - 1 : -1], state)
        scored = tokens[length - SCORED :].to(logits.device)
        losses.append(float(F.cross_entropy(logits[0].float(), scored)))
        seconds += time.perf_counter() - start
    mean = statistics.fmean(losses)
    low, high = perplexity_interval(losses)
    cell = {
        "samples": plan.samples,
        "scored": plan.samples * SCORED,
        "nats": mean,
        "perplexity": math.exp(mean),
        "low": low,
        "high": high,
    }
    return cell | _cost(peak, plan.samples * length, seconds, began)


# --- the run --------------------------------------------------------------------------------------


def run(console: Console, reader: Reader, plan: Plan, out: Path | None) -> dict[str, Any]:
    """Every cell that `out`/eval.json has not; print the table.

    Ctrl-C loses the cell in hand alone. Raises ValueError, before anything is read, for what does
    not fit the model or the folder.
    """
    text = None if plan.file is None else text_of(plan, reader)
    given = tasks_of(plan, reader) if text is None else {}
    settings = settings_of(plan, reader)
    what = "Answers of a model by length; every cell is a number of tokens"
    record = {"what": what, "settings": settings, "cells": {}}
    if out is not None:
        record = opened(out, settings, RESULTS, what)
    here = {"hardware": machine(reader.device), "versions": versions(), "commit": commit()}
    # At the top those that it began with: a later command may have others, which its cells tell.
    record |= {**here, **record}
    cells = record["cells"]
    todo = [length for length in dict.fromkeys(plan.lengths) if str(length) not in cells]
    if len(cells) > 0:
        console.print(f"{out} has {len(cells)} cells, {len(todo)} are left")
    try:
        for number, length in enumerate(todo, 1):
            words = f"{number} of {len(todo)}: {length:,} tokens, {plan.samples} samples"
            with display.working(console, words):
                if text is None:
                    cell = answered(reader, given[length], plan, length)
                else:
                    cell = predicted(reader, text, plan, length, record["settings"]["longest"])
            cells[str(length)] = cell | here
            if out is not None:
                files.write_json(out / RESULTS, record)
    except KeyboardInterrupt:
        if out is not None:
            console.print(f"interrupted; {out} has {len(cells)} cells, the same command goes on")
        raise
    console.print(table(record))
    if out is not None:
        names = [RESULTS, *plot(console, out / PLOT, record)]
        console.print(f"[bold]{out}[/]: {', '.join(names)}")
    return record


def plot(console: Console, path: Path, record: dict[str, Any]) -> list[str]:
    """The cells with their intervals by length; the file's name, or none without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        console.print(f"no {path.name}: matplotlib is missing (pip install 'atlas-blocks[plot]')")
        return []
    cells = sorted((int(length), cell) for length, cell in record["cells"].items())
    settings = record["settings"]
    score = "accuracy" if "task" in settings else "perplexity"
    lengths, values = [n for n, _ in cells], [cell[score] for _, cell in cells]
    ends = [
        (cell[score], cell[score]) if cell["low"] is None else (cell["low"], cell["high"])
        for _, cell in cells
    ]
    figure = Figure(figsize=(6, 3.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.fill_between(lengths, [a for a, _ in ends], [b for _, b in ends], alpha=0.2)
    axes.plot(lengths, values, "o-")
    if score == "accuracy":
        axes.plot(lengths, [cell["chance"] for _, cell in cells], ":", color="gray")
        axes.set_ylim(-0.02, 1.02)
    axes.set_xscale("log", base=2)
    name = settings.get("task") or "a file"
    axes.set(xlabel="tokens", ylabel=score, title=f"{name}, {settings['checkpoint']}")
    axes.grid(alpha=0.2)
    figure.savefig(path)
    return [path.name]


def table(record: dict[str, Any]) -> display.Whole:
    """The cells, short to long."""
    settings = record["settings"]
    found = Table(title=f"{settings['checkpoint']}, {settings.get('task') or 'a file'}")
    score = "accuracy" if "task" in settings else "perplexity"
    for name in ("length", score, "95 %", "chance", "tokens/s", "peak"):
        found.add_column(name, justify="right", no_wrap=True)
    for length, cell in sorted(record["cells"].items(), key=lambda item: int(item[0])):
        if score == "accuracy":
            numbers = [f"{100 * cell[name]:.1f} %" for name in ("accuracy", "low", "high")]
            chance = f"{100 * cell['chance']:.1f} %"
        else:
            parts = ("perplexity", "low", "high")
            numbers = ["" if cell[n] is None else f"{cell[n]:.3f}" for n in parts]
            chance = ""
        peak = human(cell["peak_bytes"], "B")
        speed = f"{cell['tokens_per_second']:,.0f}"
        interval = f"{numbers[1]} to {numbers[2]}" if numbers[1] else ""
        found.add_row(f"{int(length):,}", numbers[0], interval, chance, speed, peak)
    return display.Whole(found)
