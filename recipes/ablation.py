"""Ablations: the paper's switches (its Table 6) and ours, each against Atlas on a small task.

Every variant is Atlas with one thing changed, its MLP as wide as gives it Atlas's parameters. A
cell is one variant trained with one seed. It is written as soon as it is done, so that a run that
was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    Config,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    SlidingWindowAttentionConfig,
    check,
)
from atlas_blocks.recipes import display, files, registry, text
from atlas_blocks.recipes.architectures import SIZES
from atlas_blocks.recipes.bench.report import commit, machine, versions
from atlas_blocks.recipes.display import duration
from atlas_blocks.recipes.losses import bits_per_byte, next_byte_loss
from atlas_blocks.recipes.model import BlockConfig, LanguageModel, LanguageModelConfig
from atlas_blocks.recipes.tasks import IGNORE, RecallTask, accuracy
from atlas_blocks.recipes.training import (
    TrainingConfig,
    check_one_process,
    descend,
    make_optimizer,
)

BASE = "atlas"
TINY = SIZES["tiny"]
ATTENTION = SlidingWindowAttentionConfig(window=TINY.reach)


def _block(**changes: Any) -> Callable[[AtlasMemoryConfig], BlockConfig]:
    return lambda memory: AtlasBlockConfig(memory.replace(**changes))


@dataclasses.dataclass(frozen=True)
class Switch:
    """One change to Atlas. block: its block from Atlas's memory. paper: what Table 6 has at 760M,
    mean perplexity and mean accuracy, where it has the switch."""

    block: Callable[[AtlasMemoryConfig], BlockConfig]
    paper: str = ""


SWITCHES = {
    BASE: Switch(_block(), "19.97 / 52.77"),
    "gated-mlp": Switch(_block(memory="gated_mlp"), "19.53 / 53.09"),
    "mag": Switch(lambda memory: MemoryAsGateConfig(memory, ATTENTION), "19.90 / 53.08"),
    "mal": Switch(lambda memory: MemoryAsLayerConfig(memory, ATTENTION), "20.26 / 52.63"),
    "linear-memory": Switch(_block(memory="matrix"), "21.03 / 49.74"),
    "no-muon": Switch(_block(update="gd"), "19.65 / 52.56"),
    "window-1": Switch(_block(window=1), "21.98 / 49.26"),
    "no-polynomial": Switch(_block(feature_map="identity"), "22.14 / 50.57"),
    "window-4": Switch(_block(window=4)),
    "degree-3": Switch(_block(degree=3)),
    "chunk-16": Switch(_block(chunk_size=16)),
    "ns-every-8": Switch(_block(ns_every=8)),
}


@dataclasses.dataclass(frozen=True)
class AblationConfig(Config):
    """What every cell shares. task: "text" (bytes of Python's standard library; held-out bits per
    byte) or "recall" (RecallTask; accuracy on fresh sequences). length: of a crop, or of a recall
    sequence of `pairs` pairs. The model has the tiny recipes' other settings."""

    task: str = "text"
    switches: tuple[str, ...] = tuple(SWITCHES)
    seeds: int = 3
    steps: int = 300
    batch: int = 4
    length: int = 128
    pairs: int = 8
    lr: float = 4e-3
    dim: int = TINY.dim
    heads: int = TINY.heads
    depth: int = TINY.depth

    def __post_init__(self) -> None:
        check.choice("task", self.task, TASKS)
        for switch in self.switches:
            check.choice("switches", switch, SWITCHES)
        if BASE not in self.switches:
            check.fail("switches", f"{BASE} among them", ", ".join(self.switches) or "none")
        for name in ("seeds", "dim", "heads", "depth"):
            check.at_least(name, getattr(self, name), 1)
        self.training(0)
        self.model(BASE)  # raises where the sizes do not fit

    def training(self, seed: int) -> TrainingConfig:
        return TrainingConfig(
            steps=self.steps, batch=self.batch, length=self.length, lr=self.lr, seed=seed
        )

    def recall(self) -> RecallTask:
        return RecallTask(length=self.length, pairs=self.pairs, keys=4 * self.pairs)

    def model(self, switch: str) -> LanguageModelConfig:
        """The variant, its MLP fitted to the parameters of Atlas with the default MLP."""
        memory = AtlasMemoryConfig(expansion=TINY.expansion)
        vocabulary = self.recall().vocab_size if self.task == "recall" else text.VOCAB_SIZE

        def of(name: str) -> LanguageModelConfig:
            return LanguageModelConfig(
                name=name,
                vocab_size=vocabulary,
                dim=self.dim,
                heads=self.heads,
                depth=self.depth,
                block=SWITCHES[name].block(memory),
            )

        # A multiple of 1: at these sizes every hidden unit counts.
        return registry.fitted(of(switch), registry.parameter_count(of("mag")), multiple=1)


