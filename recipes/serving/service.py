"""The engine in a thread of its own, asked and listened to from an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from atlas_blocks import check
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState
from atlas_blocks.recipes.sampling import Sampling
from atlas_blocks.recipes.serving.chat import Chat
from atlas_blocks.recipes.serving.engine import PIECE, Engine, Job
from atlas_blocks.recipes.serving.sessions import Sessions
from atlas_blocks.recipes.serving.text import Writer

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Options:
    """How a model is served.

    max_batch: sequences at a time. piece: tokens of prompts that are read between two of their
    steps. prefix_cache: MiB of states after beginnings of prompts. sessions: the folder of those.
    chat_template: see `chat`. threads: of torch for one operation; with more than 1 the last bits
    of a sequence depend on those beside it.
    """

    max_batch: int = 16
    piece: int = PIECE
    prefix_cache: int = 256
    sessions: Path | None = None
    chat_template: Path | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch", "piece", "threads"):
            check.at_least(name.replace("_", "-"), getattr(self, name), 1)
        check.at_least("prefix-cache", self.prefix_cache, 0)


@dataclass(frozen=True)
class Delta:
    """What one token adds to an answer; reason: why it was the last."""

    choice: int
    text: str
    tokens: list[int]
    reason: str | None = None


@dataclass(frozen=True)
class Closed:
    """A prompt's answers are over; cached: its tokens that had been read before."""

    cached: int
    error: str | None


@dataclass(frozen=True)
class Prompt:
    """What becomes a job: the engine's, and the strings that end its text."""

    tokens: Sequence[int]
    samplings: Sequence[Sampling]
    stop: Sequence[str] = ()
    state: LanguageModelState | None = None
    keep: Callable[[LanguageModelState, int | None, int], None] | None = None
    over: Callable[[], None] = lambda: None  # whatever becomes of it


class Failed(Exception):
    """The model, or the disk, did."""


class Disconnected(Exception):
    """Nobody waits for the answer any more."""


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Asking:
    """Prompts that are being answered. Whoever asked leaves in the end, come what may."""

    def __init__(self, engine: Engine) -> None:
        self.jobs: list[Job] = []
        self.events: asyncio.Queue[Delta | Closed | None] = asyncio.Queue()
        self._engine = engine

    async def answers(self, receive: Receive) -> AsyncGenerator[Delta | Closed, None]:
        """What comes of the prompts until all are `Closed`.

        receive: tells when the client has gone. Raises Disconnected then, and Failed.
        """
        watching, left = asyncio.create_task(self._watch(receive)), len(self.jobs)
        try:
            while left:
                event = await self.events.get()
                if event is None:
                    raise Disconnected
                if isinstance(event, Closed):
                    left -= 1
                    if event.error is not None:
                        raise Failed(event.error)
                yield event
        finally:
            watching.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.events.put_nowait(None)

    def leave(self) -> None:
        """What has not been answered is given up."""
        for job in self.jobs:
            if not job.closed:
                self._engine.cancel(job)


class Service:
    """A model with its tokenizer, and who is being answered."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, options: Options = Options()
    ) -> None:
        """Raises ValueError for an option that cannot be followed."""
        self.model, self.tokenizer, self.name = model, tokenizer, model.config.name
        self.chat = Chat(tokenizer, options.chat_template)
        self.sessions = None if options.sessions is None else Sessions(options.sessions, model)
        self.engine = Engine(
            model,
            max_batch=options.max_batch,
            piece=options.piece,
            prefix_cache=options.prefix_cache * MEBIBYTE,
        )
        self._threads = options.threads
        self._outbox: list[tuple[asyncio.Queue, Delta | Closed]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """In the event loop that asks."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anything is answered."""
        return self._thread.is_alive()

    async def stop(self) -> None:
        """Whoever is being answered gets no more."""
        self.engine.stop()
        await asyncio.to_thread(self._thread.join)

    def ask(self, prompts: Sequence[Prompt]) -> Asking:
        """Have the prompts answered, choices numbered in their order."""
        asking, first = Asking(self.engine), 0
        for prompt in prompts:
            answer = _Answer(partial(self._post, asking.events), first, prompt, self.tokenizer)
            first += len(prompt.samplings)
            asking.jobs.append(
                Job(prompt.tokens, prompt.samplings, answer, prompt.state, prompt.keep)
            )
        for job in asking.jobs:
            self.engine.submit(job)
        return asking

    # --- in the engine's thread ---------------------------------------------------------------

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        self.engine.run(self._deliver)

    def _post(self, events: asyncio.Queue, event: Delta | Closed) -> None:
        self._outbox.append((events, event))

    def _deliver(self) -> None:
        """All that a step gave, at once: waking the loop for every token would cost more."""
        posted, self._outbox = self._outbox, []
        if posted and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, posted)


def _put(posted: list[tuple[asyncio.Queue, Any]]) -> None:
    for events, event in posted:
        events.put_nowait(event)


@dataclass
class _Answer:
    """The engine's listener for one prompt."""

    post: Callable[[Delta | Closed], None]
    first: int
    prompt: Prompt
    tokenizer: Tokenizer
    cached: int = 0
    writers: list[Writer] = field(init=False)

    def __post_init__(self) -> None:
        self.writers = [Writer(self.tokenizer, self.prompt.stop) for _ in self.prompt.samplings]

    def read(self, cached: int) -> None:
        self.cached = cached

    def token(self, index: int, token: int) -> bool:
        writer = self.writers[index]
        self.post(Delta(self.first + index, writer.write(token), [token]))
        return writer.stopped

    def ended(self, index: int, reason: str) -> None:
        self.post(Delta(self.first + index, self.writers[index].end(), [], reason))

    def closed(self, error: str | None) -> None:
        self.prompt.over()
        self.post(Closed(self.cached, error))
