"""Many prompts read and continued in one batch, which sequences join and leave at any token.

A step reads some tokens of the prompts that wait, piece by piece and in turn, and then gives every
sequence one token: nothing waits for a long prompt. A prompt is read by itself, in the same pieces
whatever else is going on, and `Rows` keeps the sequences apart, so that each gets what it would get
alone.
"""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes.generate import prefill
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState
from atlas_blocks.recipes.rows import Rows
from atlas_blocks.recipes.sampling import LENGTH, STOP, Continuation, Sampling, choose
from atlas_blocks.recipes.serving.prefixes import Prefix, PrefixCache, keys_of

STOPPING = "the server is stopping"
# Tokens of prompts that are read between two steps of the sequences.
PIECE = 512


class Listener(Protocol):
    """Who is told of a job, in the engine's thread. index: of a sequence among the job's."""

    def read(self, cached: int) -> None:
        """The prompt has been read; so many of its tokens had been before."""

    def token(self, index: int, token: int) -> bool:
        """The next token, none of the stop_ids; True ends the sequence."""
        ...

    def ended(self, index: int, reason: str) -> None:
        """The sequence has no more tokens: STOP or LENGTH."""

    def closed(self, error: str | None) -> None:
        """The last call for the job, whatever became of it; error: what the engine did wrong."""


@dataclass(eq=False)
class Job:
    """A prompt, and the settings of every sequence that continues it.

    state: of what was read before the prompt. keep: gets, of the first sequence at its end, the
    state, its last token, which that state has not read, or None where there is none, and how many
    tokens it had.
    """

    tokens: Sequence[int]
    samplings: Sequence[Sampling]
    listener: Listener
    state: LanguageModelState | None = None
    keep: Callable[[LanguageModelState, int | None, int], None] | None = None
    # What the engine knows of it.
    at: int = 0
    keys: list[bytes] | None = None
    open: int = field(init=False)  # sequences that have not ended
    closed: bool = False

    def __post_init__(self) -> None:
        self.open = len(self.samplings)


@dataclass(eq=False)
class _Sequence:
    job: Job
    index: int
    continuation: Continuation
    last: int