@dataclasses.dataclass(frozen=True)
class Task:
    """loss(model, config, seed, step), score(model, config), what the score is, and whether more
    of it is better."""

    loss: Callable[[LanguageModel, AblationConfig, int, int], Tensor]
    score: Callable[[LanguageModel, AblationConfig], float]
    unit: str
    more_is_better: bool


@functools.cache
def _corpus() -> text.Corpus:
    return text.standard_library()


def _text_loss(model: LanguageModel, config: AblationConfig, seed: int, step: int) -> Tensor:
    rows = text.random_batch(_corpus().train, config.batch, config.length, seed, step)
    return next_byte_loss(model, rows)


def _text_score(model: LanguageModel, config: AblationConfig) -> float:
    return bits_per_byte(model, _corpus().held_out, length=config.length)


def _recall_loss(model: LanguageModel, config: AblationConfig, seed: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    tokens, targets = config.recall().sample(config.batch, generator)
    logits = model(tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


@torch.no_grad()
def _recall_score(model: LanguageModel, config: AblationConfig) -> float:
    # A seed that no training step has.
    tokens, targets = config.recall().sample(256, torch.Generator().manual_seed(2**40))
    return accuracy(model(tokens).logits, targets)


TASKS = {
    "text": Task(_text_loss, _text_score, "held-out bits per byte", more_is_better=False),
    "recall": Task(_recall_loss, _recall_score, "share of keys recalled", more_is_better=True),
}


def train_cell(config: AblationConfig, switch: str, seed: int) -> dict[str, Any]:
    """Train one variant with one seed: {"score", "seconds"}, or {"diverged": why}."""
    task, began = TASKS[config.task], time.perf_counter()
    torch.manual_seed(seed)
    model = config.model(switch).build()
    training = config.training(seed)
    optimizer = make_optimizer(model, training)
    try:
        for step in range(config.steps):
            descend(model, optimizer, task.loss(model, config, seed, step), training, step)
    except FloatingPointError as error:
        return {"diverged": str(error)}
    return {
        "score": task.score(model, config),
        "seconds": time.perf_counter() - began,
    }


# --- the run and its file ---------------------------------------------------------------------


def run(console: Console, config: AblationConfig, out: Path) -> dict[str, Any]:
    """Train every cell that `out`/ablation.json does not have yet; print the table, plot.

    Ctrl-C loses the cell in hand alone. Raises ValueError where the file is of another config.
    """
    check_one_process()
    path = out / "ablation.json"
    result = _load(path, config)
    files.check_folder("out", out)
    cells = result["cells"]
    todo = [
        (switch, seed)
        for seed in range(config.seeds)
        for switch in config.switches
        if _key(switch, seed) not in cells
    ]
    if len(cells) > 0:
        console.print(f"{path} has {len(cells)} cells, {len(todo)} are left")
    try:
        for i, (switch, seed) in enumerate(todo, 1):
            with display.working(console, f"{i} of {len(todo)}: {switch}, seed {seed}"):
                cell = train_cell(config, switch, seed)
            cells[_key(switch, seed)] = cell
            files.write_json(path, result)
            words = cell.get("diverged") or f"{cell['score']:.3f}  {duration(cell['seconds'])}"
            console.print(f"{i} of {len(todo)}  {switch}, seed {seed}: {words}")
    except KeyboardInterrupt:
        console.print(f"interrupted; {path} has {len(cells)} cells, the same command goes on")
        raise
    console.print(table(config, cells))
    written = [path.name, *plot(console, out / "ablation.png", config, cells)]
    console.print(f"[bold]{out}[/]: {', '.join(written)}")
    return result


def _key(switch: str, seed: int) -> str:
    return f"{switch}/{seed}"


def _load(path: Path, config: AblationConfig) -> dict[str, Any]:
    """The file as far as it has come, or an empty one. More seeds or switches continue a run."""
    if not path.exists():
        return {
            "what": "Atlas with one thing changed at a time; every cell is a switch and a seed",
            "score": TASKS[config.task].unit,
            "config": config.to_dict(),
            "hardware": machine(torch.device("cpu")),
            "versions": versions(),
            "commit": commit(),
            "cells": {},
        }
    result = files.read_json("out", path)
    cells = result.get("cells")
    try:
        before = Config.from_dict(result.get("config"))
    except ValueError as error:
        raise ValueError(f"out: {path} is no ablation ({error})") from error
    if not isinstance(cells, dict) or not all(map(_is_cell, cells.values())):
        raise ValueError(f"out: {path} is no ablation (its cells are none)")
    if not isinstance(before, AblationConfig) or before != config.replace(
        seeds=before.seeds, switches=before.switches
    ):
        raise ValueError(f"out: {path} is of another config; name another folder")
    return {**result, "config": config.to_dict()}


def _is_cell(cell: Any) -> bool:
    """What `train_cell` returns."""
    if not isinstance(cell, dict):
        return False
    figures = (cell.get("score"), cell.get("seconds"))
    return "diverged" in cell or all(isinstance(value, (int, float)) for value in figures)


def _of(config: AblationConfig, cells: dict[str, Any], switch: str, field: str) -> dict[int, float]:
    """One figure of a switch, by seed; not of seeds that diverged."""
    found = {seed: cells[_key(switch, seed)] for seed in range(config.seeds)}
    return {seed: cell[field] for seed, cell in found.items() if field in cell}


def against_base(config: AblationConfig, cells: dict[str, Any], switch: str) -> list[float]:
    """Score less that of Atlas with the same seed, so the same data: much of the spread cancels."""
    ours, base = (_of(config, cells, name, "score") for name in (switch, BASE))
    return [score - base[seed] for seed, score in ours.items() if seed in base]


def table(config: AblationConfig, cells: dict[str, Any]) -> display.Whole:
    """Mean and spread of every switch, beside Atlas and the paper."""
    task = TASKS[config.task]
    weights = registry.parameter_count(config.model(BASE))
    found = Table(
        title=f"{task.unit} after {config.steps} steps of {config.batch} x {config.length}, "
        f"{config.seeds} seeds",
        caption=f"± one standard deviation over seeds; s: median seconds of a cell; every variant "
        f"has {weights:,} weights within 1 %. paper: mean perplexity / accuracy at 760M.",
    )
    found.add_column("switch", style="cyan", no_wrap=True)
    for column in ("mean ± spread", "- atlas, by seed", "s", "paper"):
        found.add_column(column, justify="right", no_wrap=True)
    for switch in config.switches:
        values = _of(config, cells, switch, "score")
        seconds = _of(config, cells, switch, "seconds")
        lost = config.seeds - len(values)
        found.add_row(
            switch,
            _mean(list(values.values()), ".3f") + (f", {lost} diverged" if lost else ""),
            "" if switch == BASE else _mean(against_base(config, cells, switch), "+.3f"),
            f"{statistics.median(seconds.values()):.0f}" if seconds else "-",
            SWITCHES[switch].paper,
        )
    return display.Whole(found)


def _mean(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def plot(console: Console, path: Path, config: AblationConfig, cells: dict[str, Any]) -> list[str]:
    """Every seed as a dot, the mean as a bar; the file's name, or none without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        console.print(f"no {path.name}: matplotlib is missing (pip install 'atlas-blocks[plot]')")
        return []
    task = TASKS[config.task]
    figure = Figure(figsize=(7, 0.6 + 0.35 * len(config.switches)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, switch in enumerate(config.switches):
        values = list(_of(config, cells, switch, "score").values())
        if values:
            colour = "tab:orange" if switch == BASE else "tab:blue"
            axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.5)
            axes.plot([statistics.mean(values)], [row], "|", color=colour, markersize=16)
    axes.set_yticks(range(len(config.switches)), config.switches)
    axes.invert_yaxis()
    better = "more" if task.more_is_better else "less"
    axes.set(xlabel=f"{task.unit} ({better} is better), {config.steps} steps")
    axes.grid(alpha=0.2)
    figure.savefig(path)
    return [path.name]
