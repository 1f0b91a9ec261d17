"""Peak memory of one AtlasMemory layer, forward + backward, as the sequence grows.

    python benchmarks/peak_memory.py [--dim 64] [--heads 4] [--json FILE]

Each length runs in a process of its own; the figure is its peak resident memory less what it held
before the forward. Linear growth multiplies it by 4 from one length to the next.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import resource
import subprocess
import sys
from importlib.metadata import version

from atlas_blocks.recipes.counts import at_least
from atlas_blocks.recipes.demo import hardware

LENGTHS = (1024, 4096, 16384)
LAYERS = {
    "matrix, gd": {"memory": "matrix", "update": "gd"},
    "mlp, gd": {"update": "gd", "expansion": 1},
    "matrix, muon": {"memory": "matrix", "update": "muon"},
    "mlp, muon": {"update": "muon", "expansion": 1},
}


def peak() -> int:
    """Peak resident memory of this process in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(layer: str, dim: int, heads: int, length: int) -> int:
    """In a fresh process: bytes that forward + backward add to the peak."""
    import torch

    from atlas_blocks import AtlasMemory, AtlasMemoryConfig

    torch.set_num_threads(1)
    block = AtlasMemory(dim, heads, AtlasMemoryConfig().replace(**LAYERS[layer]))
    block(torch.randn(1, 64, dim))[0].sum().backward()
    x = torch.randn(1, length, dim, requires_grad=True)
    before = peak()
    block(x)[0].sum().backward()
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=at_least(1), default=64)
    parser.add_argument("--heads", type=at_least(1), default=4)
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--one", nargs=2, metavar=("LAYER", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(measure(arguments.one[0], arguments.dim, arguments.heads, int(arguments.one[1])))
        return
    figures = []
    for layer in LAYERS:
        sizes = []
        for length in LENGTHS:
            command = [sys.executable, __file__, "--one", layer, str(length)]
            command += ["--dim", str(arguments.dim), "--heads", str(arguments.heads)]
            sizes.append(int(subprocess.run(command, check=True, capture_output=True).stdout))
        ratios = [b / a for a, b in itertools.pairwise(sizes)]
        figures.append({"layer": layer, "bytes": sizes, "ratios": ratios})
        shown = "  ".join(
            f"T={t}: {s / 2**20:.0f} MiB" for t, s in zip(LENGTHS, sizes, strict=True)
        )
        print(f"{layer:12} {shown}   ratios {', '.join(f'{r:.2f}' for r in ratios)}")
    if arguments.json:
        record = {
            "what": {"dim": arguments.dim, "heads": arguments.heads, "lengths": LENGTHS},
            "date": datetime.date.today().isoformat(),
            "machine": hardware(),
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "figures": figures,
        }
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