class Engine:
    """`submit` and `cancel` may be called from any thread; everything else belongs to one.

    max_batch: sequences at a time. prefix_cache: bytes of states after beginnings of prompts.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_batch: int = 16,
        piece: int = PIECE,
        prefix_cache: int = 0,
    ) -> None:
        check.at_least("max_batch", max_batch, 1)
        check.at_least("piece", piece, 1)
        check.at_least("prefix_cache", prefix_cache, 0)
        self.model, self.max_batch, self.piece = model.eval(), max_batch, piece
        self.prefixes = PrefixCache(prefix_cache)
        self.sequences: list[_Sequence] = []  # those of the batch, row by row
        self.waiting: deque[Job] = deque()
        self.reading: deque[Job] = deque()
        self._rows = Rows(model)
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._stopping = False

    def submit(self, job: Job) -> None:
        """Raises ValueError where the job has more sequences than ever go on together."""
        if len(job.samplings) > self.max_batch:
            check.fail("n", f"at most {self.max_batch} (--max-batch)", len(job.samplings))
        self._inbox.put(("submit", job))

    def cancel(self, job: Job) -> None:
        """Leave the job alone, where it is not over already."""
        self._inbox.put(("cancel", job))

    def stop(self) -> None:
        """Have `run` return, all jobs cancelled."""
        self._inbox.put(("stop", None))

    def run(self, after_step: Callable[[], None]) -> None:
        """Work until `stop`, and wait where there is nothing to do."""
        while not self._stopping:
            busy = self.step()
            after_step()
            if not busy and not self._stopping:
                self._receive(*self._inbox.get())
        self._stop()
        after_step()

    def step(self) -> bool:
        """One token for every sequence, and some of the prompts; whether there is more to do."""
        while not self._inbox.empty():
            self._receive(*self._inbox.get())
        self._read()
        try:
            self._go_on()
        except Exception as error:
            self._fail([s.job for s in self.sequences], error)
        return bool(self.sequences or self.waiting or self.reading)

    def _receive(self, what: str, job: Job | None) -> None:
        if what == "stop":
            self._stopping = True
        elif what == "submit" and job is not None:
            if self._stopping:
                self._close(job, STOPPING)
            else:
                self.waiting.append(job)
        elif job is not None:
            self._leave([job])
            self._close(job)

    def _stop(self) -> None:
        jobs = self._jobs()
        self._leave(jobs)
        for job in jobs:
            self._close(job, STOPPING)

    def _jobs(self) -> list[Job]:
        found = [*self.waiting, *self.reading, *(s.job for s in self.sequences)]
        return list(dict.fromkeys(found))

    # --- prompts ------------------------------------------------------------------------------

    def _read(self) -> None:
        taken = len(self.sequences) + sum(len(job.samplings) for job in self.reading)
        while self.waiting and taken + len(self.waiting[0].samplings) <= self.max_batch:
            job = self.waiting.popleft()
            taken += len(job.samplings)
            self.reading.append(job)
        left = self.piece
        while self.reading and left > 0:
            job, before = self.reading.popleft(), None
            try:
                before = job.at
                logits = self._read_piece(job)
                left -= job.at - before
                if job.at < len(job.tokens):
                    self.reading.append(job)
                else:
                    self._fork(job, logits)
            except Exception as error:
                self._fail([job], error)

    def _read_piece(self, job: Job) -> Tensor:
        """Logits [1, V] of what comes after the piece."""
        if job.keys is None:
            # After a state of somebody's own nothing is shared.
            caches = self.prefixes.limit and job.state is None
            job.keys = keys_of(job.tokens, self.piece) if caches else []
            found = self.prefixes.longest(job.keys)
            job.listener.read(found.tokens if found else 0)
            if found:
                job.at, job.state = found.tokens, found.state
                if job.at == len(job.tokens):
                    return found.logits
        number = job.at // self.piece
        part = torch.tensor([job.tokens[job.at : job.at + self.piece]], device=self._device)
        logits, job.state = prefill(self.model, part, job.state, piece=self.piece)
        job.at += part.shape[1]
        if job.keys:
            self.prefixes.put(job.keys[number], Prefix(job.at, job.state, logits))
        return logits

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _fork(self, job: Job, logits: Tensor) -> None:
        """The prompt has been read: its sequences begin."""
        state, vocab = job.state, self.model.config.vocab_size
        assert state is not None
        going = [i for i, s in enumerate(job.samplings) if s.max_new_tokens > 0]
        for index, sampling in enumerate(job.samplings):
            if sampling.max_new_tokens == 0:
                self._end(job, index, LENGTH, state, None, 0)
        begun = [Continuation(job.samplings[i], job.tokens, vocab) for i in going]
        tokens = choose(logits.expand(len(begun), -1), begun) if begun else []
        joining = []
        for index, continuation, token in zip(going, begun, tokens, strict=True):
            sequence = _Sequence(job, index, continuation, token)
            reason = self._told(sequence, token)
            if reason is None:
                joining.append(sequence)
            else:
                self._end(job, index, reason, state, token, 1)
        if joining:
            self._rows.join([state[len(joining) * [0]]])
            self.sequences += joining

    # --- sequences ----------------------------------------------------------------------------

    def _go_on(self) -> None:
        if not self.sequences:
            return
        logits = self._rows.step([s.last for s in self.sequences])
        tokens = choose(logits, [s.continuation for s in self.sequences])
        left = []
        for row, (sequence, token) in enumerate(zip(self.sequences, tokens, strict=True)):
            reason = self._told(sequence, token)
            if reason is None:
                left.append(row)
            else:
                job = sequence.job
                # Taken out of the batch only for who wants it.
                state = self._rows.state(row) if job.keep else None
                count = sequence.continuation.count
                self._end(job, sequence.index, reason, state, token, count)
        self._keep(left)

    def _keep(self, rows: list[int]) -> None:
        self._rows.keep(rows)
        self.sequences = [self.sequences[row] for row in rows]

    def _told(self, sequence: _Sequence, token: int) -> str | None:
        """Why the token is the sequence's last, or None; its listener knows of it."""
        sequence.last = token
        reason = sequence.continuation.take(token)
        if reason != STOP and sequence.job.listener.token(sequence.index, token):
            reason = STOP
        return reason

    def _end(
        self,
        job: Job,
        index: int,
        reason: str,
        state: LanguageModelState | None,
        last: int | None,
        count: int,
    ) -> None:
        error = None
        if job.keep is not None and index == 0 and state is not None:
            try:
                job.keep(state, last, count)
            except (OSError, ValueError) as problem:
                error = str(problem)
        if error is None:
            job.listener.ended(index, reason)
        job.open -= 1
        if not job.open or error is not None:
            self._close(job, error)

    # --- the end ------------------------------------------------------------------------------

    def _leave(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for group in (self.waiting, self.reading):
                if job in group:
                    group.remove(job)
        rows = [row for row, s in enumerate(self.sequences) if s.job not in jobs]
        if len(rows) < len(self.sequences):
            self._keep(rows)

    def _close(self, job: Job, error: str | None = None) -> None:
        if not job.closed:
            job.closed, job.state = True, None
            job.listener.closed(error)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        logging.getLogger(__name__).error("the model failed", exc_info=error)
        self._leave(jobs)
        for job in jobs:
            self._close(job, f"{type(error).__name__}: {error}")
