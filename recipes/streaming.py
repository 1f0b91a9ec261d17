"""One long text, read in segments with the state carried on: the memory that it takes does not
depend on its length, unless the model's state grows with it.

    OUT/stream.json                     what has been read, how fast, and with which loss
    OUT/state-000004194304.safetensors  the state after so many tokens, to go on from

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from atlas_blocks import State, check
from atlas_blocks.recipes import describe, display, evaluation, files, training
from atlas_blocks.recipes.bench.report import commit, machine, versions
from atlas_blocks.recipes.describe import human
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState
from atlas_blocks.recipes.reading import Peak, Reader, written
from atlas_blocks.recipes.tasks import TASKS, Question, TextTask, draws_of
from atlas_blocks.recipes.text import safe

RECORD, STATES = "stream.json", "state-*.safetensors"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is read. One of task and file is given; a file that is shorter begins again.

    tokens: in all; of a task with the room for the answer. segment: tokens of a call. every: tokens
    between two lines of the record, and two saves; None: a twentieth. settings: of the task.
    Raises ValueError for what is out of range.
    """

    tokens: int
    task: str | None = None
    file: Path | None = None
    seed: int = 0
    segment: int = 4096
    every: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    prose: Path | None = None

    def __post_init__(self) -> None:
        self.asked()
        if self.every is not None:
            check.at_least("every", self.every, 1)

    def asked(self) -> evaluation.Plan:
        """The same as the plan of an evaluation at one length, which checks it."""
        check.at_least("tokens", self.tokens, 2)
        return evaluation.Plan(
            lengths=(self.tokens,),
            task=self.task,
            file=self.file,
            samples=1,
            seed=self.seed,
            segment=self.segment,
            settings=self.settings,
            prose=self.prose,
        )

    @property
    def stretch(self) -> int:
        """Tokens of a line of the record: whole segments."""
        wanted = self.every or -(-self.tokens // 20)
        return -(-wanted // self.segment) * self.segment


class Source(Protocol):
    """Tokens by their places, of which no more are held than are asked for."""

    def __len__(self) -> int: ...

    def window(self, first: int, last: int) -> Tensor:
        """Tokens first to last, the last left out, int64 [n]."""
        ...


@dataclasses.dataclass(frozen=True)
class Repeated:
    """The tokens [n] of a file, again and again up to `count`."""

    tokens: np.ndarray
    count: int

    def __len__(self) -> int:
        return self.count

    def window(self, first: int, last: int) -> Tensor:
        """See `Source`."""
        places = np.arange(first, min(last, self.count)) % len(self.tokens)
        return torch.from_numpy(np.asarray(self.tokens[places]).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class RepeatedBytes:
    """The bytes of a file of `size`, again and again up to `count`.

    Read where they lie: mapped pages would count as the process's memory.
    """

    path: Path
    size: int
    count: int

    def __len__(self) -> int:
        return self.count

    def window(self, first: int, last: int) -> Tensor:
        """See `Source`."""
        parts, last = [np.empty(0, np.uint8)], min(last, self.count)
        with self.path.open("rb") as file:
            while first < last:
                place = first % self.size
                file.seek(place)
                part = np.frombuffer(file.read(min(last - first, self.size - place)), np.uint8)
                if not len(part):
                    check.fail("file", f"{self.size:,} bytes, as before", "fewer")
                parts.append(part)
                first += len(part)
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt of a question."""

    question: Question

    def __len__(self) -> int:
        return len(self.question)

    def window(self, first: int, last: int) -> Tensor:
        """See `Source`."""
        held, left = [np.empty(0, np.int64)], min(last, len(self)) - first
        for piece in self.question.tokens(max(1, left), first) if left > 0 else ():
            held.append(piece[:left])
            left -= len(held[-1])
            if left == 0:
                break
        return torch.from_numpy(np.concatenate(held))


def _source(reader: Reader, plan: Plan) -> tuple[Source, TextTask | None, Question | None]:
    if not isinstance(reader.model, LanguageModel):
        check.fail("checkpoint", "a model of this library, whose state can be saved", reader.name)
    if plan.file is not None:
        if not reader.has_text:
            got = f"a vocabulary of {reader.vocab_size:,}"
            check.fail("checkpoint", "a model of bytes, or one with a tokenizer, for --file", got)
        tokens = evaluation.file_tokens(plan.file, reader)
        if not len(tokens):
            check.fail("file", "at least one token", f"none in {plan.file}")
        if reader.coder.json is None:
            return RepeatedBytes(plan.file, len(tokens), plan.tokens), None, None
        return Repeated(tokens, plan.tokens), None, None
    check.choice("task", plan.task, TASKS)
    if not isinstance(TASKS[plan.task or ""], TextTask):
        texts = [name for name, given in TASKS.items() if isinstance(given, TextTask)]
        check.fail("task", f"one in text: {', '.join(texts)}", plan.task)
    try:
        given = evaluation.tasks_of(plan.asked(), reader)[plan.tokens]
    except ValueError as error:
        raise ValueError(str(error).replace("lengths: ", "tokens: ", 1)) from None
    assert isinstance(given, TextTask)
    question = given.question(reader.coder, draws_of(plan.task, plan.tokens, plan.seed, 0))
    return Prompt(question), given, question


def _settings(plan: Plan, reader: Reader) -> dict[str, Any]:
    found = evaluation.settings_of(plan.asked(), reader)
    kept = {name: value for name, value in found.items() if name not in ("longest", "samples")}
    return kept | {"tokens": plan.tokens, "every": plan.stretch}


# --- the folder -----------------------------------------------------------------------------------


def _begun(out: Path | None, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The record to go on from. Raises ValueError where the folder does not fit."""
    empty: dict[str, Any] = {"settings": settings, "done": 0, "nats": 0.0, "stretches": []}
    if out is None:
        if resume:
            check.fail("out", "the folder of a stream to resume", "none")
        return empty
    path = out / RECORD
    if not path.exists():
        if resume:
            check.fail("out", "the folder of a stream to resume", f"{out}, without {RECORD}")
        files.check_folder("out", out)
        return empty
    if not resume:
        raise ValueError(f"out: {out} holds a stream; --resume continues it, or name another")
    record = files.read_json("out", path)
    before = record.get("settings")
    if not isinstance(before, dict) or not {*empty} <= {*record}:
        check.fail("out", "a record of this command", path)
    evaluation.check_same(path, before, settings)
    return record


def _state_file(out: Path, done: int) -> Path:
    return out / STATES.replace("*", f"{done:012d}")


def _save(out: Path | None, record: dict[str, Any], state: LanguageModelState | None) -> None:
    """The state first, then the record that names it, and only then the older states go."""
    if out is None:
        return
    if state is not None:
        state.save(_state_file(out, record["done"]))
    files.write_json(out / RECORD, record)
    for old in out.glob(STATES):
        if old != _state_file(out, record["done"]):
            old.unlink()


def checksum(state: State) -> str:
    """SHA-256 of all tensors of a state, in order."""
    found = hashlib.sha256()
    for tensor in state.tensors():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


# --- the run --------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Stretch:
    """What is measured between two lines of the record."""

    peak: Peak
    nats: float = 0.0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def line(self, done: int, state: LanguageModelState) -> dict[str, Any]:
        return {
            "done": done,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "nats_per_token": self.nats / max(1, self.targets),
            "peak_bytes": self.peak.bytes(),
            "peak_since_start": self.peak.since_start,
            "state_bytes": state.nbytes,
        }


def run(
    console: Console, reader: Reader, plan: Plan, out: Path | None, *, resume: bool = False
) -> dict[str, Any] | None:
    """Read it all, answer, print the record as a table; None where Ctrl-C or SIGTERM came first,
    and what had been read is saved in `out`.

    Resumed, the state, the loss and the answer are those of a run that nobody interrupted, bit for
    bit, on the same machine with as many threads. Raises ValueError, before anything is read, for
    what does not fit.
    """
    source, given, question = _source(reader, plan)
    record = _begun(out, _settings(plan, reader), resume)
    last = {"state_checksum"} if question is None else {"state_checksum", "answer"}
    if last <= {*record}:
        console.print(_table(record))
        return record
    if question is not None and record["done"] == len(source) and "next_token" not in record:
        got = f"{out}, of a former version, without: name another folder"
        check.fail("out", "a stream with the token that its answer begins with", got)
    state = _loaded(out, record, reader)
    if describe.state_grows(reader.model.config):
        console.print("the state of this model grows with the text, and the memory with it")
    here = {"hardware": machine(reader.device), "versions": versions(), "commit": commit()}
    if resume:
        # Each part keeps its own; the first has its at the top.
        record["resumed"] = [*record.get("resumed", ()), {"done": record["done"], **here}]
    else:
        record |= here
    with training.graceful_interrupt() as interrupted:
        for after, whole in _segments(console, reader, source, plan, record, state, interrupted):
            state = after
            if whole:
                _save(out, record, state)
        if record["done"] < len(source):
            _save(out, record, state)
        else:
            assert state is not None
            record["state_checksum"] = checksum(state)
            if given is not None and question is not None:
                text = _answer(reader, given, question, record["next_token"], state, interrupted)
                if not interrupted.is_set():
                    record["answer"] = {
                        "question": question.asked,
                        "wanted": list(question.answers),
                        "given": text,
                        "score": given.score(question, text),
                    }
            _save(out, record, None)
    if not last <= {*record}:
        kept = f"; [bold]{out}[/] goes on with --resume" if out is not None else ""
        console.print(f"interrupted after {record['done']:,} of {len(source):,} tokens{kept}")
        return None
    console.print(_table(record))
    return record


def _answer(
    reader: Reader,
    given: TextTask,
    question: Question,
    token: int,
    state: LanguageModelState,
    interrupted: threading.Event,
) -> str:
    """What the model writes after the prompt, `token` first; less where somebody interrupts."""

    def done(text: str) -> bool:
        return interrupted.is_set() or given.finished(question, text)

    return written(reader, token, state, given.new_tokens, done)


def _loaded(out: Path | None, record: dict[str, Any], reader: Reader) -> LanguageModelState | None:
    if not record["done"]:
        return None
    assert out is not None
    path = _state_file(out, record["done"])
    try:
        state = State.load(path)
    except FileNotFoundError:
        check.fail("out", f"the state after {record['done']:,} tokens, {path}", "no such file")
    except (OSError, ValueError) as error:
        raise ValueError(f"out: {error}") from error
    if not isinstance(state, LanguageModelState):
        check.fail("out", "the state of a model", type(state).__name__)
    return state.to(reader.device)


def _segments(
    console: Console,
    reader: Reader,
    source: Source,
    plan: Plan,
    record: dict[str, Any],
    state: LanguageModelState | None,
    interrupted: threading.Event,
) -> Iterator[tuple[LanguageModelState, bool]]:
    """Read on to the end, or until somebody interrupts: the state after each segment, and whether a
    line of the record is complete."""
    total, began, start = len(source), time.perf_counter(), record["done"]
    with display.working(console, f"reading {total:,} tokens") as say:
        part = _Stretch(Peak(reader.device))
        while record["done"] < total and not interrupted.is_set():
            first = record["done"]
            last = min(first + plan.segment, total)
            before = time.perf_counter()
            # One more, which is the last one's target.
            tokens = source.window(first, last + 1)
            logits, state = reader.read(tokens[None, : last - first], state)
            targets = tokens[1:].to(logits.device)
            found = logits[0, : len(targets)].float()
            nats = float(F.cross_entropy(found, targets, reduction="sum")) if len(targets) else 0.0
            record["done"] = last
            record["next_token"] = int(logits[0, -1].argmax())
            record["nats"] += nats
            part.nats += nats
            part.targets += len(targets)
            part.tokens += last - first
            part.seconds += time.perf_counter() - before
            whole = last % plan.stretch == 0 or last == total
            assert state is not None
            if whole or console.is_terminal:
                speed = part.tokens / part.seconds
                left = (time.perf_counter() - began) / (last - start) * (total - last)
                say(
                    f"{last:,} of {total:,}  {100 * last / total:.0f} %  {speed:,.0f} tokens/s  "
                    f"{display.duration(left)} left"
                )
            if whole:
                record["stretches"].append(part.line(last, state))
                part = _Stretch(Peak(reader.device))
            yield state, whole
        if part.tokens and state is not None:
            record["stretches"].append(part.line(record["done"], state))


def _table(record: dict[str, Any]) -> display.Whole:
    settings = record["settings"]
    found = Table(title=f"{settings['checkpoint']}, {settings.get('task') or 'a file'}")
    for name in ("tokens", "tokens/s", "bits per token", "peak", "state"):
        found.add_column(name, justify="right", no_wrap=True)
    for line in record["stretches"]:
        found.add_row(
            f"{line['done']:,}",
            f"{line['tokens_per_second']:,.0f}",
            f"{line['nats_per_token'] / np.log(2):.3f}",
            human(line["peak_bytes"], "B"),
            human(line["state_bytes"], "B"),
        )
    answer = record.get("answer")
    if answer is not None:
        wanted = ", ".join(answer["wanted"])
        given = escape(safe(" ".join(answer["given"].split())))
        found.caption = f"{answer['question']} {wanted}; answered: {given}"
    return display.Whole(found)
