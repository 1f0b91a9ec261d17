"""What `explain` finds out, as plain data that tests read and as tables that people read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from atlas_blocks.compile_passes.graph_pass import PassRun


@dataclass(frozen=True)
class Graph:
    """One graph that Dynamo captured. call: the call of the model that caused it, from 0.

    nodes: ops in it after autograd, forward and backward, before Inductor fuses them.
    """

    number: int
    call: int
    forward_nodes: int
    backward_nodes: int
    dynamic: bool


@dataclass(frozen=True)
class Break:
    """Where a graph ended early: the user's line, why, and what to do about it."""

    file: str
    line: int
    code: str
    reason: str
    hint: str


@dataclass(frozen=True)
class OpUse:
    """One op node of ours. refusals: why preferred providers do not serve it."""

    graph: int
    direction: str
    op: str
    provider: str
    reason: str
    refusals: dict[str, str]


@dataclass(frozen=True)
class Work:
    """What all nodes of one op in one graph compute and move.

    flops: by torch's FLOP formulas and ours, None where there is none. bytes: of their inputs and
    outputs. bound: "compute" or "memory", the side of the roofline: whether FLOPs per byte exceed
    the device's balance; "unknown" without FLOPs.
    """

    graph: int
    direction: str
    op: str
    count: int
    flops: int | None
    bytes: int
    bound: str


@dataclass(frozen=True)
class Recompile:
    """A call that no compiled graph served. guard: what had been assumed and did not hold."""

    call: int
    function: str
    file: str
    line: int
    guard: str


@dataclass(frozen=True)
class Report:
    """What became of a model under backend="atlas".

    compile_seconds: cold, without caches, of every call: the time it took beyond a second run of
    the same. dynamo_seconds: of that, tracing. balance: FLOPs the device does in the time it moves
    a byte, measured; (flops per second, bytes per second).
    """

    device: str
    graphs: tuple[Graph, ...]
    breaks: tuple[Break, ...]
    ops: tuple[OpUse, ...]
    work: tuple[Work, ...]
    recompiles: tuple[Recompile, ...]
    passes: tuple[PassRun, ...]
    compile_seconds: tuple[float, ...]
    dynamo_seconds: float
    balance: tuple[float, float] = field(default=(0.0, 0.0))

    def __rich__(self) -> RenderableType:
        return Group(*(part for part in _parts(self) if part is not None))


def _parts(r: Report) -> Sequence[RenderableType | None]:
    whole = not r.breaks and len({g.call for g in r.graphs}) == len(r.graphs)
    seconds = " + ".join(f"{s:.1f}" for s in r.compile_seconds)
    title = "one graph a call, no breaks" if whole else f"{len(r.breaks)} graph breaks"
    verdict = Text(f"{title}; compiled in {seconds} s, {r.dynamo_seconds:.1f} s of it tracing")
    return (
        Panel(verdict, title="torch.compile", border_style="green" if whole else "red"),
        _graphs(r),
        _breaks(r),
        _recompiles(r),
        _ops(r),
        _passes(r),
        _work(r),
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        number = name in ("call", "line", "nodes", "matches", "ms", "count", "GFLOP", "MB")
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


def _graphs(r: Report) -> Table:
    table = _table("Graphs", "graph", "call", "forward nodes", "backward nodes", "lengths")
    for g in r.graphs:
        lengths = "any" if g.dynamic else "this one"
        row = (g.number, g.call, g.forward_nodes, g.backward_nodes or "-", lengths)
        table.add_row(*map(str, row))
    return table


def _breaks(r: Report) -> Table | None:
    table = _table("Graph breaks", "where", "code", "why", "what to do")
    for b in r.breaks:
        table.add_row(f"{b.file}:{b.line}", Text(b.code), Text(b.reason), Text(b.hint))
    return table if r.breaks else None


def _recompiles(r: Report) -> Table | None:
    table = _table("Recompiles", "call", "function", "guard that failed")
    for c in r.recompiles:
        table.add_row(str(c.call), f"{c.function} ({c.file}:{c.line})", Text(c.guard))
    return table if r.recompiles else None


def _ops(r: Report) -> Table | None:
    table = _table("Ops of this library", "graph", "op", "count", "provider", "why")
    alike: dict[tuple[str, ...], int] = defaultdict(int)
    for u in r.ops:
        why = "; ".join([u.reason, *(f"not {name}: {no}" for name, no in u.refusals.items())])
        alike[f"{u.graph} {u.direction}", u.op, u.provider, why] += 1
    for (graph, op, provider, why), count in alike.items():
        table.add_row(graph, op, str(count), provider, Text(why))
    return table if r.ops else None


def _passes(r: Report) -> Table:
    table = _table("Passes", "graph", "pass", "matches", "ops before → after", "ms")
    for p in r.passes:
        changed = ", ".join(f"{op} {n:+d}" for op, n in p.changed.items())
        counts = f"{p.before} → {p.after}" + (f" ({changed})" if changed else "")
        row = (f"{p.graph} {p.direction}", p.name, str(p.matches), counts, f"{1e3 * p.seconds:.1f}")
        table.add_row(*row)
    return table


def _work(r: Report) -> Table | None:
    columns = ("graph", "op", "count", "GFLOP", "MB", "FLOP/byte", "bound by")
    flops, moved = r.balance
    title = (
        f"Work on {r.device}: {flops / 1e9:.0f} GFLOP/s and {moved / 1e9:.0f} GB/s measured, "
        f"so {flops / moved:.0f} FLOP/byte is the edge"
    )
    table = _table(title, *columns)
    for w in r.work:
        flops = intensity = "-"
        if w.flops is not None:
            flops, intensity = f"{w.flops / 1e9:.3g}", f"{w.flops / max(1, w.bytes):.1f}"
        row = (f"{w.graph} {w.direction}", w.op, str(w.count), flops)
        table.add_row(*row, f"{w.bytes / 1e6:.3g}", intensity, w.bound)
    return table if r.work else None
