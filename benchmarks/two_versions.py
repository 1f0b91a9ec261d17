"""One memory layer and the training of recipes in two versions of this repository, in turn.

    python benchmarks/two_versions.py BEFORE [AFTER] [--rounds 9] [--only WORDS] [--json FILE]
    python benchmarks/two_versions.py BEFORE [AFTER] --cold --rounds 1 [--only WORDS] [--json FILE]

BEFORE and AFTER are commits; AFTER is HEAD where it is left out. Each version runs in a process of
its own, and both take turns within every round, so that the machine's noise falls on both. The
ratio is speed after / speed before, of every round: median and quartiles. float32, one sequence.

Layers: forward under no_grad and forward + backward of T = 2048 (dim 256, 4 heads, window 16, chunk
64), eager and compiled. Recipes: one training step of T = 512, eager, and of one of them compiled.

--cold: instead, what compiling a training step costs of each tiny recipe that both have, as each
version does it best (every block by itself, where it can): the first step less the second, in
processor time with the C++ compiler's. Every one has a process of its own and an empty cache, and
takes half a minute to two.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LAYERS = {
    "matrix": {"memory": "matrix"},
    "mlp": {"memory": "mlp", "expansion": 1},
}
RECIPES = ("deltanet-tiny", "gated-deltanet-tiny", "omeganet-tiny", "titans-tiny", "atlas-mag-tiny")
COMPILED = ("atlas-mag-tiny",)
DIM, HEADS, LENGTH, RECIPE_LENGTH = 256, 4, 2048, 512


def cases() -> list[str]:
    """Of processes that live on."""
    layers = [
        f"{name} / {what} / {how}"
        for name in LAYERS
        for what in ("forward", "forward + backward")
        for how in ("eager", "compiled")
    ]
    eager = [f"{name} / training / eager" for name in RECIPES]
    return layers + eager + [f"{name} / training / compiled" for name in COMPILED]


def prepare(case: str) -> Callable[[], None]:
    """A function that runs the case once, in the version that is imported here."""
    import torch

    from atlas_blocks import AtlasMemory, AtlasMemoryConfig
    from atlas_blocks.recipes import build

    torch.manual_seed(0)
    name, what, how = case.split(" / ")
    if what == "training":
        model = build(name)
        run = torch.compile(model, backend="atlas", dynamic=False) if how == "compiled" else model
        tokens = torch.randint(0, 256, (1, RECIPE_LENGTH))

        def step() -> None:
            model.zero_grad()
            logits = run(tokens).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()

        return step
    config = AtlasMemoryConfig(update="gd", feature_map="identity", window=16, chunk_size=64)
    layer = AtlasMemory(DIM, HEADS, config.replace(**LAYERS[name]))
    f = torch.compile(layer, backend="atlas", dynamic=False) if how == "compiled" else layer
    x = torch.randn(1, LENGTH, DIM)

    def forward() -> None:
        with torch.no_grad():
            f(x)

    def both() -> None:
        f(x.detach().requires_grad_())[0].sum().backward()

    return forward if what == "forward" else both


def cold_cases(libraries: Iterable[Path]) -> list[str]:
    """The tiny recipes that all versions have."""
    code = "from atlas_blocks.recipes import names; print(*names())"
    found: dict[str, int] = {}
    for library in libraries:
        own = os.environ | {"PYTHONPATH": str(library)}
        told = subprocess.check_output(
            [sys.executable, "-c", code], cwd=library, env=own, text=True
        )
        for name in told.split():
            found[name] = found.get(name, 0) + name.endswith("-tiny")
    return [name for name, count in found.items() if count == max(found.values())]


def compiling(recipe: str) -> float:
    """Processor seconds of a first training step less those of the second."""
    import torch

    from atlas_blocks.recipes import build

    torch.manual_seed(0)
    model = build(recipe)
    try:
        from atlas_blocks.compile_passes import compile_blocks
    except ImportError:
        run = torch.compile(model, backend="atlas", fullgraph=True)
    else:
        run = compile_blocks(model)
    tokens = torch.randint(0, 256, (1, RECIPE_LENGTH))

    def step() -> float:
        began = processors()
        logits = run(tokens).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return processors() - began

    return step() - step()


def processors() -> float:
    """Seconds of this process and of those that it waited for."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def worker(threads: int, cold: bool) -> None:
    """Reads names of cases, answers with the seconds of one run."""
    import torch

    torch.set_num_threads(threads)
    if cold:
        print(compiling(sys.stdin.readline().strip()), file=sys.__stdout__, flush=True)
        return
    known: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        case = line.strip()
        if case not in known:
            known[case] = prepare(case)
            known[case]()
            known[case]()
        began = time.perf_counter()
        known[case]()
        print(time.perf_counter() - began, file=sys.__stdout__, flush=True)


