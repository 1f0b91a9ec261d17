"""What long contexts cost: streaming, one token after a long context, training a layer.

    python benchmarks/long_context.py stream RECIPE [--tokens 10000000] [--seconds 540]
    python benchmarks/long_context.py decode RECIPE [--lengths 1024 ...]
    python benchmarks/long_context.py train [--dim 1024] [--heads 16] [--lengths 1024 ...]
        stream, train: [--compile]; all: [--device cuda] --json FILE

A plot is written beside FILE where matplotlib is installed.

stream: random tokens through a recipe, its state carried; tokens/s and most memory for every
million. After --seconds it stops with status 1; the same command goes on from the state it left.
decode: milliseconds for one token after so many, in turn with a Transformer of the same width and
depth: its step without a past, and in every layer scaled_dot_product_attention over a cache of the
past, into which nothing is written: less than any real one does.
train: forward + backward of one AtlasMemory layer and of one attention layer (causal, rotary,
FlashAttention where SDPA takes it) in turn, one sequence; and from which length on the first is
cheaper. Lengths that are in FILE already are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import (
    AtlasMemory,
    AtlasMemoryConfig,
    SlidingWindowAttention,
    SlidingWindowAttentionConfig,
    State,
)
from atlas_blocks.recipes import build
from atlas_blocks.recipes.bench.measure import Meter, interleave, quartiles
from atlas_blocks.recipes.bench.report import stamp
from atlas_blocks.recipes.counts import at_least
from atlas_blocks.recipes.files import replacing, write_json

MILLION = 1_000_000
LENGTHS = [2**n for n in range(10, 18)]


# --- stream -----------------------------------------------------------------------------------


def stream(a: argparse.Namespace, device: torch.device, keep: Callable[[dict], None]) -> None:
    rows = a.record["rows"]
    left = a.json.with_suffix(".state.pt")
    torch.manual_seed(0)
    model = build(a.recipe).to(device).eval()
    if a.compile:
        model.compile(backend="atlas")
    state = None
    if rows and left.exists():
        state = State.from_dict(torch.load(left, weights_only=True))
    if rows and state is None:
        raise SystemExit(f"{a.json}: expected the state after {len(rows)} parts in {left}")
    done = sum(row["tokens"] for row in rows)
    with torch.no_grad():
        model(torch.zeros(1, a.piece, dtype=torch.int64, device=device))  # warms up
        began = time.monotonic()
        while done < a.tokens and time.monotonic() - began < a.seconds:
            generator = torch.Generator().manual_seed(done)
            part = min(MILLION, a.tokens - done)
            vocab = model.config.vocab_size
            tokens = torch.randint(vocab, (1, part), generator=generator).to(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for piece in tokens.split(a.piece, 1):
                logits, state = model(piece, state)
            finite = bool(logits.isfinite().all())
            seconds = time.perf_counter() - start
            done += part
            row = {
                "tokens": part,
                "tokens_per_s": part / seconds,
                "peak_bytes": peak(device),
                "state_bytes": sum(t.nbytes for t in state.tensors()),
                "finite": finite,
            }
            with replacing(left) as partial:
                torch.save(state.to_dict(), partial)
            keep(row)
            print(
                f"{done / MILLION:.1f} M tokens: {row['tokens_per_s']:.0f} tokens/s, at most "
                f"{row['peak_bytes'] / 2**20:.0f} MiB, finite: {finite}",
                flush=True,
            )
    if done >= a.tokens:
        a.record["complete"] = True
        left.unlink(missing_ok=True)


def peak(device: torch.device) -> int:
    """Most bytes allocated in this million on a GPU; most that this process ever had on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- decode -----------------------------------------------------------------------------------


def decode(a: argparse.Namespace, device: torch.device, keep: Callable[[dict], None]) -> None:
    torch.manual_seed(0)
    size = a.recipe.rpartition("-")[2]
    models = {name: build(name).to(device).eval() for name in (a.recipe, f"transformer-{size}")}
    ours, rival = models.values()
    width = rival.config.dim // rival.config.heads
    meter = Meter(device)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        before = rival(token)[1]
        state, seen = None, 0
        for length in a.lengths:
            # The same sequence goes on from one length to the next.
            while seen < length:
                piece = min(a.piece, length - seen)
                rows = torch.randint(ours.config.vocab_size, (1, piece)).to(device)
                state = ours(rows, state)[1]
                seen += piece
            if length in {row["length"] for row in a.record["rows"]}:
                continue
            cache = torch.randn(2, 1, rival.config.heads, length, width, device=device)
            query = cache[0, :, :, -1:]

            def attend(cache: Tensor = cache, query: Tensor = query) -> None:
                rival(token, before)
                for _ in range(rival.config.depth):
                    F.scaled_dot_product_attention(query, *cache)

            runs = {"ours": partial(ours, token, state), "transformer": attend}
            row = {
                "length": length,
                **timed(runs, meter, a.rounds),
                "state_bytes": sum(t.nbytes for t in state.tensors()),
                "cache_bytes": rival.config.depth * cache.nbytes,
            }
            keep(row)
            show(row)
    a.record["complete"] = True


# --- train ------------------------------------------------------------------------------------


