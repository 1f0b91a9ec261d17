"""Tasks where a Transformer fails and Dot succeeds at equal size and budget.

"parity" asks for the parity of all bits so far: a state to follow, which a layer of attention, a
weighted mean, does not do, and a memory whose write can turn a value over does.
"overwrite" asks for the newest value of a key that was written several times. Attention that has a
short convolution learns it as well; without one it does not in this time.
Every model has the same number of parameters, sees the same batches and takes the same steps.
A run is written as soon as it is done, so that a command that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from atlas_blocks import AtlasBlockConfig, DeepTransformerConfig, SlidingWindowAttentionConfig
from atlas_blocks.blocks.stacks import Mixer
from atlas_blocks.recipes import display, files
from atlas_blocks.recipes.bench.report import stamp
from atlas_blocks.recipes.model import LanguageModelConfig
from atlas_blocks.recipes.registry import parameter_count
from atlas_blocks.recipes.tasks import IGNORE, OverwriteTask, ParityTask, accuracy
from atlas_blocks.recipes.training import check_one_process

DIM, HEADS = 32, 2
BATCH, PEAK = 32, 3e-3
# The parameters are those of Dot with an MLP of this width.
WIDTH = 2 * DIM

# Dot takes each token's error at the memory just before it (chunks of one), and its write may have
# twice the strength that replaces a value, so as to turn it over. Softmax attention is shown as it
# comes and in Dot's own dress: short convolution, normed and gated output.
MIXERS: dict[str, Callable[[], Mixer]] = {
    "transformer": lambda: SlidingWindowAttentionConfig(window=None),
    "transformer, with Dot's convolution and gate": lambda: DeepTransformerConfig(
        gates="none", qk_norm="rms", rope_base=1e4
    ),
    "deep-transformer": DeepTransformerConfig,
    "dot": lambda: DeepTransformerConfig(
        objective="l2",
        errors="chunk",
        chunk_size=1,
        eta_max=2.0,
        eta_init=1.0,
        retention_init=0.999,
    ),
}
Task = ParityTask | OverwriteTask
TASKS: dict[str, Callable[[], Task]] = {"parity": ParityTask, "overwrite": OverwriteTask}


def model_config(name: str, task: Task, depth: int) -> LanguageModelConfig:
    """The model called `name`, its MLP as wide as brings it nearest to Dot's parameters."""

    def config(mixer: Mixer, width: int) -> LanguageModelConfig:
        block = AtlasBlockConfig(mixer, mlp_width=width)
        return LanguageModelConfig(name, task.vocab_size, DIM, HEADS, depth, block)

    mixer = MIXERS[name]()
    aim = parameter_count(config(MIXERS["dot"](), WIDTH))
    one, two = (parameter_count(config(mixer, width)) for width in (1, 2))
    return config(mixer, max(1, 1 + round((aim - one) / (two - one))))


def train(config: LanguageModelConfig, task: Task, steps: int, seed: int) -> float:
    """Accuracy after `steps` batches drawn from `seed`, on the later half of 512 fresh sequences.

    Every model learns the parity of the first few bits.
    """
    torch.manual_seed(seed)
    model = config.build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
        tokens, targets = task.sample(BATCH, generator)
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    tokens, targets = task.sample(512, torch.Generator().manual_seed(1_000_000 + seed))
    with torch.no_grad():
        late = slice(task.length // 2, None)
        return accuracy(model(tokens).logits[:, late], targets[:, late])


def run(
    console: Console,
    *,
    out: Path,
    task: Task,
    depth: int,
    steps: int,
    seeds: int,
) -> dict[str, list[float]]:
    """Train every model with every seed that `out` does not have yet; print a table.

    The accuracies by model, of `seeds` seeds each. Raises ValueError where `out` is of another run.
    """
    check_one_process()
    result = _load(out, {"task": str(task), "depth": depth, "steps": steps, "batch": BATCH})
    files.check_writable("out", out)
    accuracies: dict[str, list[float]] = result["accuracy"]
    table = Table(title=f"{task}, {steps} steps of {BATCH} sequences")
    for column in ("model", "parameters", "accuracy", "over the seeds"):
        table.add_column(column)
    for name in MIXERS:
        config = model_config(name, task, depth)
        scores = accuracies.setdefault(name, [])
        for seed in range(len(scores), seeds):
            with display.working(console, f"{name}, seed {seed}: {steps} steps"):
                scores.append(train(config, task, steps, seed))
            console.print(f"{name}, seed {seed}: {scores[-1]:.3f}")
            files.write_json(out, result)
        table.add_row(
            name,
            str(parameter_count(config)),
            f"{statistics.mean(scores[:seeds]):.3f}",
            f"{min(scores[:seeds]):.3f} to {max(scores[:seeds]):.3f}",
        )
    files.write_json(out, {**result, "complete": True})
    console.print(display.Whole(table))
    console.print(f"saved [bold]{out}[/]")
    return {name: accuracies[name][:seeds] for name in MIXERS}


def _load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The file as far as it has come, or an empty one of these settings."""
    if not path.exists():
        return {**settings, **stamp(torch.device("cpu")), "accuracy": {}}
    result = files.read_json("out", path)
    accuracies = result.get("accuracy")
    scores = list(accuracies.values()) if isinstance(accuracies, dict) else [None]
    if not all(isinstance(s, list) and all(isinstance(x, float) for x in s) for s in scores):
        raise ValueError(f"out: {path} is no result of this command")
    if {key: result.get(key) for key in settings} != settings:
        raise ValueError(f"out: {path} is of another run; name another file")
    return {**result, "complete": False}