def lay_out(commit: str, folder: Path) -> Path:
    """The version's packages as they are installed."""
    source, library = folder / "source", folder / "library"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=source, input=archive.stdout, check=True)
    library.mkdir()
    os.rename(source / "atlas_blocks", library / "atlas_blocks")
    for part in ("kernels", "compile_passes", "recipes"):
        os.rename(source / part, library / "atlas_blocks" / part)
    return library


def start(library: Path, threads: int, **more: str) -> subprocess.Popen[str]:
    """more: of its environment; with a cache of its own it measures one case that is cold."""
    environment = os.environ | {"PYTHONPATH": str(library), "OMP_NUM_THREADS": str(threads)} | more
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--threads", str(threads)]
    command += ["--cold"] if more else []
    # Not in the repository's folder, whose packages would be found first.
    return subprocess.Popen(
        command,
        cwd=library,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def seconds(process: subprocess.Popen[str], case: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(case + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"a version failed at {case!r}")
    return float(answer)


def cold_seconds(library: Path, threads: int, case: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        # One compile thread: the C++ compiler is then a child whose time is counted.
        own = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with start(library, threads, **own) as process:
            return seconds(process, case)


def full_name(commit: str) -> str:
    command = ["git", "rev-parse", "--short=10", commit]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"not a commit: {commit!r}")
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", nargs="?")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cold", action="store_true", help="what compiling a tiny recipe costs")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    # Of no version, so by hand.
    if min(args.rounds, args.threads) < 1:
        parser.error("--rounds, --threads: expected an int >= 1")
    if args.worker:
        return worker(args.threads, args.cold)
    if args.before is None:
        parser.error("the commit before is missing")
    commits = {"before": full_name(args.before), "after": full_name(args.after)}
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        libraries = {n: lay_out(c, Path(folder) / n) for n, c in commits.items()}
        living = {} if args.cold else {n: start(p, args.threads) for n, p in libraries.items()}
        for case in cold_cases(libraries.values()) if args.cold else cases():
            if args.only and args.only not in case:
                continue
            times: dict[str, list[float]] = {name: [] for name in libraries}
            for _ in range(args.rounds):
                for name, library in libraries.items():
                    if args.cold:
                        found = cold_seconds(library, args.threads, case)
                    else:
                        found = seconds(living[name], case)
                    times[name].append(found)
            ratios = [b / a for b, a in zip(times["before"], times["after"], strict=True)]
            low, middle, high = statistics.quantiles(ratios * 2 if len(ratios) < 2 else ratios, n=4)
            medians = {name: statistics.median(found) for name, found in times.items()}
            rows[case] = {"ratio": middle, "quartiles": [low, high], "seconds": medians}
            spent = ", ".join(f"{n} {1000 * t:,.0f} ms" for n, t in medians.items())
            print(f"{case:40} {middle:.2f} ({low:.2f} to {high:.2f})   {spent}", flush=True)
        for process in living.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    if args.json:
        import torch

        from atlas_blocks.recipes.bench.report import stamp

        record = {
            **stamp(torch.device("cpu")),
            "commits": commits,
            "threads": args.threads,
            "rows": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
