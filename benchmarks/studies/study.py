"""What models learn of a task, with error bars: every variant of a study, several seeds each.

    python benchmarks/studies/study.py                       the studies there are
    python benchmarks/studies/study.py window                one, three seeds
    python benchmarks/studies/study.py recall omeganet       of its variants some
    python benchmarks/studies/study.py --report              tables and plots of what is measured

A cell is a variant trained with a seed. It is in `results/STUDY.json` at once, and a command that
was interrupted goes on where it stopped. `studies.py` says what each of them asks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from report import plot, table
from studies import STUDIES
from training import run_cell

from atlas_blocks.recipes.bench.report import commit, machine, versions
from atlas_blocks.recipes.counts import at_least

RESULTS = Path(__file__).parent / "results"


def read(file: Path) -> dict[str, Any]:
    """The record of a study as far as it has come."""
    if file.exists():
        return json.loads(file.read_text())
    return {"machine": machine(torch.device("cpu")), "versions": versions(), "cells": {}}


def measure(name: str, only: list[str], seeds: list[int], out: Path, compiled: bool) -> None:
    """Every cell that the file has not, seed by seed."""
    study = STUDIES[name]
    file = out / f"{name}.json"
    for seed in seeds:
        for label, variant in study.variants.items():
            if only and label not in only:
                continue
            key = f"{label} / {seed}"
            if key not in read(file)["cells"]:
                cell = {"commit": commit(), **run_cell(study, variant, seed, compiled=compiled)}
                record = read(file)  # another process may have added cells
                record |= {"study": name, "what": study.what}
                record["cells"][key] = cell
                part = file.with_suffix(f".{os.getpid()}")
                part.write_text(json.dumps(record, indent=1) + "\n")
                os.replace(part, file)
            cell = read(file)["cells"][key]
            course = f"after {cell['steps']} steps, {cell['seconds']} s"
            print(f"{key:40} {cell['accuracy']:6.1%} {course}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", nargs="?", choices=STUDIES, metavar="STUDY")
    parser.add_argument("variants", nargs="*", help="some of its variants; none: all of them")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--report", action="store_true", help="tables and plots, no training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    for label in args.variants:
        if label not in STUDIES[args.study].variants:
            known = ", ".join(STUDIES[args.study].variants)
            parser.error(f"{args.study} has no variant {label!r}; it has {known}")
    if args.study is None and not args.report:
        for name, study in STUDIES.items():
            print(f"{name:16} {study.what}")
        sys.exit()
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(STUDIES) if args.study is None else [args.study]
    if not args.report:
        measure(args.study, args.variants, args.seeds, args.out, not args.eager)
    for name in names:
        file = args.out / f"{name}.json"
        if file.exists():
            record = read(file)
            print(f"\n{STUDIES[name].what}\n\n{table(STUDIES[name], record)}")
            plot(STUDIES[name], record, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
