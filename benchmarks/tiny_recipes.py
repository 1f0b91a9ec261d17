"""Every tiny recipe's training step under backend="atlas": time to compile, and against eager.

    python benchmarks/tiny_recipes.py [RECIPE ...] [--json FILE]

Each recipe runs in a process of its own with an empty cache of compiled code. "toolchain" is what
torch does once a machine (it tries the compiler with every vector instruction set), and is not in
"compile". Gradients are compared first; a step is loss and gradients. Steps compiled and eager
alternate, and the figure is the median of the ratios of neighbours, with quartiles. With --json,
recipes that are in the file already are not measured again. It takes a minute or two a recipe.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from atlas_blocks.recipes import names
from atlas_blocks.recipes.counts import at_least
from atlas_blocks.recipes.demo import hardware
from atlas_blocks.recipes.files import write_json


def measure(recipe: str, batch: int, length: int, threads: int, rounds: int) -> dict[str, float]:
    """In a fresh process. Seconds; "ratio" is eager's time over compiled's."""
    import torch
    import torch.nn.functional as F

    from atlas_blocks.recipes import build

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(recipe)
    compiled = torch.compile(model, backend="atlas", fullgraph=True)
    rows = torch.randint(0, 256, (batch, length))

    def step(function: torch.nn.Module) -> tuple[float, list[torch.Tensor]]:
        parameters = list(function.parameters())
        began = time.perf_counter()
        logits = function(rows).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        found = torch.autograd.grad(loss, parameters)
        return time.perf_counter() - began, list(found)

    def gap(ours: list[torch.Tensor], true: list[torch.Tensor]) -> float:
        largest = max(g.abs().max().item() for g in true)
        return max((a - b).abs().max().item() for a, b in zip(ours, true, strict=True)) / largest

    began = time.perf_counter()
    torch.compile(torch.exp)(torch.ones(256))
    toolchain = time.perf_counter() - began
    cold, ours = step(compiled)
    _, true = step(model)
    error = gap(ours, true)
    # Newton-Schulz magnifies rounding: the measure is what a rounding of the parameters does.
    shaken = copy.deepcopy(model)
    with torch.no_grad():
        for p in shaken.parameters():
            p.mul_(1 + 2**-22 * torch.randint_like(p, -1, 2))
    rounding = gap(step(shaken)[1], true)
    if not error < max(1e-4, 10 * rounding):
        raise RuntimeError(f"{recipe}: gradients differ by {error:.1e}, rounding {rounding:.1e}")
    for function in (compiled, model):
        step(function)
    pairs = [(step(model)[0], step(compiled)[0]) for _ in range(rounds)]
    ratios = [eager / fast for eager, fast in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    eager, fast = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "toolchain": toolchain,
        "compile": cold - fast,
        "eager": eager,
        "compiled": fast,
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "gradient_error": error,
        "rounding_error": rounding,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tiny = [name for name in names() if name.endswith("-tiny")]
    parser.add_argument("recipes", nargs="*", default=tiny)
    parser.add_argument("--batch", type=at_least(1), default=1)
    parser.add_argument("--length", type=at_least(1), default=512)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--rounds", type=at_least(1), default=25)
    parser.add_argument("--json", type=Path, help="keep the figures here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    settings = {n: getattr(a, n) for n in ("batch", "length", "threads", "rounds")}
    if a.one:
        print(json.dumps(measure(a.recipes[0], **settings)))
        return
    record = {
        "what": {"backend": "atlas", **settings},
        "date": datetime.date.today().isoformat(),
        "machine": hardware(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "figures": {},
    }
    if a.json and a.json.exists():
        earlier = json.loads(a.json.read_text())
        for name in ("what", "machine", "versions"):
            if earlier[name] != record[name]:
                parser.error(f"{a.json}: expected {name} {record[name]}, got {earlier[name]}")
        record["figures"], record["date"] = earlier["figures"], earlier["date"]
    for recipe in a.recipes:
        if recipe in record["figures"]:
            continue
        options = [text for n, value in settings.items() for text in (f"--{n}", str(value))]
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, __file__, recipe, "--one", *options],
                check=True,
                stdout=subprocess.PIPE,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            )
        found = record["figures"][recipe] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{recipe}: compiled in {found['compile']:.0f} s, gradients to "
            f"{found['gradient_error']:.0e}, step {1e3 * found['compiled']:.0f} ms, "
            f"eager / compiled {found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]",
            flush=True,
        )
        if a.json:
            write_json(a.json, record)


if __name__ == "__main__":
    main()
