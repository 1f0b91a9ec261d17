"""What recipes learn of associative recall, three seeds each, and what changes to them do.

    python benchmarks/recall.py                       every recipe with its defaults
    python benchmarks/recall.py omeganet atlas        some of them
    python benchmarks/recall.py atlas --sweep         one setting of the memory changed at a time

6 pairs of 24 keys in 64 tokens; dim 32, 2 heads, 2 layers, MLPs as wide as give every model the
parameters of atlas-mag; AdamW, batches of 32, at most 1,500 steps, stopped early where 512 fresh
sequences are answered to 99 %. Every finished cell is in the result file at once, and a run that
was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from atlas_blocks import AtlasMemoryConfig, Config
from atlas_blocks.recipes.architectures import ARCHITECTURES, Size
from atlas_blocks.recipes.bench.report import commit, machine, versions
from atlas_blocks.recipes.model import LanguageModelConfig
from atlas_blocks.recipes.patterns import turn_of
from atlas_blocks.recipes.registry import fitted, parameter_count
from atlas_blocks.recipes.tasks import IGNORE, RecallTask, accuracy

TASK = RecallTask(length=64, pairs=6, keys=24)
SIZE = Size(2, 32, 2, None, vocab_size=TASK.vocab_size, expansion=1, reach=16, multiple=8)
STEPS, BATCH, PEAK, EVERY, ENOUGH = 1500, 32, 3e-3, 100, 0.99
RESULTS = Path(__file__).parent / "results" / "recall.json"

# One setting changed at a time; a recipe that has it so already leaves it out.
SWEEP: dict[str, dict[str, Any]] = {
    "chunk 16": {"chunk_size": 16},
    "chunk 32": {"chunk_size": 32},
    "window 1": {"window": 1},
    "window 4": {"window": 4},
    "eta 0.02": {"eta_init": 0.02},
    "eta 0.1": {"eta_init": 0.1},
    "eta 0.2": {"eta_init": 0.2},
    "eta 0.5": {"eta_init": 0.5},
    "eta 0.9": {"eta_init": 0.9},
    "own 0.5": {"own_init": 0.5},
    "lag 0.1": {"lag_init": 0.1},
    "lag 0.002": {"lag_init": 0.002},
    "momentum 0.1": {"momentum_init": 0.1},
    "momentum 0.9": {"momentum_init": 0.9},
    "no momentum": {"momentum": False},
    "a step every 4": {"ns_every": 4},
    "a step every 16": {"ns_every": 16},
    "identity features": {"feature_map": "identity"},
    "decay to zero": {"decay_to": "zero"},
    "decay to M_0": {"decay_to": "initial"},
}


def with_memory(config: Config, changes: dict[str, Any]) -> Config:
    """The config with these settings in every memory layer that it holds."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return with_memory(value, changes) if isinstance(value, Config) else value

    if isinstance(config, AtlasMemoryConfig):
        return config.replace(**changes)
    fields = (field.name for field in dataclasses.fields(config))
    return config.replace(**{name: changed(getattr(config, name)) for name in fields})


def model_config(architecture: str, changes: dict[str, Any]) -> LanguageModelConfig:
    """A recipe at this script's size."""

    def plain(name: str) -> LanguageModelConfig:
        turn = turn_of(name, SIZE)
        return LanguageModelConfig(
            name=name,
            vocab_size=SIZE.vocab_size,
            dim=SIZE.dim,
            heads=SIZE.heads,
            depth=max(SIZE.depth, len(turn)),
            layers=turn,
        )

    aim = parameter_count(plain("atlas-mag"))
    config = fitted(plain(architecture), aim, multiple=SIZE.multiple)
    return with_memory(config, changes)


def train(architecture: str, changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Accuracy on 512 fresh sequences, the steps it took, and the accuracies on the way."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    model = model_config(architecture, changes).build()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    began, course = time.perf_counter(), []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, step / 50) * (1 - 0.9 * step / STEPS)
        tokens, targets = TASK.sample(BATCH, generator)
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % EVERY == 0 or step == STEPS:
            fresh = torch.Generator().manual_seed(99_000 + seed * 100 + step // EVERY)
            with torch.no_grad():
                tokens, targets = TASK.sample(512, fresh)
                course.append(round(accuracy(model(tokens).logits, targets), 4))
            if course[-1] >= ENOUGH:
                break
    seconds = round(time.perf_counter() - began, 1)
    return {"accuracy": course[-1], "steps": step, "seconds": seconds, "course": course}


def cells(args: argparse.Namespace) -> list[tuple[str, str, dict[str, Any], int]]:
    """(recipe, change, its settings, seed), seed by seed."""
    found = []
    for seed in range(args.seeds):
        for name in args.recipes or ARCHITECTURES:
            variants = {"as it is": {}} | (SWEEP if args.sweep else {})
            for change, settings in variants.items():
                config = model_config(name, {})
                if settings and model_config(name, settings) == config:
                    continue
                if args.only and change not in args.only:
                    continue
                found.append((name, change, settings, seed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", help="architectures; none: all of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="one setting changed at a time too")
    parser.add_argument("--only", nargs="*", help="of the changes, these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in args.recipes:
        if name not in ARCHITECTURES:
            parser.error(f"unknown recipe {name!r}; there are {', '.join(ARCHITECTURES)}")
    results: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "cells": {},
    }
    if args.out.exists():
        results = json.loads(args.out.read_text())
    for name, change, settings, seed in cells(args):
        key = f"{name} / {change} / {seed}"
        if key not in results["cells"]:
            results["cells"][key] = {"commit": commit(), **train(name, settings, seed)}
            part = args.out.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1) + "\n")
            os.replace(part, args.out)
        one = results["cells"][key]
        print(
            f"{key:45} {one['accuracy']:6.1%} after {one['steps']} steps, {one['seconds']} s",
            flush=True,
        )
    print()
    groups: dict[str, list[float]] = {}
    for key, one in results["cells"].items():
        groups.setdefault(key.rpartition(" / ")[0], []).append(one["accuracy"])
    for key, found in groups.items():
        spread = f"{min(found):.1%} to {max(found):.1%}, {len(found)} seeds"
        print(f"{key:40} {statistics.median(found):6.1%} ({spread})")


if __name__ == "__main__":
    main()
