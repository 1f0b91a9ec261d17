"""What a benchmark shows and keeps: its table, its plot, and what it ran on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from atlas_blocks.recipes.bench.gate import Verdict
from atlas_blocks.recipes.bench.measure import BOTH, FORWARD, Row
from atlas_blocks.recipes.demo import hardware
from atlas_blocks.recipes.describe import human
from atlas_blocks.recipes.display import Whole

if TYPE_CHECKING:
    from atlas_blocks.recipes.bench.model import Row as ModelRow

PACKAGES = (
    "atlas-blocks",
    "torch",
    "triton",
    "flash-linear-attention",
    "fla-core",
    "titans-pytorch",
)


def versions() -> dict[str, str | None]:
    """Of Python and of every package that takes part; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with its build, such as +cpu
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, and the GPU with its driver where it is timed."""
    if device.type != "cuda":
        return {"device": "cpu", **hardware()}
    gpu = torch.cuda.get_device_properties(device)
    return {
        "device": "cuda",
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **hardware(),
    }


def commit() -> str | None:
    """The commit of the checkout this runs from, "+" where files differ from it; None outside."""
    folder = Path(__file__).parent
    git = ("git", "-C", str(folder))
    # Asked of this very file: an environment may lie inside another project's checkout.
    if _output(*git, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return f"{_output(*git, 'rev-parse', 'HEAD')}{'+' if changed else ''}"


def _output(*command: str) -> str | None:
    """First line of a command's output; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else None


def stamp(device: torch.device) -> dict[str, Any]:
    """What every record begins with: when, which code, on what."""
    return {
        "complete": False,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
    }


