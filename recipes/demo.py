"""The demonstration: a tiny hybrid and a Transformer of equal size learn the same real text."""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from atlas_blocks.recipes import (
    checkpoint,
    describe,
    display,
    files,
    losses,
    registry,
    text,
    training,
)
from atlas_blocks.recipes.generate import generate
from atlas_blocks.recipes.model import LanguageModel
from atlas_blocks.recipes.timing import StepTiming, time_step

HYBRID, BASELINE = "atlas-mag-tiny", "transformer-tiny"
PROMPT = "def "
COLOURS = {HYBRID: "tab:blue", BASELINE: "tab:orange"}


@dataclasses.dataclass(frozen=True)
class Learnt:
    """One trained model and its figures."""

    model: LanguageModel
    losses: list[float]
    seconds: float
    bits_per_byte: float
    compiled: bool = False


def run(
    console: Console, *, out: Path, steps: int, seed: int, compiled: bool
) -> dict[str, Learnt] | None:
    """Time a step of both, train both, compare, sample; write the results into the folder `out`.

    compiled: they train compiled, unless that fails. Returns None where Ctrl-C ended it: the hybrid
    as far as it was trained is saved.
    """
    training.check_one_process()
    began = time.perf_counter()
    settings = training.TrainingConfig(steps=steps, batch=4, length=128, lr=4e-3, seed=seed)
    corpus = text.standard_library()
    files.check_folder("out", out)
    weights = out / f"{HYBRID}.safetensors"
    _introduce(console, settings, corpus)

    learnt: dict[str, Learnt] = {}
    timings = _timed(console, settings, corpus) if compiled else {}
    for name, timing in timings.items():
        console.print(_timing_line(name, timing))
    saved = False
    try:
        with display.TrainingView(console, dict.fromkeys((HYBRID, BASELINE), steps)) as view:
            for name in (HYBRID, BASELINE):
                torch.manual_seed(seed)
                model = registry.build(name)
                fast = name in timings and not timings[name].problem
                own = dataclasses.replace(settings, compile=fast)
                result = training.train(model, corpus.train, own, on_step=view.callback(name))
                model = copy.deepcopy(model)  # what is compiled is compiled for training
                if name == HYBRID:
                    checkpoint.save(weights, model)
                    saved = True
                if result.interrupted:
                    raise KeyboardInterrupt
                view.note(name, "reading held-out text")
                bits = losses.bits_per_byte(model, corpus.held_out, length=settings.length)
                view.note(name, f"held out {bits:.3f}")
                learnt[name] = Learnt(model, result.losses, result.seconds, bits, fast)
        console.print(_comparison(learnt, settings, corpus))
        sample = sample_text(learnt[HYBRID].model, seed).rstrip()
        sample = Syntax(sample, "python", word_wrap=True)
        console.print(Panel(sample, title=f"{HYBRID} writes"))
    except KeyboardInterrupt:
        if not saved:
            raise
        console.print(f"interrupted; the hybrid so far is saved: [bold]{weights}[/]")
        return None

    figures = _figures(learnt, settings, corpus, timings)
    figures["seconds_in_all"] = time.perf_counter() - began
    files.write_json(out / "figures.json", figures)
    written = [weights.name, "figures.json", *_plot(console, out / "loss.png", learnt, settings)]
    console.print(
        f"[bold]{out}[/]: {', '.join(written)}   "
        f"({display.duration(figures['seconds_in_all'])} in all)\n"
        f"[dim]try: atlas-blocks generate {weights} --prompt 'class '[/]"
    )
    return learnt


def sample_text(model: LanguageModel, seed: int, count: int = 320) -> str:
    """A continuation of "def " at temperature 0.8."""
    prompt = torch.tensor([list(PROMPT.encode())])
    tokens = generate(model, prompt, max_new_tokens=count, temperature=0.8, top_p=0.95, seed=seed)
    return text.printable(tokens[0].tolist())


def _introduce(console: Console, settings: training.TrainingConfig, corpus: text.Corpus) -> None:
    lines = [
        f"[bold cyan]{name}[/]  {describe.pattern(registry.config(name))}, "
        f"{registry.parameter_count(registry.config(name)):,} parameters"
        for name in (HYBRID, BASELINE)
    ]
    tokens = settings.steps * settings.batch * settings.length
    lines.append(
        f"text: {corpus.source}, {len(corpus.train) / 1e6:.1f} MB, "
        f"{len(corpus.held_out) / 1e6:.1f} MB held out by file"
    )
    lines.append(
        f"each: {settings.steps} steps of {settings.batch} x {settings.length} bytes "
        f"({tokens:,} in all); {hardware()['processor']}, threads: {torch.get_num_threads()}"
    )
    console.print(Panel("\n".join(lines), title="atlas-blocks", border_style="cyan"))


