"""In a fresh process: how long the first call takes, from an empty cache and from a filled one.

`python -m atlas_blocks.recipes.bench.cold NAME BACKEND MODE BATCH TOKENS DIM HEADS DEVICE THREADS`
prints one line of JSON. What `first_calls` runs, with a cache folder of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass

import torch

from atlas_blocks.recipes.bench import subjects
from atlas_blocks.recipes.bench.contenders import Unavailable
from atlas_blocks.recipes.bench.subjects import Size, Subject

LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class FirstCalls:
    """Seconds of a first call less those of a second one: what compiling costs.

    cold: with an empty cache; warm: in another process, with the cache that the first one left.
    """

    cold_seconds: float
    warm_seconds: float


def first_calls(name: str, backend: str, mode: str, size: Size, device: torch.device) -> FirstCalls:
    """Two fresh processes, one after the other. Raises Unavailable where one fails."""
    arguments = [name, backend, mode, *map(str, astuple(size)), str(device)]
    command = [sys.executable, "-m", __name__, *arguments, str(torch.get_num_threads())]
    with tempfile.TemporaryDirectory() as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        cold, warm = (_seconds(command, os.environ | places) for _ in range(2))
    return FirstCalls(cold, warm)


def _seconds(command: list[str], environment: dict[str, str]) -> float:
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"compiling took more than {LIMIT_SECONDS} s") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise Unavailable(f"a fresh process ended with code {done.returncode}: {last}")
    return float(json.loads(done.stdout.splitlines()[-1])["compile_seconds"])


def main(arguments: list[str]) -> None:
    """What the fresh process does."""
    name, backend, mode, *sizes, device, threads = arguments
    torch.set_num_threads(int(threads))
    size = Size(*map(int, sizes))
    model = subjects.build(name, size, torch.device(device))
    call = Subject(model, backend, mode, size).call

    def seconds() -> float:
        began = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first, second = seconds(), seconds()
    print(json.dumps({"compile_seconds": first - second}))


if __name__ == "__main__":
    main(sys.argv[1:])
