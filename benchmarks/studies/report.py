"""What a study found: a table in Markdown, and a plot of median, lowest and highest over seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from training import Study

Cells = dict[str, list[dict[str, Any]]]
# (x, the values of the seeds)
Points = list[tuple[float, list[float]]]
# A part of a label that begins so stands on the axis.
ON_AXIS = ("dim ", "c = ", "b = ")


def groups(study: Study, record: dict[str, Any]) -> Cells:
    """The cells of every variant, in the order of the study, seed by seed."""
    found: Cells = {label: [] for label in study.variants}
    for key in sorted(record["cells"], key=lambda key: int(key.rpartition(" / ")[2])):
        label = key.rpartition(" / ")[0]
        if label in found:
            found[label].append(record["cells"][key])
    return {label: cells for label, cells in found.items() if cells}


def table(study: Study, record: dict[str, Any]) -> str:
    """One row a variant: accuracy and steps seed by seed, and the median time of a step; the
    numbers in the state where they are the axis, and loss and speed where bytes are learnt."""
    tests = [str(length) for length in study.tests]
    states = ["numbers in the state"] if study.axis == "state" else []
    nats, speed = (["loss in nats"], ["tokens a second"]) if study.fresh else ([], [])
    lengths = [f"{int(n):,} tokens" for n in tests]
    head = ["variant", *states, "accuracy", *nats, *lengths, "steps", "ms a step", *speed]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label, cells in groups(study, record).items():
        tested = [[cell["tests"][n]["accuracy"] for cell in cells] for n in tests]
        losses = [", ".join(f"{v:.3f}" for v in _of(cells, "loss"))] if nats else []
        times = [1000 * c["seconds"] / max(1, c["steps"] - 1) for c in cells if c["compiled"]]
        middle = statistics.median(times) if times else 0.0
        tokens = study.batch * study.task.length
        row = [
            label,
            *(f"{statistics.median(_of(cells, 'state')):,.0f}" for _ in states),
            _shares(_of(cells, "accuracy")),
            *losses,
            *map(_shares, tested),
            ", ".join(f"{v:,}" for v in _of(cells, "steps")),
            f"{middle:.0f}" if times else "",
            *(f"{1000 * tokens / middle:,.0f}" if times else "" for _ in speed),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _shares(values: list[float]) -> str:
    return ", ".join(f"{v:.1%}" for v in values)


def _of(cells: list[dict[str, Any]], name: str) -> list[Any]:
    return [cell[name] for cell in cells]


def lines_of(study: Study, found: Cells) -> dict[str, Points]:
    """What the plot joins: the tests of a variant, or variants that differ on the axis alone."""
    lines: dict[str, Points] = {}
    for label, cells in found.items():
        if study.axis == "tokens":
            lines[label] = [
                (n, [cell["tests"][str(n)]["accuracy"] for cell in cells]) for n in study.tests
            ]
            continue
        x = study.variants[label].x
        if study.axis in ("state", "seconds"):
            x = statistics.median(_of(cells, study.axis))
        line = ", ".join(part for part in label.split(", ") if not part.startswith(ON_AXIS))
        lines.setdefault(line, []).append((x or 0, _of(cells, "accuracy")))
    return lines


def plot(study: Study, record: dict[str, Any], file: Path) -> None:
    """Accuracy by the study's axis, or a row for every variant where it has none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = groups(study, record)
    tall = 1.2 + 0.25 * len(found)
    figure = Figure(figsize=(6.5, 4 if study.axis else tall), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if study.axis:
        for line, points in lines_of(study, found).items():
            _bars(axes, sorted(points), label=line, upright=True)
        axes.axhline(study.task.chance, linestyle=":", color="gray")
        axes.set(xlabel=study.axis, ylabel="accuracy", ylim=(-0.02, 1.02))
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7)
    else:
        _bars(axes, list(enumerate(_of(c, "accuracy") for c in found.values())), upright=False)
        axes.axvline(study.task.chance, linestyle=":", color="gray")
        axes.set_yticks(range(len(found)), list(found), fontsize=7)
        axes.set(xlabel="accuracy", xlim=(-0.02, 1.02))
        axes.invert_yaxis()
    axes.set_title(study.what, fontsize=8, wrap=True)
    axes.grid(alpha=0.2)
    figure.savefig(file)


def _bars(axes: Any, points: Any, *, upright: bool, label: str | None = None) -> None:
    places = [x for x, _ in points]
    middles = [statistics.median(values) for _, values in points]
    ends = [
        [m - min(values) for m, (_, values) in zip(middles, points, strict=True)],
        [max(values) - m for m, (_, values) in zip(middles, points, strict=True)],
    ]
    if upright:
        axes.errorbar(places, middles, ends, fmt="o-", capsize=3, label=label, alpha=0.8)
    else:
        axes.errorbar(middles, places, xerr=ends, fmt="o", capsize=3)
