"""Two runs of `bench NAME`: which of their figures differ by more than their spread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from atlas_blocks.recipes import files
from atlas_blocks.recipes.describe import human
from atlas_blocks.recipes.display import Whole

# The allocator counts exactly; less than this is of no interest.
MEMORY_SHARE = 0.01
# Of fewer samples the quartiles lie so close together that any two runs differ.
ENOUGH_SAMPLES = 5


@dataclass(frozen=True)
class Move:
    """One figure of both runs. moved: beyond noise, i.e. for a time that the ranges between the
    quartiles do not touch, and that both are of samples enough to have quartiles."""

    contender: str
    mode: str
    figure: str  # "ms" or "bytes"
    before: float
    now: float
    moved: bool
    quartiles_before: tuple[float, float] | None = None
    quartiles_now: tuple[float, float] | None = None


def load(file: Path, what: dict[str, Any]) -> dict[str, Any]:
    """The record of an earlier run of the same thing.

    Raises ValueError where the file is none or holds another name, size or number of threads.
    """
    record = files.read_json("against", file)
    if record.get("benchmark") != "model" or not isinstance(record.get("rows"), list):
        raise ValueError(f"against: expected a file that `bench NAME` wrote, got {file}")
    if record.get("what") != what:
        raise ValueError(f"against: expected a run of {what}, got {record.get('what')}")
    return record


def moves(before: dict[str, Any], now: dict[str, Any]) -> list[Move]:
    """Every figure that both runs have."""
    earlier = {(r["contender"], r["mode"]): r for r in before["rows"]}
    found = []
    for row in json.loads(json.dumps(now["rows"])):
        old = earlier.get((row["contender"], row["mode"]))
        if old is None:
            continue
        place = row["contender"], row["mode"]
        if old["median_ms"] is not None and row["median_ms"] is not None:
            (low, high), (old_low, old_high) = row["quartiles_ms"], old["quartiles_ms"]
            apart = low > old_high or high < old_low
            enough = min(row["samples"], old["samples"]) >= ENOUGH_SAMPLES
            medians = old["median_ms"], row["median_ms"]
            ranges = (old_low, old_high), (low, high)
            found.append(Move(*place, "ms", *medians, apart and enough, *ranges))
        if old["peak_bytes"] and row["peak_bytes"]:
            share = abs(row["peak_bytes"] / old["peak_bytes"] - 1)
            sizes = old["peak_bytes"], row["peak_bytes"]
            found.append(Move(*place, "bytes", *sizes, share > MEMORY_SHARE))
    return found


def table(found: list[Move], file: Path | None) -> Whole:
    """What moved; one line that says so where nothing did."""
    shown = Table(title=f"what moved beyond noise, against {file}")
    for column in ("contender", "mode", "figure"):
        shown.add_column(column)
    for column in ("before", "now", "now / before"):
        shown.add_column(column, justify="right")
    for m in found:
        if m.moved:
            style = "green" if m.now < m.before else "red"
            share = f"[{style}]{m.now / m.before:.2f}[/]"
            before, now = _figure(m.before, m.quartiles_before), _figure(m.now, m.quartiles_now)
            shown.add_row(m.contender, m.mode, m.figure, before, now, share)
    if not any(m.moved for m in found):
        shown.add_row("none", f"of {len(found)} figures", "", "", "", "")
    return Whole(shown)


def _figure(value: float, quartiles: tuple[float, float] | None) -> str:
    if quartiles is None:
        return human(value, "B")
    low, high = quartiles
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
