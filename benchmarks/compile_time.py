"""Cold compile time of a recipe's training step under backend="atlas", by length and by depth.

    python benchmarks/compile_time.py [--recipe omeganet-tiny] [--lengths 512 8192] [--json FILE]
    python benchmarks/compile_time.py --lengths 512 --depths 2 12 --blocks

--blocks: every block by itself (`atlas_blocks.compile_blocks`), else the model as one graph.

Each compile runs in a process of its own with an empty cache, one after another, the cases
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


def measure(
    recipe: str, length: int, depth: int | None, blocks: bool, threads: int
) -> dict[str, float]:
    """In a fresh process: seconds of compiling by the wall and of processors, tracing's part of
    them, and of a step afterwards."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics

    from atlas_blocks.compile_passes import compile_blocks
    from atlas_blocks.recipes import build

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(recipe) if depth is None else build(recipe, depth=depth)
    if blocks:
        compiled = compile_blocks(model)
    else:
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


def named(length: int, depth: int | None) -> str:
    return f"T={length}" + ("" if depth is None else f" depth {depth}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="omeganet-tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--depths", type=int, nargs="+", help="Blocks; the recipe's own if not.")
    parser.add_argument("--blocks", action="store_true", help="every block by itself")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    cases = [(length, depth) for depth in a.depths or [None] for length in a.lengths]
    if a.one:
        print(json.dumps(measure(a.recipe, *cases[0], a.blocks, a.threads)))
        return
    seconds: dict[str, list[dict[str, float]]] = {named(*case): [] for case in cases}
    for round_ in range(a.rounds):
        for length, depth in cases if round_ % 2 == 0 else reversed(cases):
            command = [sys.executable, __file__, "--recipe", a.recipe, "--threads", str(a.threads)]
            command += ["--one", "--lengths", str(length), *(["--blocks"] if a.blocks else [])]
            command += [] if depth is None else ["--depths", str(depth)]
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.PIPE,
                    # One compile thread: g++ is then a child whose time is counted.
                    env={
                        **os.environ,
                        "TORCHINDUCTOR_CACHE_DIR": cache,
                        "TORCHINDUCTOR_COMPILE_THREADS": "1",
                    },
                )
            case = named(length, depth)
            seconds[case].append(json.loads(done.stdout.splitlines()[-1]))
            shown = "  ".join(f"{k} {v:.1f} s" for k, v in seconds[case][-1].items())
            print(f"{a.recipe} {case}: {shown}", flush=True)
    for kind in ("wall", "processors"):
        medians = {n: statistics.median(s[kind] for s in found) for n, found in seconds.items()}
        first = named(*cases[0])
        for case, median in medians.items():
            print(f"{kind}, {case}: {median:.1f} s, {median / medians[first]:.2f} of {first}")
    if a.json:
        record = {
            "what": {"recipe": a.recipe, "blocks": a.blocks, "threads": a.threads},
            "date": datetime.date.today().isoformat(),
            "machine": hardware(),
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "figures": seconds,
        }
        with open(a.json, "w") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
