"""The training loop: packed batches, AdamW or Muon, a schedule of the rate, clipping, and what
keeps a run from being lost: steps that are skipped, saves, signals.

B batch, L length of a crop, T = B L in a packed batch, N pieces of documents in it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from atlas_blocks import Config, check
from atlas_blocks.blocks.feed_forward import balance_loss
from atlas_blocks.recipes import text
from atlas_blocks.recipes.data.batches import Batch
from atlas_blocks.recipes.losses import batch_loss, fresh_state
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState
from atlas_blocks.recipes.optimizers import adamw, muon

if TYPE_CHECKING:
    from atlas_blocks.recipes.distributed.parallel import Parallel

# Good losses that a spike is measured against, and from how many on.
WINDOW, ENOUGH = 50, 25
OPTIMIZERS = {"adamw": adamw, "muon": muon}
SCHEDULES = ("cosine", "wsd")
# How many pieces a batch has, which differs from step to step: so that the first graph is for all.
PIECES = r"L['cu_seqlens'].cu_seqlens,L['cu_seqlens'].bounds,L\['state'\].*:0"

Batches = Callable[[int], Sequence[Batch]]
"""The micro-batches of a step, from its number."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Config):
    """What defines a run besides the model and the text.

    batch, length: B crops of L tokens, `accumulate` times for each step. optimizer: "adamw", or
    "muon" for the blocks' matrices and AdamW for the rest. warmup: share of the steps over which
    the rate rises to `lr`. schedule: "cosine" then falls to a tenth; "wsd" stays, and falls to zero
    over the share `decay` at the end. clip: largest norm of the gradient. bf16: autocast the
    forward pass. carry: a document longer than a crop goes on in the next step with the state it
    had (truncated back-propagation through time). compile: every block by torch.compile.
    spike: standard deviations above the mean of the last losses from which one is a spike, 0 for
    never. patience: steps in a row that may be skipped, for a spike or what is not finite.
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
    accumulate: int = 1
    optimizer: str = "adamw"
    schedule: str = "cosine"
    decay: float = 0.2
    carry: bool = False
    compile: bool = False
    spike: float = 8.0
    patience: int = 3

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "length", "accumulate"):
            check.at_least(field, getattr(self, field), 1)
        check.between("lr", self.lr, 0, 1)
        check.between("warmup", self.warmup, 0, 1)
        check.between("decay", self.decay, 0, 1)
        check.between("clip", self.clip, 1e-6, 1e6)
        check.between("weight_decay", self.weight_decay, 0, 1e6)
        # Every step has a seed of its own, and a generator takes 64 bits.
        check.at_least("seed", self.seed, -(2**32))
        check.between("seed", self.seed, -(2**32), 2**32)
        check.choice("optimizer", self.optimizer, OPTIMIZERS)
        check.choice("schedule", self.schedule, SCHEDULES)
        for field in ("bf16", "carry", "compile"):
            check.boolean(field, getattr(self, field))
        check.between("spike", self.spike, 0, 1e6)
        check.at_least("patience", self.patience, 0)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        warmup = max(1, round(self.steps * self.warmup))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "wsd":
            return self.lr * min(1.0, (self.steps - step) / max(1, round(self.steps * self.decay)))
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * progress))

    @property
    def tokens(self) -> int:
        """Predictions of a step."""
        return self.batch * self.length * self.accumulate


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback is told after each step (`step` of `steps` done).

    skipped: why the step left the weights as they were; empty where it did not. balance: mean
    balance loss of the mixtures of experts, 1 where all are used alike; None without any.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    skipped: str = ""
    balance: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """losses: one per step run here that was not skipped. step: steps done in all. interrupted:
    Ctrl-C or SIGTERM came first."""

    losses: list[float]
    step: int
    seconds: float
    interrupted: bool


class BadStep(FloatingPointError):
    """A loss or gradient was not finite, or the loss a spike; the weights are as they were."""

    def __init__(self, message: str, loss: float, norm: float) -> None:
        super().__init__(message)
        self.loss, self.norm = loss, norm


class Diverged(FloatingPointError):
    """More bad steps in a row than patience allows. step: steps done before the last of them;
    batches: its own.

    The weights and the optimizer are those after `step` steps.
    """

    def __init__(self, message: str, step: int, batches: Sequence[Batch]) -> None:
        super().__init__(message)
        self.step, self.batches = step, batches


@dataclasses.dataclass
class TrainingState:
    """Where a run stands, besides its weights and its optimizer.

    step: steps done, and so the place in the data. skipped: bad steps in a row. losses: the last
    good ones. carried: for every micro-batch the state that its crops go on from, or none. rng:
    torch's generators, by device, where they are to be set.
    """

    step: int = 0
    skipped: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    carried: list[LanguageModelState | None] = dataclasses.field(default_factory=list)
    rng: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def record(self) -> str:
        """What is no tensor, as JSON."""
        return json.dumps({"skipped": self.skipped, "losses": self.losses})

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """What is carried, and the generators as they are now."""
        found = {"rng.cpu": torch.get_rng_state()}
        if device.type == "cuda":
            found["rng.cuda"] = torch.cuda.get_rng_state(device)
        for place, state in enumerate(self.carried):
            leaves = [] if state is None else pytree.tree_leaves(state)
            found |= {f"carried.{place}.{i}": t for i, t in enumerate(leaves)}
        return found

    @staticmethod
    def restored(
        model: LanguageModel, step: int, record: str, tensors: Mapping[str, Tensor]
    ) -> TrainingState:
        """From what `record` and `tensors` gave, for the same model.

        Raises ValueError where they do not fit it.
        """
        device = next(model.parameters()).device
        carried: dict[int, dict[int, Tensor]] = {}
        rng = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "carried":
                place, _, index = rest.partition(".")
                carried.setdefault(int(place), {})[int(index)] = tensor
            else:
                rng[rest] = tensor
        told = json.loads(record) if record else {}
        state = TrainingState(step, told.get("skipped", 0), told.get("losses", []), rng=rng)
        if carried:
            spec = pytree.tree_structure(fresh_state(model, torch.zeros(1, 0).long().to(device)))
            for place in range(max(carried) + 1):
                leaves = [t for _, t in sorted(carried.get(place, {}).items())]
                if leaves and len(leaves) != spec.num_leaves:
                    check.fail("carried", f"a state of {spec.num_leaves} tensors", len(leaves))
                whole = pytree.tree_unflatten(leaves, spec).to(device) if leaves else None
                state.carried.append(whole)
        return state

    def spike_from(self, config: TrainingConfig) -> float:
        """The loss from which one is a spike."""
        if not config.spike or len(self.losses) < ENOUGH:
            return math.inf
        # Not by the module `statistics`, which takes longer than a step of a small model may.
        mean = sum(self.losses) / len(self.losses)
        variance = sum((loss - mean) ** 2 for loss in self.losses) / len(self.losses)
        # A loss that hardly moves is no reason to call the next one a spike.
        return mean + config.spike * max(math.sqrt(variance), 0.01 * mean)


def check_one_process() -> None:
    """Raise ValueError in one of several ranks: each would do the same work over again."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
    if ranks > 1:
        check.fail("training", "one process, as it divides no work", f"{ranks} ranks")


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the config names, over all parameters; only matrices decay."""
    return OPTIMIZERS[config.optimizer](model, config.lr, config.weight_decay)


def crops(data: Tensor, config: TrainingConfig) -> Batches:
    """Random crops of one text [N]; documents in it are not told apart."""

    def batches(step: int) -> list[Batch]:
        numbers = range(step * config.accumulate, (step + 1) * config.accumulate)
        size = (config.batch, config.length, config.seed)
        return [Batch.of(text.random_batch(data, *size, number)) for number in numbers]

    return batches


# --- a step -----------------------------------------------------------------------------------


def train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    config: TrainingConfig,
    step: int,
) -> tuple[float, float]:
    """One update on rows [B, L + 1]; returns and raises as `descend`."""
    optimizer.zero_grad()
    loss, _ = accumulate(model, [Batch.of(rows)], config, [])
    return update(model, optimizer, loss, config, step)


def accumulate(
    model: LanguageModel,
    batches: Sequence[Batch],
    config: TrainingConfig,
    carried: Sequence[LanguageModelState | None],
    parallel: Parallel | None = None,
    balanced: list[Tensor] | None = None,
) -> tuple[Tensor, list[LanguageModelState | None]]:
    """Add the gradient of the mean loss over micro-batches of equal size to the parameters';
    returns the loss and what each carries on. carried: from the step before; [] for nothing.
    parallel: batches are this rank's parts; the loss is that of all. The loss of mixtures of
    experts is added for the gradient; balanced: takes its mean of every micro-batch, see
    `balance_loss`."""
    device = next(model.parameters()).device
    loss_of = batch_loss if parallel is None else parallel.loss
    losses, after = [], []
    for batch, state in itertools.zip_longest(batches, carried):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss, state = loss_of(model, batch.to(device), state)
        balance = balance_loss(model)
        ((loss if balance is None else loss + balance[0]) / len(batches)).backward()
        if balance is not None and balanced is not None:
            balanced.append(balance[1])
        losses.append(loss.detach())
        after.append(state)
    mean = torch.stack(losses).mean()
    if parallel is not None:
        parallel.add_up(model)
        mean = parallel.mean(mean)
    return mean, after


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
    optimizer.zero_grad()
    loss.backward()
    return update(model, optimizer, loss.detach(), config, step)


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    config: TrainingConfig,
    step: int,
    *,
    spike_from: float = math.inf,
) -> tuple[float, float]:
    """The optimizer's step along the gradients, clipped; returns the loss and the gradient norm.

    Raises BadStep, before the weights are touched, where either is not finite, or the loss is at
    least `spike_from`.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.lr_at(step)
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    # Of gradients in shards, what all ranks hold.
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    loss_value, norm_value = loss.item(), norm.item()
    why = ""
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        why = f"loss {loss_value}, gradient norm {norm_value}"
    elif loss_value >= spike_from:
        why = f"loss {loss_value:.3f}, a spike from {spike_from:.3f} on"
    if why:
        raise BadStep(f"step {step + 1}: {why}", loss_value, norm_value)
    optimizer.step()
    return loss_value, norm_value


