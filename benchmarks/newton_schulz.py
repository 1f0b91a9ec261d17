"""Newton-Schulz on a CPU, as a share of the rate of a large matrix product in the same rounds.

    python benchmarks/newton_schulz.py [--rounds 9] [--threads 2] [--json FILE]

Per shape: the forward and forward + backward of the library's definition, beside the iteration as
it is printed (the whole batch in one go, its gradient by autograd). GFLOP/s count the products each
one computes; the library's gradient takes 35 for the 30 of autograd, and keeps nothing for them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor

from atlas_blocks.functional import newton_schulz
from atlas_blocks.newton_schulz.definition import EPS, backward_flops, forward_flops, triples
from atlas_blocks.recipes.counts import at_least
from atlas_blocks.recipes.demo import hardware

STEPS = 5
SHAPES = ((32, 32), (64, 64), (128, 128), (64, 256))
ENTRIES = 2**20  # in a batch: one chunk of 64 tokens, 4 heads of 64


def plain(s: Tensor) -> Tensor:
    x = s / (torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True) + EPS)
    for a, b, c in triples(STEPS, "jordan"):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def both(call: Callable[[Tensor], Tensor], s: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(call(s), s, grad)


def measure(m: int, n: int, rounds: int) -> dict:
    """Of one shape: GFLOP/s and share of the product's, medians with quartiles."""
    count = max(1, ENTRIES // (m * n))
    s = torch.randn(count, m, n)
    leaf, grad = s.clone().requires_grad_(), torch.randn_like(s)
    large = torch.randn(1024, 1024)
    literal = STEPS * (4 * m * m * n + 2 * m**3)
    ours = forward_flops(m, n, STEPS)
    subjects: dict[str, tuple[Callable[[], object], int]] = {
        "product": (lambda: large @ large, 2 * 1024**3),
        "forward": (lambda: newton_schulz(s), count * ours),
        "forward + backward": (
            lambda: both(newton_schulz, leaf, grad),
            count * (ours + backward_flops(m, n, STEPS)),
        ),
        "plain forward": (lambda: plain(s), count * literal),
        "plain forward + backward": (lambda: both(plain, leaf, grad), count * 3 * literal),
    }
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for round_ in range(rounds + 1):
        for name, (call, _) in subjects.items():
            began = time.perf_counter()
            call()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    found: dict[str, dict] = {}
    for name, (_, flops) in subjects.items():
        shares = [
            flops / t / (subjects["product"][1] / p)
            for t, p in zip(seconds[name], seconds["product"], strict=True)
        ]
        found[name] = {
            "ms": 1e3 * statistics.median(seconds[name]),
            "gflops_per_s": flops / statistics.median(seconds[name]) / 1e9,
            "share_of_product": statistics.median(shares),
            "share_quartiles": statistics.quantiles(shares, n=4)[::2],
        }
    return {"shape": [count, m, n], "figures": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=9)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--json", help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for m, n in SHAPES:
        results.append(measure(m, n, arguments.rounds))
        for name, x in results[-1]["figures"].items():
            low, high = x["share_quartiles"]
            print(
                f"[{m}, {n}] {name:25} {x['ms']:8.1f} ms {x['gflops_per_s']:7.1f} GFLOP/s  "
                f"{x['share_of_product']:.2f} of a large product ({low:.2f} to {high:.2f})"
            )
    if arguments.json:
        record = {
            "what": {"steps": STEPS, "threads": arguments.threads, "rounds": arguments.rounds},
            "date": datetime.date.today().isoformat(),
            "machine": hardware(),
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "figures": results,
        }
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
