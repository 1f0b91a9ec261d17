"""`atlas-blocks bench kernels`: the recurrence by every provider, beside other libraries."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from atlas_blocks import check
from atlas_blocks.recipes import display, files
from atlas_blocks.recipes.bench import gate, report
from atlas_blocks.recipes.bench.contenders import (
    CHUNK,
    EXPANSION,
    NS_STEPS,
    OTHERS,
    PRODUCT,
    WINDOW,
    Contender,
    Shape,
    candidates,
)
from atlas_blocks.recipes.bench.measure import Meter, Row, compare

LENGTHS = range(10, 16)  # the sweep: T = 1024 ... 32768, as powers of two


@dataclass(frozen=True)
class Plan:
    """What to time. dims: D of the main comparison; the sweep is at the first of them.

    everything: all rows, and the sweep at every D. quick: the first D, no sweep, few rounds.
    """

    device: torch.device
    dims: tuple[int, ...]
    heads: int
    batch: int
    tokens: int
    rounds: int
    everything: bool = False
    quick: bool = False
    compiled: bool = True

    def __post_init__(self) -> None:
        check.choice("device", self.device.type, ("cpu", "cuda"))
        check.at_least("dims", len(self.dims), 1)
        for dim in self.dims:
            check.at_least("dims", dim, 1)
        for name in ("heads", "batch", "tokens", "rounds"):
            check.at_least(name, getattr(self, name), 1)

    @property
    def gate_shape(self) -> Shape:
        """Where errors are measured."""
        return Shape(1, 512, 2, 64) if self.device.type == "cuda" else Shape(1, 96, 1, 16)

    def shapes(self) -> list[tuple[str, Shape]]:
        """("main" or "sweep", shape): B x T is the same for all of them."""
        dims = self.dims[:1] if self.quick else self.dims
        found = [("main", Shape(self.batch, self.tokens, self.heads, d)) for d in dims]
        if self.quick:
            return found
        total = self.batch * self.tokens
        for dim in dims if self.everything else dims[:1]:
            for length in (2**n for n in LENGTHS):
                if total % length == 0:
                    found.append(("sweep", Shape(total // length, length, self.heads, dim)))
        return found


def plan(
    device: torch.device,
    *,
    dims: tuple[int, ...] | None,
    heads: int | None,
    batch: int | None,
    tokens: int | None,
    rounds: int | None,
    everything: bool,
    quick: bool,
    compiled: bool,
) -> Plan:
    """The plan with the device's defaults for what is None."""
    gpu = device.type == "cuda"

    def given(value: int | None, on_gpu: int, on_cpu: int) -> int:
        return value if value is not None else on_gpu if gpu else on_cpu

    return Plan(
        device=device,
        dims=dims or ((64, 128) if gpu else (16,)),
        heads=given(heads, 16, 2),
        batch=given(batch, 4, 2),
        tokens=given(tokens, 8192, 1024),
        rounds=given(rounds, 8 if quick else 30, 3 if quick else 5),
        everything=everything,
        quick=quick,
        compiled=compiled,
    )


def run(console: Console, plan: Plan, out: Path) -> str:
    """Gate, then time, then write kernels.json and kernels.png into the folder `out`.

    Returns what the gate found wrong, in one line; empty where nothing is. The figures are written
    after every shape, so that a run that is cut short leaves those it has.
    """
    files.check_folder("out", out)
    record = _record(plan)
    chosen = [
        c for c in candidates(plan.device, compiled=plan.compiled) if plan.everything or not c.extra
    ]
    # The definition that others are measured against keeps its float32.
    checking = display.working(
        console, "checking every provider against float64: compiling each takes up to a minute"
    )
    with checking, _float32_products("highest"):
        verdicts = gate.check(chosen, plan.gate_shape, plan.device)
    record["gate"]["verdicts"] = [v.to_dict() for v in verdicts]
    _write(out, record)
    console.print(report.gate_table(verdicts))
    problem = next((v.problem for v in verdicts if v.problem), "")
    if problem:
        return f"{problem}; nothing was timed"

    contenders = [PRODUCT, *(c.contender() for c in chosen)]
    contenders += [c for c in OTHERS if plan.everything or not c.extra]
    rows = _time(console, plan, contenders, out, record)
    record["complete"] = True
    _write(out, record)
    written = ["kernels.json"]
    where = record["machine"].get("gpu") or f"CPU ({record['machine']['processor']})"
    if report.plot(out / "kernels.png", rows, f"{where}, H {plan.heads}, bfloat16"):
        written.append("kernels.png")
    else:
        console.print("no kernels.png: matplotlib is missing (pip install 'atlas-blocks[plot]')")
    console.print(f"[bold]{out}[/]: {', '.join(written)}")
    return ""


def _time(
    console: Console, plan: Plan, contenders: list[Contender], out: Path, record: dict[str, Any]
) -> list[Row]:
    where = "" if plan.device.type == "cuda" else "on the CPU, by the wall clock: "
    meter = Meter(plan.device)
    rows: list[Row] = []
    work = []
    for part, shape in plan.shapes():
        here = [c for c in contenders if part == "main" or plan.everything or c.sweep]
        work.append((part, shape, here))
    total = sum(2 * (len(here) + plan.rounds) for _, _, here in work)
    with report.steps(console, total) as on_step, _float32_products("high"):
        for part, shape, here in work:
            if plan.compiled:
                # Graphs of one shape are no use to the next and count towards the compiler's limit.
                torch.compiler.reset()
            found = compare(
                here,
                shape,
                meter,
                part=part,
                rounds=plan.rounds,
                on_step=lambda words, at=shape: on_step(f"{at}, {words}"),
            )
            rows += found
            record["rows"] = [dataclasses.asdict(r) | {"shape": r.shape._asdict()} for r in rows]
            _write(out, record)
            console.print(report.table(found, f"{where}{part}, {shape}"))
    return rows


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """ "high" is tf32. It is what the kernels use, so the definition is timed with it too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _record(plan: Plan) -> dict[str, Any]:
    gpu = plan.device.type == "cuda"
    return {
        "benchmark": "kernels",
        **report.stamp(plan.device),
        "what": {
            "timer": "CUDA events" if gpu else "wall clock, on a CPU",
            "rounds": plan.rounds,
            "dtype": "bfloat16; gates and weights float32",
            "float32_products": "tf32" if gpu else "float32",
            "window": WINDOW,
            "chunk": CHUNK,
            "expansion": EXPANSION,
            "ns_steps": NS_STEPS,
        },
        "gate": {"limit": gate.LIMIT, "shape": plan.gate_shape._asdict(), "verdicts": []},
        "rows": [],
    }


def _write(out: Path, record: dict[str, Any]) -> None:
    files.write_json(out / "kernels.json", record)
