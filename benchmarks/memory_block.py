"""AtlasMemory against titans-pytorch's NeuralMemory, interleaved in one process.

    python benchmarks/memory_block.py [--rounds 15] [--json FILE]

Same dim, heads, head width, chunk; float32, two threads, batch 1, T = 2048. Forward under no_grad
and forward + backward. Each round times every contestant once, in turn; ratios are taken within a
round, and their median and quartiles printed. Needs the `bench` extra.

By default titans-pytorch takes the gradients of all chunks at the weights of the call's start, so
that nothing is sequential; ours are taken at the memory before each chunk. Its batch_size=64 does
the same, and is timed beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn

from atlas_blocks import AtlasMemory, AtlasMemoryConfig

DIM, HEADS, LENGTH, CHUNK, WINDOW = 256, 4, 2048, 64, 16


def contestants() -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> a function of x [1, T, dim] that runs one memory layer."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    def ours(**changes: object) -> Callable[[Tensor], Tensor]:
        config = AtlasMemoryConfig(
            update="gd", feature_map="identity", window=WINDOW, chunk_size=CHUNK
        ).replace(**changes)
        block = AtlasMemory(DIM, HEADS, config)
        return lambda x: block(x)[0]

    def peer(batch_size: int | None) -> Callable[[Tensor], Tensor]:
        layer: nn.Module = NeuralMemory(
            dim=DIM,
            chunk_size=CHUNK,
            batch_size=batch_size,
            heads=HEADS,
            dim_head=DIM // HEADS,
            model=MemoryMLP(dim=DIM // HEADS, depth=2, expansion_factor=1.0),
        )
        return lambda x: layer(x)[0]

    return {
        "titans-pytorch": peer(None),
        "titans-pytorch, batch_size=64": peer(CHUNK),
        "matrix": ours(memory="matrix"),
        "matrix, errors at the chunk's start": ours(memory="matrix", errors="chunk"),
        "mlp": ours(memory="mlp", expansion=1),
        "mlp, errors at the chunk's start": ours(memory="mlp", expansion=1, errors="chunk"),
    }


def forward(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        f(x)


def forward_backward(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    f(x.detach().requires_grad_()).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    x = torch.randn(1, LENGTH, DIM)
    runs = contestants()
    figures = []
    for pass_name, run in (("forward", forward), ("forward+backward", forward_backward)):
        times: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(arguments.rounds + 2):  # two rounds of warm-up
            for name, f in runs.items():
                start = time.perf_counter()
                run(f, x)
                if round_ >= 2:
                    times[name].append(time.perf_counter() - start)
        for name, seconds in times.items():
            ratios = [a / b for a, b in zip(times["titans-pytorch"], seconds, strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4)
            figures.append(
                {
                    "pass": pass_name,
                    "layer": name,
                    "tokens_per_s": round(LENGTH / statistics.median(seconds)),
                    "speed_ratio_to_titans": round(median, 2),
                    "quartiles": [round(low, 2), round(high, 2)],
                }
            )
            print(
                f"{pass_name:17} {name:30} {LENGTH / statistics.median(seconds):10,.0f} tokens/s   "
                f"{median:5.2f}x titans-pytorch  (quartiles {low:.2f} to {high:.2f})"
            )
    if arguments.json:
        packages = {p: version(p) for p in ("torch", "titans-pytorch")}
        record = {
            "what": {"dim": DIM, "heads": HEADS, "T": LENGTH, "chunk": CHUNK, "window": WINDOW},
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "threads": arguments.threads,
            },
            "versions": {"python": platform.python_version(), **packages},
            "rounds": arguments.rounds,
            "figures": figures,
        }
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