# --- the run ----------------------------------------------------------------------------------


def train(
    model: LanguageModel,
    data: Batches | Tensor,
    config: TrainingConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    state: TrainingState | None = None,
    on_step: Callable[[Progress], None] | None = None,
    save: Callable[[int], None] | None = None,
    save_every: int | None = None,
    validate: Callable[[int], None] | None = None,
    validate_every: int | None = None,
    parallel: Parallel | None = None,
) -> TrainingResult:
    """Train on batches, or on random crops of one text [N], from where `state` stands to
    `config.steps`; it moves along.

    validate, save: told the steps done after every `..._every` of them and at the end; `save` also
    where the end is early. A bad step (see BadStep) is skipped. Ctrl-C or SIGTERM ends the run
    after the step in hand, so that the model is always whole; a second one interrupts at once.
    parallel: the ranks over which the model is; each gives its own batches, and calls this.
    Raises Diverged where more steps in a row are bad than `config.patience`, and ValueError in one
    of several ranks without `parallel`.
    """
    if parallel is None:
        check_one_process()
    optimizer = optimizer or make_optimizer(model, config)
    state = state or TrainingState()
    batches = crops(data, config) if isinstance(data, Tensor) else data
    _set_generators(state.rng)
    losses: list[float] = []
    seconds: collections.deque[float] = collections.deque(maxlen=20)
    began, saved, validated = time.perf_counter(), state.step, -1
    with graceful_interrupt() as interrupted, compiled_blocks(model, config, parallel):

        def stopped() -> bool:
            # Ranks stop after the same step, whichever of them was told.
            told = interrupted.is_set()
            return told if parallel is None else parallel.any(told)

        while state.step < config.steps and not stopped():
            at = time.perf_counter()
            own = batches(state.step)
            balanced: list[Tensor] = []
            loss, norm, skipped = _step(model, optimizer, own, config, state, parallel, balanced)
            if not skipped:
                losses.append(loss)
            seconds.append(time.perf_counter() - at)
            each = sum(seconds) / len(seconds)
            if on_step is not None:
                on_step(
                    Progress(
                        step=state.step,
                        steps=config.steps,
                        loss=loss,
                        lr=config.lr_at(state.step - 1),
                        grad_norm=norm,
                        tokens_per_second=config.tokens / each,
                        seconds_left=each * (config.steps - state.step),
                        skipped=skipped,
                        balance=torch.stack(balanced).mean().item() if balanced else None,
                    )
                )
            due = validate_every and state.step % validate_every == 0
            if validate and due and not stopped():
                validate(state.step)
                validated = state.step
            if save and save_every and state.step % save_every == 0:
                save(state.step)
                saved = state.step
        if save and saved < state.step:
            save(state.step)
        ended_early = stopped()
        if validate and validated < state.step and not ended_early:
            validate(state.step)
            ended_early = stopped()
    return TrainingResult(losses, state.step, time.perf_counter() - began, ended_early)


