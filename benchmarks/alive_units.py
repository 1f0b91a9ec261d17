"""Whether the hidden units of deep memories stay alive over long text, and streaming stays fast.

    python benchmarks/alive_units.py [RECIPE ...] [--decay-to zero]      all deep tiny recipes
    python benchmarks/alive_units.py --speed omeganet-tiny

Freshly built and after 250 training steps (AdamW, 4 sequences of 128 bytes of the standard
library's sources), 32,768 held-out bytes are read with the state carried. A hidden unit is alive
where the norms of its row and its column make a product above 1/1000 of the largest of its head.
--speed: tokens per second of processor time in ten pieces of 20,000 bytes, and how much of the
state is denormal numbers.

Every finished cell is in the result file at once; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import AtlasMemory, State
from atlas_blocks.functional import OmegaState
from atlas_blocks.recipes import build, names, with_memory
from atlas_blocks.recipes.bench.report import commit, machine, versions
from atlas_blocks.recipes.text import standard_library

STEPS, BATCH, LENGTH, PEAK = 250, 4, 128, 2e-3
PIECE, BYTES = 2048, 32_768
SPEED_PIECES, SPEED_BYTES = 10, 20_000
ALIVE = 1e-3
RESULTS = Path(__file__).parent / "results" / "alive_units.json"


def rule_states(state: object) -> list[OmegaState]:
    """Every memory's in a model's state."""
    if isinstance(state, OmegaState):
        return [state]
    parts = vars(state).values() if isinstance(state, State) else state
    if isinstance(parts, Tensor) or not hasattr(parts, "__iter__"):
        return []
    return [found for part in parts for found in rule_states(part)]


def alive(state: OmegaState) -> Tensor:
    """The share of hidden units alive [B, H]."""
    outer, *inner = state.weights
    size = outer.norm(dim=-2)
    for weight in inner:
        size = size * weight.norm(dim=-1)
    return (size > ALIVE * size.amax(-1, keepdim=True)).float().mean(-1)


def is_deep(recipe: str) -> bool:
    with torch.device("meta"):
        layers = [m for m in build(recipe).modules() if isinstance(m, AtlasMemory)]
    return any(layer.config.memory != "matrix" for layer in layers)


def train(model: nn.Module, data: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / 50)
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        tokens = torch.stack([data[s : s + LENGTH + 1] for s in starts.tolist()]).long()
        logits = model(tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def share_alive(model: nn.Module, data: Tensor) -> dict[str, Any]:
    """Of the worst head, and of all, after BYTES."""
    state = None
    with torch.no_grad():
        for piece in data[:BYTES].long()[None].split(PIECE, 1):
            state = model(piece, state).state
    shares = torch.cat([alive(found).flatten() for found in rule_states(state)])
    return {"worst head": round(shares.min().item(), 3), "all": round(shares.mean().item(), 3)}


def speed(model: nn.Module, data: Tensor) -> dict[str, Any]:
    state, rates, denormal = None, [], []
    tiny = torch.finfo(torch.float32).tiny
    with torch.no_grad():
        for start in range(0, SPEED_PIECES * SPEED_BYTES, SPEED_BYTES):
            piece = data[start : start + SPEED_BYTES].long()[None]
            began = time.process_time()
            for part in piece.split(PIECE, 1):
                state = model(part, state).state
            rates.append(round(SPEED_BYTES / (time.process_time() - began)))
            values = [t for found in rule_states(state) for t in found.tensors()]
            small = sum(int(((t != 0) & (t.abs() < tiny)).sum()) for t in values)
            denormal.append(small / sum(t.numel() for t in values))
    return {"tokens/s": rates, "last / first": rates[-1] / rates[0], "denormal": denormal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--decay-to", choices=("zero", "initial"), help="of every memory")
    parser.add_argument("--speed", action="store_true", help="tokens/s instead of units")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    tiny = [name for name in names() if name.endswith("-tiny")]
    recipes = args.recipes or [name for name in tiny if is_deep(name)]
    results: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "cells": {},
    }
    if args.out.exists():
        results = json.loads(args.out.read_text())
    corpus = standard_library()
    for name in recipes:
        for when in ["speed"] if args.speed else ["fresh", f"after {STEPS} steps"]:
            key = f"{name} / {when}"
            if args.decay_to:
                key += f" / decay to {args.decay_to}"
            if key not in results["cells"]:
                torch.manual_seed(0)
                model = build(name)
                if args.decay_to:
                    torch.manual_seed(0)
                    model = with_memory(model.config, decay_to=args.decay_to).build()
                if when.startswith("after"):
                    train(model, corpus.train)
                measure = speed if args.speed else share_alive
                data = corpus.train if args.speed else corpus.held_out
                results["cells"][key] = measure(model.eval(), data) | {"commit": commit()}
                part = args.out.with_suffix(".part")
                part.write_text(json.dumps(results, indent=1) + "\n")
                os.replace(part, args.out)
            print(f"{key:40} {results['cells'][key]}", flush=True)


if __name__ == "__main__":
    main()
