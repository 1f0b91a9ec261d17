"""What the command line shows: tables, trees and a live view of training, with rich."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree
from torch import nn

from atlas_blocks import check
from atlas_blocks.blocks.stacks import BlockConfig
from atlas_blocks.recipes import describe, registry, training
from atlas_blocks.recipes.model import LanguageModelConfig

BARS = "▁▂▃▄▅▆▇█"
CONTEXT = 4096
# Between the columns of a table.
GAP = 2


class Whole:
    """A table no cell of which is cut, however narrow the console.

    Words stay whole, and cells of no_wrap columns; where even so it is too wide, every row becomes
    a paragraph.
    """

    def __init__(self, table: Table) -> None:
        table.box, table.show_edge = SIMPLE_HEAD, False
        table.padding, table.pad_edge, table.collapse_padding = (0, 1), False, True
        table.title_justify = table.caption_justify = "left"
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, least, most = self.table.columns, [], []
        for column in columns:
            cells = [column.header, *column.cells]
            sizes = [Measurement.get(console, options, cell) for cell in cells]
            most.append(max(size.maximum for size in sizes))
            words = max(size.minimum for size in sizes)
            least.append(most[-1] if column.no_wrap else words)
        room = options.max_width - GAP * (len(columns) - 1) - sum(least)
        if room < 0:
            yield from self._paragraphs()
            return
        for column, width, whole in zip(columns, least, most, strict=True):
            more = min(room, whole - width)
            column.width, room = width + more, room - more
        yield self.table

    def _paragraphs(self) -> Iterator[RenderableType]:
        columns = self.table.columns
        yield f"[italic]{self.table.title}[/]" if self.table.title else ""
        for name, *cells in zip(*(column.cells for column in columns), strict=True):
            yield name
            pairs = zip(columns[1:], cells, strict=True)
            told = [f"{column.header} {cell}" for column, cell in pairs if cell]
            if told:
                yield Padding(" · ".join(told), (0, 0, 0, 2))
        if self.table.caption:
            yield f"[dim]{self.table.caption}[/]"


def recipe_table(part: str = "") -> Group:
    """Every recipe whose name contains `part`, with its pattern, parameters and state.

    Raises ValueError where there is none.
    """
    names = [name for name in registry.names() if part in name]
    if not names:
        check.fail("part", "a part of a recipe's name", repr(part))
    table = Table(title="Recipes", row_styles=["", "dim"])
    table.add_column("name", style="bold cyan", no_wrap=True)
    table.add_column("pattern")
    for column in ("gates", "weights", "paper", "state"):
        table.add_column(column, justify="right", no_wrap=True)
    notes = []
    for name in names:
        config = registry.config(name)
        paper = registry.SIZES[name.rpartition("-")[2]].parameters
        state = describe.human(describe.state_bytes(config, CONTEXT), "B")
        table.add_row(
            name,
            escape(describe.pattern(config)),
            describe.gates(config),
            describe.human(registry.parameter_count(config)),
            describe.human(paper) if paper else "-",
            state + ("*" if describe.state_grows(config) else " "),
            end_section=name.endswith(list(registry.SIZES)[-1]),
        )
        if note := registry.size_note(name):
            notes.append(f"{name}: {note}")
    notes.append(
        "gates: those that every token sets, α decay, η step, θ momentum, γ weights of the window."
    )
    notes.append(
        "state: bytes that one sequence carries in float32; "
        f"* grows with the text, here after {CONTEXT} tokens."
    )
    return Group(Whole(table), Text("\n".join(notes), style="dim"))


def module_tree(config: LanguageModelConfig) -> Tree:
    """The assembled model with the parameters of every part; of equal blocks the first."""
    model = describe.meta_model(config)

    def label(title: str, module: nn.Module) -> str:
        count = describe.parameters_in(module)
        kind = type(module).__name__
        size = f" [green]{describe.human(count)}[/]" if count else ""
        return f"{title} [cyan]{kind}[/]{size}"

    def grow(tree: Tree, module: nn.Module) -> None:
        own = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        if not isinstance(module, (nn.Linear, nn.Embedding, nn.RMSNorm, nn.Conv1d)):
            for part, shape in own.items():
                tree.add(f"[dim]{part} {list(shape)}[/]")
        for part, child in module.named_children():
            if not isinstance(child, nn.ModuleList) or child is not model.blocks:
                grow(tree.add(label(part, child)), child)
                continue
            alike: dict[BlockConfig, list[int]] = {}
            for index, layer in enumerate(config.layers):
                alike.setdefault(layer, []).append(index)
            note = f"{len(child)} alike" if len(alike) == 1 else str(len(child))
            branch = tree.add(label(f"{part} ({note})", child))
            for places in alike.values():
                first = child[places[0]]
                where = "0" if len(alike) == 1 else ", ".join(map(str, places))
                grow(branch.add(label(where, first)), first)

    title = f"[bold]{config.name}[/]  {escape(describe.pattern(config))}  "
    root = Tree(title + label("", model).strip())
    grow(root, model)
    return root


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """Means of consecutive stretches of `values` as bars, the lowest value lowest."""
    if not values:
        return ""
    width = min(width, len(values))
    bounds = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    return "".join(
        BARS[int((m - low) / (high - low + 1e-9) * (len(BARS) - 1) + 0.5)] for m in means
    )


def duration(seconds: float) -> str:
    """75.2 -> "1:15"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextlib.contextmanager
