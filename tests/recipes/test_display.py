"""What is shown: no cell of a table is cut, and what takes long says so."""

import dataclasses
import io
import math
import re

import pytest
from rich.console import Console
from rich.table import Table

from atlas_blocks.recipes import ablation, capacity, demo, display, text, training
from atlas_blocks.recipes.bench import against, gate, measure, model, report
from atlas_blocks.recipes.bench.contenders import Shape
from atlas_blocks.recipes.model import LanguageModel


def shown(renderable, width):
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    return file.getvalue()


def ablated():
    config = ablation.AblationConfig(seeds=3)
    cells = {
        ablation._key(switch, seed): {"score": 2.3456 + seed / 10, "seconds": 1234.5}
        for switch in config.switches
        for seed in range(3)
    }
    return ablation.table(config, cells | {"ns-every-8/2": {"diverged": "x"}})


def measured():
    recalled = {rule: [12345.6] for rule in capacity.RULES}
    figures = (153, 12345, 12346, 12347, 1e-16, 0.12, [1.0], 12348, recalled)
    return capacity.tables(capacity.CapacityConfig(), [capacity.Row("gated_mlp, 2", *figures)])


def compared():
    model = LanguageModel(display.registry.config("atlas-mag-tiny"))
    learnt = {"atlas-mag-tiny": demo.Learnt(model, [1.0], 1234.5, 3.456)}
    corpus = text.Corpus(text._tensor(b"x" * 999), text._tensor(b"x" * 99_999), "x")
    settings = training.TrainingConfig(steps=100_000, batch=64, length=1024)
    return demo._comparison(learnt, settings, corpus)


def timed():
    quartiles = (1234567.0, 2345678.0)
    row = model.Row(
        contender="inductor",
        mode="training step",
        errors={"y": 1.2e-7},
        samples=20,
        median_ms=12345.67,
        quartiles_ms=(12345.1, 12346.2),
        tokens_per_s=1234569.0,
        tokens_per_s_quartiles=quartiles,
        ratio=(10.23, 11.24, 12.25),
        peak_bytes=123456789,
    )
    return report.model_table([row], "x", "speed")


def kernels():
    row = measure.Row(
        "main",
        Shape(4, 8192, 16, 128),
        "flash-linear-attention",
        "gated delta, chunked",
        "forward",
        samples=30,
        median_ms=1234.567,
        quartiles_ms=(1234.123, 1235.234),
        tokens_per_s=12345678.0,
        tflops=123.4,
        share_of_product=0.123,
        peak_bytes=12345678901,
    )
    return report.table([row, dataclasses.replace(row, direction=measure.BOTH)], "x")


def gated():
    errors = {"weights[1]": 1.5e-3}
    verdict = gate.Verdict("definition, compiled", "omega, mlp, muon", errors=errors)
    return report.gate_table([dataclasses.replace(verdict, definition={"weights[1]": 1e-3})])


def moved():
    ranges = (12345.1, 12346.2), (22345.1, 22346.2)
    moves = [
        against.Move("inductor", "forward+backward", "bytes", 123456789.0, 223456789.0, True),
        against.Move("inductor", "training step", "ms", 12345.67, 22345.6, True, *ranges),
    ]
    return against.table(moves, None)


FIGURES = {
    ablated: ["2.396 ± 0.071, 1 diverged", "19.97 / 52.77", "1234", "no-polynomial"],
    measured: ["12345", "12346", "12347", "1e-16", "0.12", "12348", "12345.6"],
    compared: ["193,598", "3.456", "20:34", "5,308,708", "31,744 held-out bytes"],
    timed: ["12345.67", "1,234,569", "1,234,567", "2,345,678", "11.24", "12.25", "123 MB"],
    kernels: ["1234.567", "1235.234", "12,345,678", "12.3%", "12.3 GB", "flash-linear-attention"],
    gated: ["1.50", "weights[1]", "omega, mlp, muon"],
    moved: ["12345.67", "22346.20", "1.81", "123 MB", "forward+backward"],
    display.recipe_table: ["gated-deltanet-1.3b", "1.30B", "39.1 MB", "1.21 GB*", "α fixed"],
}


@pytest.mark.parametrize("width", [160, 80, 40])
@pytest.mark.parametrize("table", FIGURES)
def test_no_number_is_cut(table, width):
    out = shown(table(), width)
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    # A cell of several words may take several lines of its column, a word may not.
    for figure in FIGURES[table]:
        for word in figure.split():
            assert re.search(rf"(?<![\w.,]){re.escape(word)}(?![\w]|[.,]\d)", out), word


def test_no_number_of_a_run_is_cut():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    view = display.TrainingView(console, {"deep-transformer-tiny": 100_000})
    step = training.Progress(99_059, 100_000, 2.345, 1e-3, 1.0, 123_456.0, 54_321.0)
    view.callback("deep-transformer-tiny")(step)
    out = shown(view._render(), 80)
    assert "…" not in out
    for figure in ("deep-transformer-tiny", "99059/100000", "3.383", "123,456", "905:21"):
        assert figure in out


def test_a_table_too_wide_becomes_paragraphs():
    table = Table("name", "first", "second", title="figures", caption="a note")
    table.add_row("[b]row[/]", "12345678", "87654321")
    assert "row   12345678  87654321" in shown(display.Whole(table), 30)
    narrow = " ".join(shown(display.Whole(table), 16).split())
    assert narrow == "figures row first 12345678 · second 87654321 a note"


def test_what_takes_long_says_so_where_nobody_watches():
    file = io.StringIO()
    console = Console(file=file, width=80)
    with display.working(console, "compiling: minutes") as say:
        assert file.getvalue() == "compiling: minutes\n"
        say("measuring")
    assert file.getvalue() == "compiling: minutes\nmeasuring\n"


def test_a_benchmark_says_what_comes_next_but_not_every_round():
    file = io.StringIO()
    with report.steps(Console(file=file, width=80), 5) as on_step:
        for words in ("forward: atlas is checked", *(f"round {n} of 3" for n in (1, 2, 3))):
            on_step(words)
    assert file.getvalue().splitlines() == ["forward: atlas is checked", "round 1 of 3"]


@pytest.mark.parametrize("count", [1, 47, 96, 97, 5_000])
def test_a_curve_stays_short_and_keeps_its_means(count):
    curve, values = display.Curve(width=8), [float(i * i % 97) for i in range(count)]
    for value in values:
        curve.append(value)
    assert len(curve.means) < 16
    whole = [*(m for m in curve.means for _ in range(curve.stretch)), *curve.rest]
    assert len(whole) == count
    assert sum(whole) == pytest.approx(sum(values))


def test_a_run_is_drawn_while_it_goes_on():
    """Into a terminal; steps that are skipped are lines above."""
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True, color_system=None)
    with display.TrainingView(console, {"some-model": 2}) as view:
        told = view.callback("some-model")
        told(training.Progress(1, 2, 0.693147, 1e-3, 1.0, 10.0, 1.0))
        told(training.Progress(2, 2, math.nan, 1e-3, 1.0, 10.0, 0.0, "step 2: loss nan"))
    shown = file.getvalue()
    assert "1.00 → 1.00" in shown
    assert "step 2: loss nan; the step is skipped" in shown
