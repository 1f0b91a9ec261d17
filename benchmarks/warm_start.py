"""A first training step in a second process that finds what the first one compiled.

    OMP_NUM_THREADS=1 python benchmarks/warm_start.py [RECIPE ...] [--json FILE]

A second process has nothing but the folder of the first (`--cache` of the commands). Seconds by
the clock of the first step, loss and gradients of 512 tokens, from the model's first call on: eager
and compiled with the folder, in turn. Not in them is torch's check of the C++ compiler, which is
made once a machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa

from atlas_blocks.recipes import build
from atlas_blocks.recipes.bench.report import stamp
from atlas_blocks.recipes.compile_cache import compile_cache
from atlas_blocks.recipes.counts import at_least

RECIPES = ["omeganet-tiny", "atlas-mag-tiny", "atlas-mac-tiny"]
LENGTH = 512


def first_step(recipe: str, cache: Path | None) -> float:
    """In this process. cache: None for eager."""
    from atlas_blocks.compile_passes import compile_blocks

    torch.manual_seed(0)
    model = build(recipe)
    tokens = torch.randint(0, 256, (1, LENGTH))
    with compile_cache(cache):
        pick_vec_isa()
        began = time.perf_counter()
        run = model if cache is None else compile_blocks(model)
        logits = run(tokens).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
        return time.perf_counter() - began


def in_a_process(recipe: str, cache: Path | None) -> float:
    command = [
        sys.executable,
        __file__,
        recipe,
        "--one",
        *(["--cache", str(cache)] if cache else []),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(first_step(args.recipes[0], args.cache))
        return
    figures: dict[str, Any] = {}
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            cold = in_a_process(recipe, cache)
            turns = [
                (in_a_process(recipe, None), in_a_process(recipe, cache))
                for _ in range(args.rounds)
            ]
        eager, warm = (list(times) for times in zip(*turns, strict=True))
        figures[recipe] = {"cold": cold, "eager": eager, "warm": warm}
        allowed = [3 + 1.2 * t for t in eager]
        print(
            f"{recipe}: cold {cold:.1f} s; warm {min(warm):.2f} to {max(warm):.2f} s, eager "
            f"{min(eager):.2f} to {max(eager):.2f} s (3 s + 1.2 of it: {min(allowed):.2f} s)",
            flush=True,
        )
    if args.json:
        record = {**stamp(torch.device("cpu")), "length": LENGTH, "figures": figures}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
