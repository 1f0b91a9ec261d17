"""What torchrun starts in tests/recipes/test_distributed.py: short runs over several layouts.

torchrun --nproc-per-node N distributed_runs.py OUT STEPS RECIPES TENSOR,SEQUENCE ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from atlas_blocks.recipes import TrainingConfig, build, training
from atlas_blocks.recipes.data import Packed, Split


def config(steps: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, batch=4, length=16, accumulate=1, lr=2e-3)


def packed() -> Packed:
    """Documents shorter and longer than a crop, of words that can be learnt."""
    draw = np.random.default_rng(0)
    documents = [
        np.tile(draw.integers(97, 123, 5), 50)[:length] for length in draw.integers(2, 150, 100)
    ]
    tokens = np.concatenate(documents).astype(np.uint8)
    return Packed(Split([tokens], [np.cumsum([len(d) for d in documents])]), 4, 16)


def losses(
    recipe: str, steps: int, parallel=None, *, rounded: bool = False
) -> tuple[list[float], dict[str, int]]:
    """Of every step; and how many numbers of each parameter are here. rounded: every weight begins
    a rounding away."""
    torch.manual_seed(0)
    model = build(recipe)
    if rounded:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 2**-23 * (torch.rand_like(p) - 0.5).sign())
    batches = packed()
    if parallel is not None:
        parallel.shard(model)
        batches = parallel.batches(batches)
    found = training.train(model, batches, config(steps), parallel=parallel).losses
    own = {n: getattr(p, "_local_tensor", p).numel() for n, p in model.named_parameters()}
    return found, own


def main() -> None:
    from atlas_blocks.recipes.distributed.layout import Layout, joined, leads, ranks
    from atlas_blocks.recipes.distributed.parallel import Parallel

    torch.set_num_threads(1)
    out, steps, recipes, *layouts = sys.argv[1:]
    found, cpu = {}, torch.device("cpu")
    with joined(cpu):
        for sizes in layouts:
            tensor, sequence = map(int, sizes.split(","))
            parallel = Parallel(Layout.of(ranks(), tensor=tensor, sequence=sequence), cpu)
            for recipe in recipes.split(","):
                curve, own = losses(recipe, int(steps), parallel)
                found[f"{recipe} {sizes}"] = {"losses": curve, "own": own}
    if leads():
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
