"""Cold compile time of a recipe's training step under backend="atlas", at two lengths.

    python benchmarks/compile_time.py [--recipe omeganet-tiny] [--lengths 512 8192] [--json FILE]

Each compile runs in a process of its own with an empty cache, one after another, the lengths
alternating; the figure is the first training step (loss and gradients) less the second, by the wall
and in processor time, the C++ compiler's included: on a machine that others use too, the second is
the one to compare. It takes minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

from atlas_blocks.recipes.demo import hardware


def measure(recipe: str, length: int, threads: int) -> dict[str, float]:
    """In a fresh process: seconds of compiling by the wall and of processors, tracing's part of
    them, and of a step afterwards."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics

    from atlas_blocks.recipes import build

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(recipe)
    compiled = torch.compile(model, backend="atlas", fullgraph=True)
    rows = torch.randint(0, 256, (1, length))

    def processors() -> float:
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    def step() -> tuple[float, float]:
        began, cpu = time.perf_counter(), processors()
        logits = compiled(rows).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], rows[0, 1:])
        torch.autograd.grad(loss, list(model.parameters()))
        return time.perf_counter() - began, processors() - cpu

    (wall, cpu), (wall_after, cpu_after) = step(), step()
    inside = sum(compilation_time_metrics.get("OutputGraph.call_user_compiler", ()))
    whole = sum(compilation_time_metrics.get("_compile.compile_inner", ()))
    return {
        "wall": wall - wall_after,
        "processors": cpu - cpu_after,
        "tracing": whole - inside,
        "step": wall_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="omeganet-tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--one", type=int, metavar="LENGTH", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.recipe, a.one, a.threads)))
        return
    seconds: dict[int, list[dict[str, float]]] = {length: [] for length in a.lengths}
    for round_ in range(a.rounds):
        for length in a.lengths if round_ % 2 == 0 else reversed(a.lengths):
            command = [sys.executable, __file__, "--recipe", a.recipe, "--threads", str(a.threads)]
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run(
                    [*command, "--one", str(length)],
                    check=True,
                    stdout=subprocess.PIPE,
                    # One compile thread: g++ is then a child whose time is counted.
                    env={
                        **os.environ,
                        "TORCHINDUCTOR_CACHE_DIR": cache,
                        "TORCHINDUCTOR_COMPILE_THREADS": "1",
                    },
                )
            seconds[length].append(json.loads(done.stdout.splitlines()[-1]))
            shown = "  ".join(f"{k} {v:.1f} s" for k, v in seconds[length][-1].items())
            print(f"{a.recipe} T={length}: {shown}", flush=True)
    for kind in ("wall", "processors"):
        medians = {n: statistics.median(s[kind] for s in found) for n, found in seconds.items()}
        for length, median in medians.items():
            ratio = median / medians[a.lengths[0]]
            print(f"{kind}, T={length}: {median:.1f} s, {ratio:.2f} of T={a.lengths[0]}")
    if a.json:
        record = {
            "what": {"recipe": a.recipe, "lengths": a.lengths, "threads": a.threads},
            "date": datetime.date.today().isoformat(),
            "machine": hardware(),
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "figures": {str(length): found for length, found in seconds.items()},
        }
        with open(a.json, "w") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
