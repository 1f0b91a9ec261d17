"""The walk over chunks in parallel sweeps, between all gradients at the call's start and the rule.

    OMP_NUM_THREADS=1 python benchmarks/picard.py [--tokens 2048] [--json FILE]

A sweep takes every chunk's gradients at once, at the chunk starts that the sweep before found, and
then finds the starts anew, which are linear in the gradients: a Picard iteration. One sweep from
M_0 is what titans-pytorch does by default; after as many sweeps as there are chunks it is the rule.

Distance: of y from the rule's, relative, float64, with the inputs of chunk_distance.py, also with a
tenth of their write strengths. Time: of one sweep, forward, float32, over that of the walk from
chunk to chunk, in turn: the median of the ratios, with quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import chunk_distance
import torch
from torch import Tensor

from atlas_blocks.omega.arguments import Arguments, checked, first_state
from atlas_blocks.omega.chunks import Piece, Read, Write, cut
from atlas_blocks.omega.definition import prepare
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.walk import ChunkMemory, Ends, chunk_end, read_chunks, walk_ends
from atlas_blocks.recipes.bench.report import stamp
from atlas_blocks.recipes.counts import at_least

SWEEPS = (1, 2, 3, 4, 8)
STRENGTHS = (0.5, 0.05)
CHUNK = 64


def chunks_of(a: Arguments) -> tuple[Write, Read, ChunkMemory]:
    """Of a call of whole chunks, cut."""
    a = checked(a)
    a = a._replace(state=first_state(a))
    tokens, memory, _ = prepare(a, 0)
    piece = Piece(0, CHUNK, a.q.shape[1] // CHUNK, 0)
    return *cut(a.rule, a.feature_map, tokens, piece, memory.scale), memory


def sweep(rule: Rule, write: Write, starts: list[Tensor], memory: ChunkMemory) -> Ends:
    """Gradients of all chunks at these starts [N, G, ...], and the starts that they lead to."""
    count, weights = len(write.eta), len(memory.weights)
    flat = [t.flatten(0, 1) for t in starts]
    w, s, scale = flat[:weights], flat[weights:-1], flat[-1]
    x = write.flatten()
    factors, coefficients, end = chunk_end(rule, x, ChunkMemory.begin(w, s, scale, []))
    last = x.last if coefficients is None else coefficients.rows(-1)
    assert last is not None

    def apart(t: Tensor) -> Tensor:
        return t.unflatten(0, (count, -1))

    # What a chunk adds: its end without what it keeps of its start.
    def added(after: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
        return [apart(new - old) for new, old in zip(after, kept, strict=True)]

    passed = [x.abar * t for t in w]
    if last.carried is not None:
        passed = [p - last.carried * t for p, t in zip(passed, s, strict=True)]
    more = added(end.weights, passed)
    more_s = added(end.momentum, [] if x.thbar_last is None else [x.thbar_last * t for t in s])
    keep, carried = apart(x.abar), None if last.carried is None else apart(last.carried)
    keep_s = None if x.thbar_last is None else apart(x.thbar_last)
    now, now_s = memory.weights, memory.momentum
    found: list[list[Tensor]] = []
    for n in range(count):
        found.append([*now, *now_s])
        now = [keep[n] * t + d[n] for t, d in zip(now, more, strict=True)]
        if carried is not None and keep_s is not None:
            now = [t - carried[n] * m for t, m in zip(now, now_s, strict=True)]
            now_s = [keep_s[n] * m + d[n] for m, d in zip(now_s, more_s, strict=True)]
    scales = torch.cat([memory.scale.unsqueeze(0), apart(end.scale)[:-1]])
    tensors = [*(torch.stack(ts) for ts in zip(*found, strict=True)), scales]
    if coefficients is not None:
        coefficients = coefficients.map(apart)
    return Ends(tensors, [(apart(left), apart(r)) for left, r in factors], coefficients)


def picard(rule: Rule, write: Write, memory: ChunkMemory, sweeps: int) -> Ends:
    count = len(write.eta)
    starts = [t.expand(count, *t.shape) for t in memory.start()]
    for _ in range(sweeps):
        ends = sweep(rule, write, starts, memory)
        starts = ends.starts
    return ends


def single(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


def seconds(run: Any) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


@torch.no_grad()
def measure(
    tokens: int, strength: float, memory: str, window: int, momentum: bool, rounds: int
) -> dict[str, Any]:
    a = chunk_distance.arguments(memory, window, CHUNK, momentum, "online", tokens, strength)
    write, read, start = chunks_of(a)
    ends, _ = walk_ends(a.rule, write.unbind(), start, None)
    true = read_chunks(a.rule, read, ends, [])
    row: dict[str, Any] = {"memory": memory, "window": window, "momentum": momentum}
    row["strength"] = strength
    for k in SWEEPS:
        y = read_chunks(a.rule, read, picard(a.rule, write, start, k), [])
        row[f"distance {k}"] = ((y - true).norm() / true.norm()).item()
    write, start = write.map(single), start.map(single)
    ratios = []
    for _ in range(rounds):
        plain = seconds(lambda: walk_ends(a.rule, write.unbind(), start, None))
        ratios.append(seconds(lambda: picard(a.rule, write, start, 1)) / plain)
    row["time of a sweep"] = statistics.quantiles(ratios, n=4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=at_least(CHUNK), default=2048)
    parser.add_argument("--rounds", type=at_least(2), default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.tokens % CHUNK:
        parser.error(f"--tokens: expected a multiple of {CHUNK}, got {args.tokens}")
    rows = []
    kinds = product(STRENGTHS, ("matrix", "mlp", "gated_mlp"), (1, 16), (False, True))
    for strength, *kind in kinds:
        row = measure(args.tokens, strength, *kind, args.rounds)
        rows.append(row)
        print(f"eta to {strength}, {kind[0]}, c = {kind[1]}, momentum {kind[2]}: ", end="")
        print(", ".join(f"{k}: {row[f'distance {k}']:.2g}" for k in SWEEPS), end="; ")
        low, middle, high = row["time of a sweep"]
        print(f"a sweep takes {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)
    if args.json:
        record = {**stamp(torch.device("cpu")), "tokens": args.tokens, "chunk": CHUNK}
        args.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