def train(a: argparse.Namespace, device: torch.device, keep: Callable[[dict], None]) -> None:
    torch.manual_seed(0)
    config = AtlasMemoryConfig().replace(**dict(pair.split("=") for pair in a.memory))
    layers = {
        "ours": AtlasMemory(a.dim, a.heads, config).to(device),
        "transformer": SlidingWindowAttention(
            a.dim, a.heads, SlidingWindowAttentionConfig(window=None)
        ).to(device),
    }
    if a.compile:
        for layer in layers.values():
            layer.compile(backend="atlas")
    meter = Meter(device)
    for length in a.lengths:
        if length in {row["length"] for row in a.record["rows"]}:
            continue
        x = torch.randn(1, length, a.dim, device=device)

        def step(layer: nn.Module, x: Tensor = x) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                y = layer(x)[0]
            torch.autograd.grad(y, list(layer.parameters()), torch.ones_like(y), allow_unused=True)

        runs = {name: partial(step, layer) for name, layer in layers.items()}
        row = {"length": length, **timed(runs, meter, a.rounds)}
        keep(row)
        show(row)
    a.record["cheaper_from"] = crossing(a.record["rows"])
    found = a.record["cheaper_from"]
    print("ours is cheaper", "nowhere" if found is None else f"from {found:.0f} tokens on")
    a.record["complete"] = True


def crossing(rows: list[dict]) -> float | None:
    """The length at which the times meet, by a straight line between logarithms; None: nowhere."""
    points = sorted(
        (row["length"], math.log(row["ours"]["ms"] / row["transformer"]["ms"]))
        for row in rows
        if row["ours"]["ms"] and row["transformer"]["ms"]
    )
    if points and points[0][1] <= 0:
        return float(points[0][0])
    for (short, above), (long, below) in itertools.pairwise(points):
        if above > 0 >= below:
            part = above / (above - below)
            return math.exp(math.log(short) * (1 - part) + math.log(long) * part)
    return None


# --- what they share --------------------------------------------------------------------------


def timed(runs: dict[str, Callable[[], object]], meter: Meter, rounds: int) -> dict[str, Any]:
    """Of each: median milliseconds and quartiles, or why there are none."""
    problems = {name: meter.attempt(run) for name, run in runs.items()}  # warms up
    times, failed = interleave(
        {name: run for name, run in runs.items() if not problems[name]},
        meter,
        rounds,
        lambda _: None,
    )
    found: dict[str, Any] = {}
    for name in runs:
        problem = problems[name] or failed.get(name, "")
        low, ms, high = (None, None, None) if problem else quartiles(times[name])
        found[name] = {"ms": ms, "quartiles": [low, high], "problem": problem}
    return found


def show(row: dict) -> None:
    parts = (f"{n} {row[n]['ms'] or row[n]['problem']}" for n in ("ours", "transformer"))
    print(f"{row['length']} tokens, ms:", ", ".join(parts), flush=True)


def plot(record: dict, file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    rows = record["rows"]
    if record["benchmark"] == "stream":
        axes.plot(range(1, len(rows) + 1), [row["tokens_per_s"] for row in rows], marker="o")
        axes.set(xlabel="million tokens", ylabel="tokens/s", ylim=(0, None))
    else:
        for name in ("ours", "transformer"):
            points = [(row["length"], row[name]["ms"]) for row in rows if row[name]["ms"]]
            axes.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        axes.set(xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
        axes.legend()
    axes.set_title(f"{record['benchmark']}: {record['what'].get('recipe', 'one layer')}")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    runs = {"stream": stream, "decode": decode, "train": train}
    for kind in runs:
        p = kinds.add_parser(kind)
        p.add_argument("--json", type=Path, required=True)
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if kind != "decode":
            p.add_argument("--compile", action="store_true", help='by backend="atlas"')
        if kind == "stream":
            p.add_argument("--tokens", type=at_least(1), default=10 * MILLION)
            p.add_argument("--seconds", type=float, default=540)
        else:
            p.add_argument("--lengths", type=at_least(1), nargs="+", default=LENGTHS)
            p.add_argument("--rounds", type=at_least(1), default=25)
        if kind == "train":
            p.add_argument("--dim", type=at_least(1), default=1024)
            p.add_argument("--heads", type=at_least(1), default=16)
            p.add_argument("--memory", nargs="*", default=["update=gd"], metavar="FIELD=VALUE")
        else:
            p.add_argument("recipe")
            p.add_argument("--piece", type=at_least(1), default=8192)
    a = parser.parse_args()
    device = torch.device(a.device)
    limits = ("kind", "json", "device", "seconds", "tokens", "lengths")  # more may be asked later
    what = {name: value for name, value in vars(a).items() if name not in limits}
    a.record = {"benchmark": a.kind, "what": what, **stamp(device), "rows": []}
    if a.json.exists():
        earlier = json.loads(a.json.read_text())
        for name in ("benchmark", "what", "machine", "versions"):
            if earlier[name] != a.record[name]:
                parser.error(f"{a.json}: expected {name} {a.record[name]}, got {earlier[name]}")
        a.record = earlier
    a.json.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        write_json(a.json, a.record)

    def keep(row: dict) -> None:
        a.record["rows"].append(row)
        write()

    runs[a.kind](a, device, keep)
    write()
    plot(a.record, a.json.with_suffix(".png"))
    if not a.record["complete"]:
        raise SystemExit("time is up: the same command goes on from here")


if __name__ == "__main__":
    main()