def working(console: Console, words: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done while it is: a spinner, or where nobody watches, a line.

    Yields a function that takes the next words.
    """
    if console.is_terminal:
        with console.status(words) as status:
            yield status.update
    else:
        console.print(words)
        yield console.print


class _Field(ProgressColumn):
    """One named value of a task."""

    def __init__(self, name: str, style: str = "", *, no_wrap: bool = False) -> None:
        super().__init__(Column(no_wrap=no_wrap))
        self.name, self.style = name, style

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get(self.name, "")), style=self.style)


class Curve:
    """The means of equal stretches of a series: however long it is, at most twice `width`."""

    def __init__(self, width: int = 48) -> None:
        self.width, self.stretch = width, 1
        self.means: list[float] = []
        self.rest: list[float] = []

    def append(self, value: float) -> None:
        self.rest.append(value)
        if len(self.rest) < self.stretch:
            return
        self.means.append(sum(self.rest) / self.stretch)
        self.rest = []
        if len(self.means) == 2 * self.width:
            pairs = zip(self.means[::2], self.means[1::2], strict=True)
            self.means = [(a + b) / 2 for a, b in pairs]
            self.stretch *= 2


class TrainingView:
    """Live bars for one or more runs: loss in bits per token, tokens/s, time left, loss so far.

    with TrainingView(console, {"atlas-mag-tiny": 300}) as view:
        train(..., on_step=view.callback("atlas-mag-tiny"))
    On a console that is not a terminal it prints one line per tenth of a run, and per minute,
    instead.
    """

    def __init__(self, console: Console, runs: dict[str, int]) -> None:
        self.console = console
        self.curves = {name: Curve() for name in runs}
        # The first loss, and the last ones.
        self.ends: dict[str, tuple[float, deque[float]]] = {}
        self.printed = time.monotonic()
        self.progress = Progress(
            TextColumn("[bold cyan]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=8 if console.width < 100 else 24),
            _Field("count", no_wrap=True),
            _Field("loss", "bold yellow"),
            _Field("speed", "green"),
            _Field("left", "magenta"),
            console=console,
        )
        self.tasks = {name: self.progress.add_task(name, total=n) for name, n in runs.items()}
        # Drawn when it is refreshed, in a thread of its own, and not at every step.
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=2)

    def __enter__(self) -> TrainingView:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def callback(self, name: str) -> Callable[[training.Progress], None]:
        """The on_step callback of one run."""

        def on_step(at: training.Progress) -> None:
            if at.skipped:
                self.console.print(f"{name} {at.skipped}; the step is skipped")
                return
            bits = at.loss / math.log(2)
            self.curves[name].append(bits)
            _, recent = self.ends.setdefault(name, (bits, deque(maxlen=10)))
            recent.append(bits)
            loss = f"loss {sum(recent) / len(recent):.3f} bits"
            speed = f"{at.tokens_per_second:,.0f} tokens/s"
            left = f"{duration(at.seconds_left)} left"
            if self.console.is_terminal:
                self.progress.update(
                    self.tasks[name],
                    completed=at.step,
                    count=f"{at.step}/{at.steps}",
                    loss=loss,
                    speed=speed,
                    left=left,
                )
            elif at.step % max(1, at.steps // 10) == 0 or time.monotonic() > self.printed + 60:
                self.printed = time.monotonic()
                self.console.print(f"{name} {at.step}/{at.steps}  {loss}  {speed}  {left}")

        return on_step

    def note(self, name: str, words: str) -> None:
        """Show `words` in the last column of a run."""
        if self.console.is_terminal:
            self.progress.update(self.tasks[name], left=words)

    def _render(self) -> RenderableType:
        lines = Table.grid(padding=(0, 2))
        # Copies, of what a step may be changing.
        for name, (first, recent) in list(self.ends.items()):
            means, last = list(self.curves[name].means), list(recent)
            curve = f"[yellow]{sparkline(means)}[/]  {first:.2f} → {sum(last) / len(last):.2f}"
            lines.add_row(f"[cyan]{name}[/]", curve)
        return Panel(Group(self.progress, lines), title="training", border_style="dim")
