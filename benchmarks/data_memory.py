"""Peak memory of `atlas-blocks prepare` and `train` on a text larger than what they may take.

    python benchmarks/data_memory.py [--gigabytes 1] [--kinds text jsonl] [--tokenizers bytes 4096]
                                     [--json FILE]

A text of random words is written to a temporary folder, as one file that is one document and as
JSON lines of short ones. Each command runs in a process of its own; what is told is the most
memory that the system ever had resident for it, files that are mapped included, and its seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from atlas_blocks.recipes.bench.report import stamp
from atlas_blocks.recipes.files import write_json

MAIN = "from atlas_blocks.recipes.command_line.main import main; main()"
RECIPE = "linear-attention-tiny"
WORDS, LINE = 50_000, 12


def write(path: Path, size: int) -> None:
    """Lines of words, some frequent and some rare, up to `size` bytes."""
    draw = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    lengths = draw.integers(2, 10, WORDS)
    words = [draw.choice(letters, n).tobytes().decode() for n in lengths]
    with path.open("w") as file:
        while file.tell() < size:
            ranks = np.minimum(draw.zipf(1.2, (10_000, LINE)), WORDS) - 1
            lines = (" ".join(words[rank] for rank in line) for line in ranks)
            if path.suffix == ".jsonl":
                lines = (json.dumps({"text": line}) for line in lines)
            file.write("\n".join(lines) + "\n")


def measure(*command: object) -> dict[str, float]:
    """Run a command: its peak memory in MB and its seconds."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", MAIN, *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    # Linux tells kilobytes.
    return {"peak_mb": usage.ru_maxrss / 1000, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--kinds", nargs="+", default=["text", "jsonl"])
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "4096"])
    parser.add_argument("--json", type=Path, help="keep the figures here")
    a = parser.parse_args()
    what = {"gigabytes": a.gigabytes, "recipe": RECIPE}
    figures: dict[str, dict[str, float]] = {}
    record = {**stamp(torch.device("cpu")), "what": what, "figures": figures}

    def keep(*, complete: bool = False) -> None:
        if a.json:
            write_json(a.json, record | {"complete": complete})

    with tempfile.TemporaryDirectory() as folder:
        for kind in a.kinds:
            text = Path(folder) / f"large.{'txt' if kind == 'text' else kind}"
            write(text, int(a.gigabytes * 1e9))
            for tokenizer in a.tokenizers:
                shards, out = (Path(folder) / f"{what}-{kind}-{tokenizer}" for what in "so")
                size = ("--batch", 8, "--length", 128, "--steps", 10, "--no-compile")
                commands = {
                    "prepare": ("prepare", text, "--out", shards, "--tokenizer", tokenizer),
                    "train": ("train", RECIPE, "--data", shards, "--out", out, *size),
                }
                for name, command in commands.items():
                    found = figures[f"{kind}, {tokenizer}, {name}"] = measure(*command)
                    keep()
                    print(
                        f"{kind}, {tokenizer}, {name}: {found['peak_mb']:,.0f} MB, "
                        f"{found['seconds']:.0f} s",
                        flush=True,
                    )
            text.unlink()
    keep(complete=True)


if __name__ == "__main__":
    main()