@contextlib.contextmanager
def steps(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Tell what comes next: yields a function of it, to be called `total` times.

    A bar that is gone when it is done; where nobody watches, lines, one for all rounds.
    """
    if not console.is_terminal:

        def line(words: str) -> None:
            if "round " not in words or "round 1 of" in words:
                console.print(words)

        yield line
        return
    bar = Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda words: bar.update(task, advance=1, description=words)


def gate_table(verdicts: Sequence[Verdict]) -> Whole:
    """Errors as multiples of the definition's, the worst of each implementation."""
    table = Table(title="error against float64 / the definition's (at most 2)")
    table.add_column("provider", style="cyan")
    table.add_column("rule")
    table.add_column("worst", justify="right")
    table.add_column("of")
    for v in verdicts:
        if not v.errors:
            style = "red" if v.failure else "dim"
            table.add_row(v.name, v.rule, "-", Text(v.refusal or v.failure, style=style))
            continue
        ratios = {n: e / v.definition[n] for n, e in v.errors.items()}
        worst = max(ratios, key=lambda n: float("inf") if ratios[n] != ratios[n] else ratios[n])
        style = "red" if v.problem else "green"
        table.add_row(v.name, v.rule, f"[{style}]{ratios[worst]:.2f}[/]", escape(worst))
    return Whole(table)


def table(rows: Sequence[Row], title: str) -> Group:
    """One shape: both directions, then why there are rows without figures."""
    found = Table(title=title)
    found.add_column("contender", style="cyan")
    found.add_column("what")
    for column in ("ms", "quartiles", "tokens/s", "TFLOP/s", "of product", "memory"):
        found.add_column(column, justify="right", no_wrap=column in ("ms", "tokens/s", "TFLOP/s"))
    problems = dict.fromkeys((r.contender, r.what, r.problem) for r in rows if r.problem)
    for direction in (FORWARD, BOTH):
        found.add_section()
        found.add_row(f"[bold]{direction}[/]")
        for r in rows:
            if r.direction == direction:
                found.add_row(r.contender, r.what, *_cells(r))
    lines = [f"{name} ({what}): {problem}" for name, what, problem in problems]
    return Group(Whole(found), Text("\n".join(lines), style="yellow"))


def _cells(r: Row) -> list[str]:
    if r.median_ms is None or r.quartiles_ms is None:
        return ["[yellow]see below[/]"]
    low, high = r.quartiles_ms
    return [
        f"[bold]{r.median_ms:.3f}[/]",
        f"{low:.3f} to {high:.3f}",
        "-" if r.tokens_per_s is None else f"{r.tokens_per_s:,.0f}",
        "-" if r.tflops is None else f"{r.tflops:.3g}",
        "-" if r.share_of_product is None else f"{r.share_of_product:.1%}",
        "-" if r.peak_bytes is None else human(r.peak_bytes, "B"),
    ]


def plot(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Draw tokens/s at the main shapes and over T; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    timed = [r for r in rows if r.tokens_per_s is not None]
    # One colour a contender, the same in every panel.
    names = dict.fromkeys(r.contender for r in timed)
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    parts = dict.fromkeys((r.part, r.shape.dim) for r in timed)
    height = 1.6 + 0.28 * len({(r.contender, r.what) for r in timed})
    figure = Figure(figsize=(1 + 6 * len(parts), 2 * height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [(direction, *part) for direction in (FORWARD, BOTH) for part in parts]
    for index, panel in enumerate(panels):
        direction, part, dim = panel
        axes = figure.add_subplot(2, len(parts), index + 1)
        here = [r for r in timed if (r.direction, r.part, r.shape.dim) == panel]
        (_bars if part == "main" else _lines)(axes, here, colours)
        where = "over T, B x T constant" if part == "sweep" else "main shape"
        axes.set_title(f"{direction}, D {dim}, {where}", fontsize=9)
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.2)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    return True


def _bars(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    for r in sorted(rows, key=lambda r: r.tokens_per_s or 0):
        label = f"{r.contender}: {r.what}"
        axes.barh(label, r.tokens_per_s, color=colours[r.contender])
        axes.annotate(f" {r.tokens_per_s:,.0f}", (r.tokens_per_s, label), va="center", fontsize=6)
    axes.set(xscale="log")
    axes.set_xlabel("tokens/s", fontsize=8)
    axes.margins(x=0.2)


def _lines(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    drawn = dict.fromkeys(r.contender for r in rows)
    for name in drawn:
        kinds = dict.fromkeys(r.what for r in rows if r.contender == name)
        for what, style in zip(kinds, itertools.cycle(("-", "--", ":", "-.")), strict=False):
            points = sorted(
                (r.shape.tokens, r.tokens_per_s)
                for r in rows
                if (r.contender, r.what) == (name, what) and r.tokens_per_s is not None
            )
            axes.plot(*zip(*points, strict=True), "o" + style, ms=4, color=colours[name],
                      label=f"{name}: {what}")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("T", fontsize=8)
    axes.set_ylabel("tokens/s", fontsize=8)
    if rows:
        axes.legend(frameon=False, fontsize=6)


# --- bench NAME -----------------------------------------------------------------------------------


def model_table(rows: Sequence[ModelRow], title: str, ratio: str) -> Group:
    """Every mode, spread from quartile to quartile, then why there are rows without figures.

    ratio: what row.ratio is, in words.
    """
    found = Table(title=title)
    found.add_column("contender", style="cyan", no_wrap=True)
    for column in ("ms", "tokens/s", "spread", ratio, "spread", "memory", "error"):
        found.add_column(column, justify="right", no_wrap=column in ("ms", "tokens/s", "error"))
    for mode, group in itertools.groupby(rows, lambda r: r.mode):
        found.add_section()
        found.add_row(f"[bold]{mode}[/]")
        for r in group:
            found.add_row(r.contender, *_model_cells(r))
    problems = dict.fromkeys(f"{r.contender}, {r.mode}: {r.problem}" for r in rows if r.problem)
    return Group(Whole(found), Text("\n".join(problems), style="yellow"))


def _model_cells(r: ModelRow) -> list[str]:
    if r.median_ms is None or r.tokens_per_s_quartiles is None:
        return ["[yellow]see below[/]"]
    low, high = r.tokens_per_s_quartiles
    slow, middle, fast = r.ratio or (1.0, 1.0, 1.0)
    colour = "green" if slow > 1 else "red" if fast < 1 else "default"
    return [
        f"{r.median_ms:.2f}",
        f"[bold]{r.tokens_per_s:,.0f}[/]",
        f"{low:,.0f} to {high:,.0f}",
        f"[{colour}]{middle:.2f}[/]",
        f"{slow:.2f} to {fast:.2f}",
        "-" if r.peak_bytes is None else human(r.peak_bytes, "B"),
        f"{max(r.errors.values()):.1e}" if r.errors else "-",
    ]


def compile_table(found: Sequence[dict[str, Any]]) -> Group:
    """What compiling costs in a fresh process, with an empty cache and with a filled one."""
    lines = []
    for one in found:
        where = f"{one['contender']}, {one['mode']}, compiled in a fresh process: "
        if one["problem"]:
            lines.append(f"[yellow]{where}{escape(one['problem'])}[/]")
            continue
        cold, warm = one["cold_seconds"], one["warm_seconds"]
        lines.append(f"{where}cold [bold]{cold:.1f} s[/], from the cache [bold]{warm:.1f} s[/]")
    return Group(*lines)


def model_plot(path: Path, rows: Sequence[ModelRow], title: str) -> bool:
    """Draw tokens/s of every mode with the quartiles; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    modes = list(dict.fromkeys(r.mode for r in rows))
    names = list(dict.fromkeys(r.contender for r in rows))
    size = (2 + 2.6 * len(modes), 1.2 + 0.3 * len(names))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for index, mode in enumerate(modes):
        axes = figure.add_subplot(1, len(modes), index + 1)
        for r in rows:
            if r.mode == mode and r.tokens_per_s and r.tokens_per_s_quartiles:
                place, (low, high) = names.index(r.contender), r.tokens_per_s_quartiles
                spread = [[r.tokens_per_s - low], [high - r.tokens_per_s]]
                axes.barh(place, r.tokens_per_s, xerr=spread, color=f"C{place}", capsize=3)
        axes.set_yticks(range(len(names)), names if index == 0 else [])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(mode, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.2, axis="x")
        axes.set_xlabel("tokens/s", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    return True
