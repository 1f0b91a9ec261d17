"""One cell of a study: a small model, trained on a task, and what it answers then."""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from atlas_blocks import compile_blocks
from atlas_blocks.recipes.architectures import Size
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.data.tokenizer import train_tokenizer
from atlas_blocks.recipes.evaluation import Plan, answered
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig
from atlas_blocks.recipes.patterns import Layers, turn_of
from atlas_blocks.recipes.reading import Reader
from atlas_blocks.recipes.registry import fitted, parameter_count, with_memory
from atlas_blocks.recipes.tasks import (
    IGNORE,
    MQARTask,
    NeedleTask,
    RecallTask,
    TextTask,
    TokenTask,
    accuracy,
    resized,
    training_rows,
)
from atlas_blocks.recipes.text import Corpus, standard_library

# Of a test: samples, and tokens of all of them unless they are too few then.
FEWEST, MOST, TOKENS, SEGMENT = 5, 100, 2_000_000, 2048
# Share of the steps before states are passed on: those of what has learnt nothing yet are no use.
PASSED_FROM = 0.4
NAMES = {NeedleTask: "niah-1", RecallTask: "recall", MQARTask: "mqar"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """layers: a recipe's name, a pattern of them, or block configs. changes: settings of every
    memory layer in it. size: where it is not the study's. x: its place on the plot's axis, for one
    that has numbers. passed: after PASSED_FROM of the steps, the share of them whose sequences
    begin with states in which others of the step before ended (state passing, Buitrago Ruiz and
    Gu, arXiv 2507.02782): a long text's memory is full before what is asked for is read."""

    layers: Layers
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: Size | None = None
    x: float | None = None
    passed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Study:
    """what: the question. lengths: of the steps, drawn for each, with as many tokens in all; none:
    the task's. tests: lengths that are answered after the training too. enough: an accuracy that
    ends the training; it is that of `samples` of `fresh`, or else of the task. axis: of the plot:
    what x is, "state" for the numbers in the state, "seconds" for the time of training, "tokens"
    for the lengths of the tests, or "" for none. equal: MLPs as wide as give every model the
    parameters of atlas-mag; else the default width."""

    what: str
    task: TokenTask | TextTask
    size: Size
    variants: Mapping[str, Variant]
    lengths: tuple[int, ...] = ()
    tests: tuple[int, ...] = ()
    steps: int = 1500
    batch: int = 32
    lr: float = 3e-3
    enough: float = 0.99
    every: int = 100
    samples: int = 512
    fresh: TokenTask | None = None
    axis: str = ""
    equal: bool = True


def model_config(study: Study, variant: Variant) -> LanguageModelConfig:
    """The variant at its size."""
    size = variant.size or study.size

    def plain(layers: Layers) -> LanguageModelConfig:
        turn = turn_of(layers, size)
        return LanguageModelConfig(
            name=layers if isinstance(layers, str) else "",
            vocab_size=size.vocab_size,
            dim=size.dim,
            heads=size.heads,
            depth=max(size.depth, len(turn)),
            layers=turn,
        )

    config = plain(variant.layers)
    if study.equal:
        config = fitted(config, parameter_count(plain("atlas-mag")), multiple=size.multiple)
    return with_memory(config, **variant.changes)


@dataclasses.dataclass(frozen=True)
class Crops:
    """Bytes of the standard library's sources, each to be predicted from those before it."""

    length: int = 512
    held_out: bool = False
    vocab_size: int = 256
    chance: float = 1 / 256

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See `TokenTask`."""
        text = corpus().held_out if self.held_out else corpus().train
        starts = torch.randint(len(text) - self.length, (batch,), generator=generator)
        crops = torch.stack([text[s : s + self.length + 1] for s in starts.tolist()]).long()
        return crops[:, :-1], crops[:, 1:]


@functools.cache
def corpus() -> Corpus:
    return standard_library()


@functools.cache
def tokenizer(task: TextTask, size: int) -> Tokenizer:
    """A byte-level BPE of the task's own texts, so that words are tokens and digits are."""
    longer, draws = dataclasses.replace(task, length=2048), random.Random(0)  # type: ignore[type-var]
    texts = []
    for _ in range(200):
        asked = longer.question(Tokenizer(), draws)
        prompt = b"".join(bytes(piece.astype("uint8")) for piece in asked.tokens())
        texts.append([prompt.decode() + asked.continuation])
    return train_tokenizer(texts, size)


def drawn(study: Study, size: Size, seed: int) -> tuple[Tensor, Tensor]:
    """The tokens and targets of a step."""
    # Not the generator of the texts, whose first draw would go with the length.
    length = random.Random(f"length {seed}").choice(study.lengths or (study.task.length,))
    batch = max(1, study.batch * study.task.length // length)
    return rows(resized(study.task, length=length), size, batch, seed)


def rows(task: TokenTask | TextTask, size: Size, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """tokens and targets, int64 [B, T], that depend on the seed alone."""
    if isinstance(task, TextTask):
        coder = tokenizer(task, size.vocab_size)
        tokens, targets = training_rows(task, coder, batch, random.Random(seed))
        # One length for all steps: compiled once.
        room = task.length - tokens.shape[1]
        return F.pad(tokens, (0, room)), F.pad(targets, (0, room), value=IGNORE)
    return task.sample(batch, torch.Generator().manual_seed(seed))


def score(model: Any, study: Study, size: Size, seed: int) -> tuple[float, float]:
    """Of fresh samples the share of answers, of a task in text that of rows whose every token is
    right; and the loss in nats."""
    tokens, targets = rows(study.fresh or study.task, size, study.samples, seed)
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in tokens.split(study.batch)])
    loss = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))
    if not isinstance(study.task, TextTask):
        return accuracy(logits, targets), loss
    right = (logits.argmax(-1) == targets) | (targets == IGNORE)
    return float(right.all(1).float().mean()), loss


