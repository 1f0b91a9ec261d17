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
from atlas_blocks.recipes.patterns import turn_of
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

# Of a test: samples, and tokens of all of them unless they are too few then.
FEWEST, MOST, TOKENS, SEGMENT = 5, 100, 2_000_000, 2048
NAMES = {NeedleTask: "niah-1", RecallTask: "recall", MQARTask: "mqar"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """layers: a recipe's name or a pattern of them. changes: settings of every memory layer in it.
    size: where it is not the study's. x: its place on the plot's axis, for one that has numbers."""

    layers: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: Size | None = None
    x: float | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """what: the question. lengths: of the steps, drawn for each, with as many tokens in all; none:
    the task's. tests: lengths that are answered after the training too. enough: an accuracy that
    ends the training. axis: of the plot: what x is, "state" for the numbers in the state, "seconds"
    for the time of training, "tokens" for the lengths of the tests, or "" for none. equal: MLPs as
    wide as give every model the parameters of atlas-mag; else the default width."""

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
    axis: str = ""
    equal: bool = True


def model_config(study: Study, variant: Variant) -> LanguageModelConfig:
    """The variant at its size."""
    size = variant.size or study.size

    def plain(layers: str) -> LanguageModelConfig:
        turn = turn_of(layers, size)
        return LanguageModelConfig(
            name=layers,
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
    length = random.Random(seed).choice(study.lengths or (study.task.length,))
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


def score(model: Any, task: TokenTask | TextTask, size: Size, seed: int, count: int) -> float:
    """Share of answers; of a task in text, of rows whose every token is right."""
    tokens, targets = rows(task, size, count, seed)
    with torch.no_grad():
        logits = torch.cat([model(part).logits for part in tokens.split(128)])
    if not isinstance(task, TextTask):
        return accuracy(logits, targets)
    right = (logits.argmax(-1) == targets) | (targets == IGNORE)
    return float(right.all(1).float().mean())


def state_numbers(model: LanguageModel, task: TokenTask | TextTask, size: Size) -> int:
    """Numbers in the state after one sequence of the task."""
    with torch.no_grad():
        _, state = model(rows(task, size, 1, 0)[0])
    return sum(leaf.numel() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))


def run_cell(study: Study, variant: Variant, seed: int, *, compiled: bool = True) -> dict[str, Any]:
    """Train it; accuracy on fresh sequences, the steps and seconds it took, the accuracies on the
    way, and those on the study's tests."""
    size = variant.size or study.size
    torch.manual_seed(seed)
    model = model_config(study, variant).build()
    numbers = state_numbers(model, study.task, size)
    run = compile_blocks(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), study.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def descend(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = study.lr * min(1.0, step / 50) * (1 - 0.9 * step / study.steps)
        tokens, targets = drawn(study, size, seed * 1_000_003 + step)
        logits = run(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    began, course = time.perf_counter(), []
    for step in range(1, study.steps + 1):
        descend(step)
        if step == 1:
            began = time.perf_counter()  # what it takes to compile is no part of it
        if step % study.every == 0 or step == study.steps:
            fresh = 2**40 + seed * 1_000 + step // study.every  # seeds that no step has
            course.append(round(score(model, study.task, size, fresh, 512), 4))
            if course[-1] >= study.enough:
                break
    found = {
        "accuracy": course[-1],
        "steps": step,
        "seconds": round(time.perf_counter() - began, 1),
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
