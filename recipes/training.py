"""A small training loop for bytes: AdamW, warm-up and cosine, clipping, bits per byte.

B batch, L length of a crop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atlas_blocks import Config, check
from atlas_blocks.recipes import text
from atlas_blocks.recipes.model import LanguageModel

# Tokens of the held-out text that are read, at most.
HELD_OUT = 32_768


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Config):
    """What defines a run besides the model and the text.

    warmup: share of the steps over which the rate rises to `lr`; a cosine then takes it to a
    tenth. clip: largest norm of the gradient. bf16: autocast the forward pass.
    """

    steps: int
    batch: int = 8
    length: int = 128
    lr: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "length"):
            check.at_least(field, getattr(self, field), 1)
        check.between("lr", self.lr, 0, 1)
        check.between("warmup", self.warmup, 0, 1)
        check.between("clip", self.clip, 1e-6, 1e6)
        check.between("weight_decay", self.weight_decay, 0, 1e6)
        # Every step has a seed of its own, and a generator takes 64 bits.
        check.at_least("seed", self.seed, -(2**32))
        check.between("seed", self.seed, -(2**32), 2**32)
        check.boolean("bf16", self.bf16)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        warmup = max(1, round(self.steps * self.warmup))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback is told after each step (`step` of `steps` done)."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """losses: one per step run here. step: steps done in all. interrupted: Ctrl-C or SIGTERM came
    first."""

    losses: list[float]
    step: int
    seconds: float
    interrupted: bool


class Diverged(FloatingPointError):
    """A loss or gradient was not finite. step: steps done before; rows: the batch, [B, L + 1].

    The weights and the optimizer are those after `step` steps.
    """

    def __init__(self, message: str, step: int, rows: Tensor) -> None:
        super().__init__(message)
        self.step, self.rows = step, rows


def check_one_process() -> None:
    """Raise ValueError in one of several ranks: each would do the same work over again."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    if ranks > 1:
        check.fail("training", "one process, as it divides no work", f"{ranks} ranks")


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; only matrices decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def next_byte_loss(model: LanguageModel, rows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of every token of rows [B, L + 1] after the first."""
    logits = model(rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction=reduction)


def train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    config: TrainingConfig,
    step: int,
) -> tuple[float, float]:
    """One update on rows [B, L + 1]; returns and raises as `descend`."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=config.bf16):
        loss = next_byte_loss(model, rows)
    return descend(model, optimizer, loss, config, step)


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    config: TrainingConfig,
    step: int,
) -> tuple[float, float]:
    """One update down a loss of the model; returns the loss and the gradient norm.

    Raises FloatingPointError, before the weights are touched, where either is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise FloatingPointError(
            f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}"
        )
    optimizer.step()
    return loss.item(), norm.item()


def train(
    model: LanguageModel,
    data: Tensor,
    config: TrainingConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    on_step: Callable[[Progress], None] | None = None,
    save: Callable[[int], None] | None = None,
    save_every: int | None = None,
) -> TrainingResult:
    """Train on random crops of data uint8 [bytes], from step `start` to `config.steps`.

    save: told the steps done after every `save_every` of them, and at the end, also where that
    is early. Ctrl-C or SIGTERM ends the run after the step in hand, so that the model is always
    whole; a second one interrupts at once. Raises Diverged at the first loss or gradient that is
    not finite, and ValueError in one of several ranks.
    """
    check_one_process()
    optimizer = optimizer or make_optimizer(model, config)
    device = next(model.parameters()).device
    losses: list[float] = []
    began = time.perf_counter()
    with _graceful_interrupt() as interrupted:
        for step in range(start, config.steps):
            rows = text.random_batch(data, config.batch, config.length, config.seed, step)
            try:
                loss, norm = train_step(model, optimizer, rows.to(device), config, step)
            except FloatingPointError as error:
                raise Diverged(str(error), step, rows) from error
            losses.append(loss)
            if on_step is not None:
                each = (time.perf_counter() - began) / len(losses)
                on_step(
                    Progress(
                        step=step + 1,
                        steps=config.steps,
                        loss=loss,
                        lr=config.lr_at(step),
                        grad_norm=norm,
                        tokens_per_second=config.batch * config.length / each,
                        seconds_left=each * (config.steps - step - 1),
                    )
                )
            if interrupted.is_set():
                break
            if save and save_every and (step + 1) % save_every == 0 and step + 1 < config.steps:
                save(step + 1)
        if save:
            save(start + len(losses))
    seconds = time.perf_counter() - began
    return TrainingResult(losses, start + len(losses), seconds, interrupted.is_set())


@contextlib.contextmanager
def _graceful_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event. Signals reach the main thread only."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            # None: it was not set from Python, and Python cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@torch.no_grad()
def bits_per_token(
    model: LanguageModel, data: Tensor, *, length: int, batch: int = 16, limit: int = HELD_OUT
) -> float:
    """Mean bits per token over consecutive windows of the first `limit` tokens of data [N]."""
    device = next(model.parameters()).device
    nats, count = 0.0, 0
    for rows in text.windows(data, batch, length, limit):
        nats += next_byte_loss(model, rows.to(device), "sum").item()
        count += rows.shape[0] * length
    return nats / count / math.log(2)


def bits_per_byte(
    model: LanguageModel, data: Tensor, *, length: int, batch: int = 16, limit: int = HELD_OUT
) -> float:
    """`bits_per_token` where tokens are bytes. Raises ValueError for data other than uint8."""
    check.tensor("data", data, "[bytes]", (None,), (torch.uint8,))
    return bits_per_token(model, data, length=length, batch=batch, limit=limit)