def state_numbers(model: LanguageModel, task: TokenTask | TextTask, size: Size) -> int:
    """Numbers in the state after one sequence of the task."""
    with torch.no_grad():
        _, state = model(rows(task, size, 1, 0)[0])
    return sum(leaf.numel() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))


def run_cell(study: Study, variant: Variant, seed: int, *, compiled: bool = True) -> dict[str, Any]:
    """Train it; accuracy on fresh sequences, the steps and the seconds of processor time it took
    (what else the machine does counts little in them), the accuracies on the way, and those on the
    study's tests."""
    size = variant.size or study.size
    torch.manual_seed(seed)
    model = model_config(study, variant).build()
    numbers = state_numbers(model, study.task, size)
    run = compile_blocks(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), study.lr, betas=(0.9, 0.95), weight_decay=0.1)

    passing, ended = random.Random(f"passing {seed}"), None

    def descend(step: int) -> None:
        nonlocal ended
        for group in optimizer.param_groups:
            group["lr"] = study.lr * min(1.0, step / 50) * (1 - 0.9 * step / study.steps)
        tokens, targets = drawn(study, size, seed * 1_000_003 + step)
        begun = None
        if ended and step > PASSED_FROM * study.steps and passing.random() < variant.passed:
            begun = ended[[passing.randrange(len(ended)) for _ in tokens]]
        logits, after = run(tokens, begun)
        ended = after.detach() if variant.passed else None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    course, loss, seconds = [], 0.0, 0.0
    for step in range(1, study.steps + 1):
        began = time.process_time()
        descend(step)
        if step > 1:  # the first compiles
            seconds += time.process_time() - began
        if step % study.every == 0 or step == study.steps:
            fresh = 2**40 + seed * 1_000 + step // study.every  # seeds that no step has
            answered, loss = score(model, study, size, fresh)
            course.append(round(answered, 4))
            if answered >= study.enough:
                break
    found = {
        "accuracy": course[-1],
        "loss": round(loss, 4),
        "steps": step,
        "seconds": round(seconds, 1),
        "course": course,
        "compiled": compiled,
        "state": numbers,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    plain = model.config.build().eval()  # compiled for the steps alone
    plain.load_state_dict(model.state_dict())
    tests = {str(n): tested(plain, study.task, size, n, seed) for n in study.tests}
    return found | ({"tests": tests} if tests else {})


def tested(
    model: LanguageModel, task: TokenTask | TextTask, size: Size, length: int, seed: int
) -> dict[str, Any]:
    """The cell of `atlas-blocks eval` at a length: samples that no step has seen, fewer of long
    ones, their text written by the model."""
    coder = tokenizer(task, size.vocab_size) if isinstance(task, TextTask) else Tokenizer()
    reader = Reader(model.config.name, "", model, coder, size.vocab_size, True, torch.device("cpu"))
    samples = max(FEWEST, min(MOST, TOKENS // length))
    # Its name is a part of what the samples are drawn from.
    plan = Plan((length,), task=NAMES[type(task)], samples=samples, seed=seed, segment=SEGMENT)
    return answered(reader, resized(task, length=length), plan, length)
