"""How well a memory learns a map that it sees online: the five kinds of ATLAS, section 6.4.

    python benchmarks/studies/maps.py [--length 2048] [--dim 64] [--seeds 5]

Of every output the memory is asked before it sees it. Nothing is trained but the memory, by its
own rule; the write strength is the best of eight, over the whole sequence. The figure is the mean
of |y - o|^2 / |o|^2 over the last quarter. An answer of zero has 1. Deep memories begin with the
question for an answer, about 2, as they add their input.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.functional import PolynomialMap, omega_rule, taylor_coefficients
from atlas_blocks.omega.memories import weight_shapes
from atlas_blocks.omega.rule import Rule
from atlas_blocks.recipes.bench.report import commit, machine, versions
from atlas_blocks.recipes.counts import at_least
from atlas_blocks.recipes.tasks import MapTask
from atlas_blocks.recipes.tasks.maps import KINDS, error

RESULTS = Path(__file__).parent / "results"
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# memory, degree of its features (0: the input itself), update, window
LEARNERS: dict[str, tuple[str, int, str, int]] = {
    "matrix, delta rule": ("matrix", 0, "gd", 1),
    "matrix, c = 8": ("matrix", 0, "gd", 8),
    "matrix, degree 2, c = 8": ("matrix", 2, "gd", 8),
    "mlp, c = 1": ("mlp", 0, "gd", 1),
    "mlp, c = 8": ("mlp", 0, "gd", 8),
    "mlp, c = 8, Muon": ("mlp", 0, "muon", 8),
    "gated mlp, c = 8": ("gated_mlp", 0, "gd", 8),
}


def start(shapes: list[tuple[int, int]], memory: str) -> list[Tensor]:
    """M_0 [H, dout, din] of all strengths: it adds nothing to its residual."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for i, shape in enumerate(shapes):
        scale = 0.0 if memory == "matrix" or i == 0 else shape[-1] ** -0.5
        weight = scale * torch.randn(shape, generator=generator)
        weights.append(weight.expand(len(STRENGTHS), *shape).contiguous())
    return weights


@torch.no_grad()
def errors(learner: str, inputs: Tensor, outputs: Tensor) -> Tensor:
    """[B, T - 1, H] of all strengths: of every pair but the first, asked for before it is seen."""
    memory, degree, update, window = LEARNERS[learner]
    batch, length, dim = inputs.shape
    heads = len(STRENGTHS)
    features = PolynomialMap(taylor_coefficients(degree)) if degree else None
    width = features(inputs[:1, :1]).shape[-1] if features else dim

    def per_head(x: Tensor) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, heads, -1)

    ones = torch.ones(batch, length - 1, heads)
    y, _ = omega_rule(
        per_head(inputs[:, 1:]),  # the memory after pair t is asked for pair t + 1
        per_head(inputs[:, :-1]),
        per_head(outputs[:, :-1]),
        alpha=ones,
        eta=ones * torch.tensor(STRENGTHS),
        theta=0.5 * ones if update == "muon" else None,
        gamma=ones.unsqueeze(-1).expand(-1, -1, -1, window),
        weights=start(weight_shapes(memory, width, dim, 2 * dim), memory),
        rule=Rule(
            memory=memory,
            update=update,
            window=window,
            chunk_size=16,
            errors="online" if update == "gd" else "chunk",
        ),
        feature_map=features,
    )
    return torch.stack([error(y[:, :, h], outputs[:, 1:]) for h in range(heads)], -1)


def cell(kind: str, learner: str, length: int, dim: int, seeds: int) -> dict[str, Any]:
    task = MapTask(kind=kind, length=length, dim=dim)
    drawn = [task.sample(1, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    inputs, outputs = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    began = time.perf_counter()
    found = errors(learner, inputs, outputs)
    seconds = time.perf_counter() - began
    best = int(found.mean((0, 1)).nan_to_num(torch.inf).argmin())
    last = found[:, -length // 4 :, best].mean(1)
    course = [part.mean().item() for part in found[..., best].chunk(16, dim=1)]
    return {
        "error": [round(x, 4) for x in last.tolist()],
        "strength": STRENGTHS[best],
        "course": [round(x, 4) for x in course],
        "seconds": round(seconds, 1),
    }


def plot(record: dict[str, Any], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        for learner in LEARNERS:
            course = record["cells"][f"{kind} / {learner}"]["course"]
            places = [(i + 0.5) * record["length"] / len(course) for i in range(len(course))]
            axes.plot(places, course, label=learner)
        axes.set(title=kind, xlabel="pairs", yscale="log")
        axes.grid(alpha=0.2)
    figure.axes[0].set_ylabel("error of the next output")
    figure.axes[-1].legend(fontsize=6)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=at_least(2), default=2048)
    parser.add_argument("--dim", type=at_least(1), default=64)
    parser.add_argument("--seeds", type=at_least(1), default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    rank = MapTask().rank
    if args.dim < rank:
        parser.error(f"--dim: expected at least {rank}, the low-rank map's rank, got {args.dim}")
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "commit": commit(),
        "length": args.length,
        "dim": args.dim,
        "cells": {},
    }
    print("| memory | " + " | ".join(KINDS) + " |\n|" + "---|" * (1 + len(KINDS)))
    for learner in LEARNERS:
        row = [learner]
        for kind in KINDS:
            found = cell(kind, learner, args.length, args.dim, args.seeds)
            record["cells"][f"{kind} / {learner}"] = found
            worst, best = max(found["error"]), min(found["error"])
            row.append(f"{sum(found['error']) / args.seeds:.3f} ({best:.3f} to {worst:.3f})")
        print("| " + " | ".join(row) + " |", flush=True)
    (args.out / "maps.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, args.out / "maps.png")


if __name__ == "__main__":
    main()
