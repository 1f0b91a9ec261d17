"""Cold compile time of a recipe's training step under backend="atlas", by length and by depth.

    python benchmarks/compile_time.py [RECIPE ...] [--lengths 512 8192] [--json FILE]
    python benchmarks/compile_time.py RECIPE ... --lengths 512 --depths 2 12 --blocks

--blocks: every block by itself (`atlas_blocks.compile_blocks`), else the model as one graph.
--apart: in turn with it, each kernel a program of its own, as before all of a graph were one.

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

from atlas_blocks.recipes.counts import at_least
from atlas_blocks.recipes.demo import hardware


def measure(
    recipe: str, length: int, depth: int | None, apart: bool, blocks: bool, threads: int
) -> dict[str, float]:
    """In a fresh process: seconds of compiling by the wall and of processors, tracing's part of
    them, and of a step afterwards."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics

    from atlas_blocks.compile_passes import compile_blocks
    from atlas_blocks.graph import one_program
    from atlas_blocks.recipes import build

    if apart:
        one_program.SINCE = (sys.maxsize, 0)

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


def in_a_process(
    recipe: str, length: int, depth: int | None, apart: bool, blocks: bool, threads: int
) -> dict[str, float]:
    """`measure` in a fresh process with an empty cache."""
    command = [sys.executable, __file__, recipe, "--one", "--threads", str(threads)]
    command += ["--lengths", str(length), *(["--blocks"] if blocks else [])]
    command += [] if depth is None else ["--depths", str(depth)]
    command += ["--apart"] if apart else []
    with tempfile.TemporaryDirectory() as cache:
        # One compile thread: g++ is then a child whose time is counted.
        own = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env={**os.environ, **own}
        )
    return json.loads(done.stdout.splitlines()[-1])


def named(length: int, depth: int | None, apart: bool) -> str:
    of_depth = "" if depth is None else f" depth {depth}"
    return f"T={length}{of_depth}" + (" kernels apart" if apart else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["omeganet-tiny"])
    parser.add_argument("--lengths", type=at_least(1), nargs="+", default=[512, 8192])
    parser.add_argument(
        "--depths", type=at_least(1), nargs="+", help="Blocks; the recipe's own if not."
    )
    parser.add_argument("--blocks", action="store_true", help="every block by itself")
    parser.add_argument("--apart", action="store_true", help="each kernel a program too, in turn")
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--json", help="write the figures here too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    shapes = [(length, depth) for depth in a.depths or [None] for length in a.lengths]
    if a.one:
        print(json.dumps(measure(a.recipes[0], *shapes[0], a.apart, a.blocks, a.threads)))
        return
    cases = [(*shape, apart) for shape in shapes for apart in sorted({False, a.apart})]
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    for recipe in a.recipes:
        figures[recipe] = {named(*case): [] for case in cases}
        for round_ in range(a.rounds):
            for case in cases if round_ % 2 == 0 else reversed(cases):
                found = in_a_process(recipe, *case, a.blocks, a.threads)
                figures[recipe][named(*case)].append(found)
                shown = "  ".join(f"{k} {v:.1f} s" for k, v in found.items())
                print(f"{recipe} {named(*case)}: {shown}", flush=True)
        first = named(*cases[0])
        for kind in ("wall", "processors"):
            times = {n: [s[kind] for s in found] for n, found in figures[recipe].items()}
            for case, own in times.items():
                middle, of = statistics.median(own), statistics.median(times[first])
                spread = f"{min(own):.1f} to {max(own):.1f}"
                ratio = f"{middle / of:.2f} of {first}"
                print(f"{recipe}, {kind}, {case}: {middle:.1f} s ({spread}), {ratio}", flush=True)
    if a.json:
        record = {
            "what": {"blocks": a.blocks, "threads": a.threads},
            "date": datetime.date.today().isoformat(),
            "machine": hardware(),
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "figures": figures,
        }
        with open(a.json, "w") as file:
            json.dump(record, file, indent=2)


if __name__ == "__main__":
    main()