def _step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    config: TrainingConfig,
    state: TrainingState,
    parallel: Parallel | None,
    balanced: list[Tensor],
) -> tuple[float, float, str]:
    """The next step of a run: loss, gradient norm, and why it was skipped or "". balanced: as of
    `accumulate`.

    Raises Diverged.
    """
    optimizer.zero_grad()
    mean, carried = accumulate(model, batches, config, state.carried, parallel, balanced)
    limit = state.spike_from(config)
    try:
        loss, norm = update(model, optimizer, mean, config, state.step, spike_from=limit)
    except BadStep as error:
        if state.skipped == config.patience:
            raise Diverged(str(error), state.step, batches) from error
        # What a bad step read is not gone on from.
        state.skipped, state.carried = state.skipped + 1, []
        state.step += 1
        return error.loss, error.norm, str(error)
    state.skipped, state.carried = 0, carried if config.carry else []
    state.losses = [*state.losses, loss][-WINDOW:]
    state.step += 1
    return loss, norm, ""


def _set_generators(rng: Mapping[str, Tensor]) -> None:
    for device, generator in rng.items():
        if device == "cpu":
            torch.set_rng_state(generator)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(generator)


@contextlib.contextmanager
def compiled_blocks(
    model: LanguageModel, config: TrainingConfig, parallel: Parallel | None = None
) -> Iterator[None]:
    """Every block compiled, where the config wants it, and room for the graphs of all kinds."""
    if not config.compile or not (parallel is None or parallel.layout.compiles):
        yield
        return
    # Imported here: it takes seconds.
    passes = importlib.import_module("atlas_blocks.compile_passes")
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    compiler: Any = importlib.import_module("torch.compiler.config")
    passes.compile_blocks(model)
    with (
        dynamo.patch(recompile_limit=passes.backend.GRAPHS),
        compiler.patch(dynamic_sources=PIECES),
    ):
        yield


@contextlib.contextmanager
def graceful_interrupt() -> Iterator[threading.Event]:
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