def _comparison(
    learnt: dict[str, Learnt], settings: training.TrainingConfig, corpus: text.Corpus
) -> display.Whole:
    read = settings.length * text.window_count(corpus.held_out, settings.length, losses.HELD_OUT)
    title = f"{read:,} held-out bytes, same parameters and token budget"
    table = Table(title=title)
    for column in ("model", "parameters", "bits per byte", "training", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    best = min(one.bits_per_byte for one in learnt.values())
    for name, one in learnt.items():
        style = "bold green" if one.bits_per_byte == best else ""
        tokens = settings.steps * settings.batch * settings.length
        table.add_row(
            f"[cyan]{name}[/]",
            f"{one.model.parameter_count():,}",
            f"[{style}]{one.bits_per_byte:.3f}[/]" if style else f"{one.bits_per_byte:.3f}",
            display.duration(one.seconds),
            f"{tokens / one.seconds:,.0f}{'' if one.compiled else ' (eager)'}",
        )
    return display.Whole(table)


def _timed(
    console: Console, settings: training.TrainingConfig, corpus: text.Corpus
) -> dict[str, StepTiming]:
    """A training step of both; what is compiled for it, training finds compiled."""
    found = {}
    rows = text.random_batch(corpus.train, settings.batch, settings.length, settings.seed, 0)
    for name in (HYBRID, BASELINE):
        torch.manual_seed(settings.seed)
        # Most of the wait is the C++ compiler, the first time: later runs find its cache.
        words = f"{name}: compiling, up to two minutes the first time, then timing a step"
        with display.working(console, words):
            found[name] = time_step(registry.build(name), rows, settings, repeats=7)
    return found


def _timing_line(name: str, timing: StepTiming) -> str:
    line = f"one training step of {name}: eager [bold]{timing.eager_ms:.0f} ms[/]"
    if timing.compiled_ms is None or timing.ratio is None:
        return line + f"; compiling failed: {timing.problem}"
    low, middle, high = timing.ratio
    return (
        f"{line}, compiled [bold]{timing.compiled_ms:.0f} ms[/] (eager/compiled {middle:.2f}, "
        f"{low:.2f} to {high:.2f} over pairs; compiling took {timing.compile_seconds:.1f} s)"
    )


def hardware() -> dict[str, object]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        processor = models[0].partition(":")[2].strip() if models else processor
    return {
        "processor": processor,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _figures(
    learnt: dict[str, Learnt],
    settings: training.TrainingConfig,
    corpus: text.Corpus,
    timings: dict[str, StepTiming],
) -> dict[str, Any]:
    return {
        "versions": {
            "atlas-blocks": checkpoint.version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "hardware": hardware(),
        "training": settings.to_dict(),
        "text": {
            "source": corpus.source,
            "train_bytes": len(corpus.train),
            "held_out_bytes": len(corpus.held_out),
        },
        "models": {
            name: {
                "config": one.model.config.to_dict(),
                "parameters": one.model.parameter_count(),
                "held_out_bits_per_byte": one.bits_per_byte,
                "training_seconds": one.seconds,
                "compiled": one.compiled,
                "losses": [round(loss, 4) for loss in one.losses],
            }
            for name, one in learnt.items()
        },
        "training_step": {name: dataclasses.asdict(one) for name, one in timings.items()},
    }


def _plot(
    console: Console, path: Path, learnt: dict[str, Learnt], settings: training.TrainingConfig
) -> list[str]:
    """Draw the loss curves; returns the file's name, or nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no loss.png: matplotlib is missing (pip install 'atlas-blocks[plot]')")
        return []
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    parameters = describe.human(learnt[HYBRID].model.parameter_count())
    for name, one in learnt.items():
        losses = torch.tensor(one.losses) / torch.log(torch.tensor(2.0))
        tokens = torch.arange(1, len(losses) + 1) * settings.batch * settings.length / 1e3
        width = max(1, len(losses) // 20)
        axes.plot(tokens, losses, color=COLOURS[name], alpha=0.2, linewidth=0.8)
        if len(losses) >= width:
            means = losses.unfold(0, width, 1).mean(-1)
            axes.plot(tokens[width - 1 :], means, color=COLOURS[name], label=name)
        axes.axhline(one.bits_per_byte, color=COLOURS[name], linestyle=":", linewidth=1)
    axes.set(
        xlabel="thousand bytes trained on",
        ylabel="bits per byte (dotted: held out)",
        title=f"Same text, {parameters} parameters each",
    )
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path)
    return [path.name]
