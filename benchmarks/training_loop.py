"""What `atlas-blocks train` costs beside a bare loop: the same model, batches and optimizer.

    python benchmarks/training_loop.py [RECIPE] [--steps 300] [--no-compile] [--cpu-time]
                                       [--json FILE]

The run has everything on: shards, live display, JSON lines and TensorBoard, checkpoints, spikes
and bad steps looked for. The bare loop is forward, backward, clipping and the optimizer's step,
on batches that are in memory. Both take turns step by step in one process, and validate at the same
steps, so that the machine's noise falls on both. The ratio is speed of the run / speed of the bare
loop: of all steps together, checkpoints included, and of pairs of steps, with quartiles. With
--cpu-time it is of the process's CPU time, which others on the machine do not stretch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from torch.nn import functional as F

from atlas_blocks.recipes import registry, runs, training
from atlas_blocks.recipes.bench.report import stamp
from atlas_blocks.recipes.counts import at_least
from atlas_blocks.recipes.data import Batch, Source, Tokenizer, prepare
from atlas_blocks.recipes.files import write_json
from atlas_blocks.recipes.model import LanguageModel

# Steps of both that come first: they compile.
FIRST = 20


class InTurn:
    """The batches of a run; before each is handed out, the bare loop takes the same step."""

    def __init__(self, run: runs.Training, validate_every: int, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.packed, self.config = runs._batches(run.shards, run.config), run.config
        self.held_out = runs.HeldOut(run.shards, run.config)
        self.validate_every = validate_every
        self.model: LanguageModel = copy.deepcopy(run.model)
        self.optimizer = training.make_optimizer(self.model, self.config)
        self.waiting = [self.packed(step) for step in range(self.config.steps)]
        self.losses: list[float] = []
        self.bare: list[float] = []
        self.full: list[float] = []
        self.handed_out = 0.0

    def __call__(self, step: int) -> Sequence[Batch]:
        self.stop()
        began = self.clock()
        self.step(self.waiting[step], step)
        self.bare.append(self.clock() - began)
        self.handed_out = self.clock()
        return self.packed(step)

    def stop(self) -> None:
        """The step of the run is over."""
        if self.bare:
            self.full.append(self.clock() - self.handed_out)

    def step(self, batches: Sequence[Batch], step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(step)
        self.optimizer.zero_grad()
        for batch in batches:
            logits = self.model(batch.tokens, cu_seqlens=batch.cu_seqlens).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.losses.append(loss.item())
        # At the first step too, which is left out: a validation has a graph of its own.
        if step == 0 or (step + 1) % self.validate_every == 0 or step + 1 == self.config.steps:
            self.held_out(self.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="?", default="linear-attention-tiny")
    parser.add_argument("--steps", type=at_least(1), default=300)
    parser.add_argument("--batch", type=at_least(1), default=8)
    parser.add_argument("--length", type=at_least(1), default=128)
    parser.add_argument("--every", type=at_least(1), default=100, help="steps between saves")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cpu-time", action="store_true", help="of the process, not the wall's")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    a = parser.parse_args()
    config = training.TrainingConfig(a.steps, a.batch, a.length, compile=a.compile)
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "screen").open("w") as screen:
        shards = prepare(Source(None), Path(folder) / "shards", Tokenizer())
        torch.manual_seed(0)
        model = registry.build(a.recipe)
        optimizer = training.make_optimizer(model, config)
        run = runs.Training(model, config, optimizer, training.TrainingState(), shards)
        keeping = runs.Keeping(Path(folder) / "run", a.every, validate_every=a.every)
        keeping.out.mkdir()
        clock = time.process_time if a.cpu_time else time.perf_counter
        turns = InTurn(run, a.every, clock)
        # A terminal, so that the display is live.
        console = Console(file=screen, force_terminal=True, width=120)
        with (
            training.compiled_blocks(turns.model, config),
            mock.patch.object(runs, "_batches", return_value=turns),
        ):
            runs.train(console, keeping, run)
        turns.stop()
    bare, full = turns.bare[FIRST:], turns.full[FIRST:]
    ratios = [b / f for b, f in zip(bare, full, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    same = all(map(torch.equal, model.parameters(), turns.model.parameters()))
    figures = {
        "ratio_of_all_steps": sum(bare) / sum(full),
        "ratio_of_a_step": middle,
        "quartiles": [low, high],
        "bare_step_seconds": statistics.median(bare),
        "run_step_seconds": statistics.median(full),
        "same_weights": same,
    }
    print(
        f"{a.recipe}: {figures['ratio_of_all_steps']:.3f} of the bare loop's speed in all, "
        f"{middle:.3f} ({low:.3f} to {high:.3f}) step by step; a bare step takes "
        f"{1e3 * figures['bare_step_seconds']:.1f} ms; weights "
        f"{'equal' if same else 'differ'}"
    )
    if a.json:
        what = {name: getattr(a, name) for name in ("recipe", "steps", "batch", "length", "every")}
        what |= {"compile": a.compile, "cpu_time": a.cpu_time, "first_steps_left_out": FIRST}
        record = {**stamp(torch.device("cpu")), "complete": True, "what": what}
        write_json(a.json, {**record, "figures": figures})


if __name__ == "__main__":
    main()
