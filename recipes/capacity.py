"""The capacity laboratory: how many pairs a memory stores, and by which means.

Closed form: least squares on the features, for a matrix memory. Descent: full-batch gradient
descent (L-BFGS) on all pairs. One pass: a rule sees each pair once, in order.

Proposition 1 of the paper: a matrix memory stores Dk pairs; Proposition 2: with polynomial features
of degree p, C(Dk + p, p). Both count keys in general position. Keys of unit length, as the layer
makes them, are not: |k|^2 = 1 ties the monomials to one another, and fewer pairs fit.

N pairs, D width of keys and values, H write strengths tried side by side, S seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor

from atlas_blocks import Config, check
from atlas_blocks.functional import PolynomialMap, omega_rule, read_memory, taylor_coefficients
from atlas_blocks.omega.feature_maps import FeatureMap, polynomial_width
from atlas_blocks.omega.memories import weight_shapes
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState
from atlas_blocks.recipes import display, files
from atlas_blocks.recipes.bench.report import commit, machine, versions

EXACT = 1e-8  # largest |M(k) - v| / |v| of pairs that are stored exactly, in float64
LEARNT = 1e-3  # and of pairs that descent has learnt
RECALLED = 0.9  # share of pairs whose value is the nearest of all values, for one pass
BURST = 50  # iterations of the descent between looks at its error
STRENGTHS = (0.1, 0.3, 1.0)  # eta of one pass; the best is taken


@dataclasses.dataclass(frozen=True)
class CapacityConfig(Config):
    """What is measured. degrees: of the polynomial features of a matrix memory; deep memories get
    none and degree 2. expansion: hidden units of deep memories over dim. seeds: draws of the pairs
    for the closed form and the descent. iterations: of the descent. passes, longest: draws, and
    pairs in each, of one pass. unit_keys: |k| = 1 instead of normally distributed keys."""

    dim: int = 4
    degrees: tuple[int, ...] = (1, 2, 3)
    expansion: int = 4
    seeds: int = 3
    iterations: int = 800
    passes: int = 32
    longest: int = 64
    unit_keys: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "expansion", "seeds", "iterations", "passes", "longest"):
            check.at_least(name, getattr(self, name), 1)
        if not isinstance(self.degrees, tuple):
            check.fail("degrees", "a tuple of integers", repr(self.degrees))
        for degree in self.degrees:
            check.at_least("degrees", degree, 1)
        check.boolean("unit_keys", self.unit_keys)


@dataclasses.dataclass(frozen=True)
class Store:
    """A memory with its features. degree 0: the key itself."""

    memory: str
    degree: int
    dim: int
    expansion: int

    @property
    def name(self) -> str:
        return f"{self.memory}, " + (f"degree {self.degree}" if self.degree else "identity")

    def feature_map(self) -> FeatureMap | None:
        if not self.degree:
            return None
        return PolynomialMap(taylor_coefficients(self.degree).double())

    @property
    def width(self) -> int:
        return polynomial_width(self.dim, self.degree) if self.degree else self.dim

    def shapes(self) -> list[tuple[int, int]]:
        return weight_shapes(self.memory, self.width, self.dim, self.expansion * self.dim)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes())

    def proposed(self, unit_keys: bool) -> int | None:
        """Pairs of Propositions 1 and 2, less what |k| = 1 takes; None for a deep memory.

        On the sphere every monomial of degree p - 2 times |k|^2 equals one of lower degree.
        """
        if self.memory != "matrix":
            return None
        lost = unit_keys and self.degree >= 2
        return self.width - (polynomial_width(self.dim, self.degree - 2) if lost else 0)

    def start(self, heads: int) -> list[Tensor]:
        """M_0 [H, dout, din], the same for every head: zero for a matrix, else random."""
        generator = torch.Generator().manual_seed(0)
        weights = []
        for shape in self.shapes():
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            scale = 0.0 if self.memory == "matrix" else shape[-1] ** -0.5
            weights.append((scale * weight).expand(heads, *shape).contiguous())
        return weights


def stores(config: CapacityConfig) -> list[Store]:
    """Every memory with the feature maps that are measured with it."""
    matrix = [("matrix", degree) for degree in (0, *config.degrees)]
    deep = [(memory, degree) for memory in ("mlp", "gated_mlp") for degree in (0, 2)]
    return [Store(m, degree, config.dim, config.expansion) for m, degree in (*matrix, *deep)]


def pairs(config: CapacityConfig, count: int, seeds: int) -> tuple[Tensor, Tensor]:
    """keys, values [S, N, D]: normally distributed, the same first pairs for every count."""
    generator = torch.Generator().manual_seed(0)
    size = (2, seeds, config.dim)
    # Drawn pair by pair, so that a larger count only adds to them.
    drawn = torch.stack(
        [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]
    )
    keys, values = drawn.permute(1, 2, 0, 3).unbind(0)
    if config.unit_keys:
        keys = keys / keys.norm(dim=-1, keepdim=True)
    return keys, values


def worst(read: Tensor, values: Tensor) -> float:
    """The largest |M(k) - v| / |v| of the pairs."""
    return ((read - values).norm(dim=-1) / values.norm(dim=-1)).max().item()


# --- the three means --------------------------------------------------------------------------


def closed_form(store: Store, keys: Tensor, values: Tensor) -> float:
    """The error of the least-squares matrix memory on pairs [N, D]."""
    phi = store.feature_map()
    features = keys if phi is None else phi(keys)
    # By singular values: just past capacity the features are all but dependent.
    solution = torch.linalg.lstsq(features, values, driver="gelsd").solution
    return worst(features @ solution, values)


def descent(store: Store, keys: Tensor, values: Tensor, iterations: int) -> float:
    """The error of any memory after full-batch gradient descent on pairs [N, D]; it ends early
    where the error is LEARNT."""
    weights = [w.requires_grad_() for w in store.start(1)]
    phi = store.feature_map()
    optimizer = torch.optim.LBFGS(
        weights,
        max_iter=BURST,
        max_eval=2 * BURST,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def read() -> Tensor:
        memory = [w.unsqueeze(0) for w in weights]
        y = read_memory(keys[None, :, None], memory, memory=store.memory, feature_map=phi)
        return y[0, :, 0]

    def closure() -> float:
        optimizer.zero_grad()
        loss = 0.5 * (read() - values).square().sum()
        loss.backward()
        return loss.item()

    error = math.inf
    for _ in range(0, iterations, BURST):
        with torch.enable_grad():
            optimizer.step(closure)
        with torch.no_grad():
            error = worst(read(), values)
        if error <= LEARNT:
            break
    return error


RULES: dict[str, dict[str, Any]] = {
    "Hebbian (dot)": {"objective": "dot", "window": 1, "update": "gd", "momentum": False},
    "delta rule": {"objective": "l2", "window": 1, "update": "gd", "momentum": False},
    "Omega, c=8": {"objective": "l2", "window": 8, "update": "gd", "momentum": False},
    "Atlas, c=8": {"objective": "l2", "window": 8, "update": "muon", "momentum": True},
}


@torch.no_grad()
def one_pass(store: Store, keys: Tensor, values: Tensor, rule: str) -> list[float]:
    """Pairs recalled after 1, 2, ..., N of them were shown once; keys, values [S, N, D].

    Token by token (b = 1). With gradient descent on the error, a step is no longer than the one
    that stores the window (online errors). A pair is recalled where the nearest of all values
    shown is its own: guessing recalls one. The mean over draws, for the best write strength.
    """
    settings = RULES[rule]
    seeds, count, _ = keys.shape
    heads = len(STRENGTHS)
    errors = "online" if settings["update"] == "gd" else "chunk"
    gates = torch.ones(seeds, 1, heads, dtype=torch.float64)
    state: OmegaState | None = None
    recalled = []

    def per_head(x: Tensor) -> Tensor:
        """[S, n, D] -> [S, n, H, D]."""
        return x.unsqueeze(2).expand(-1, -1, heads, -1)

    for n in range(1, count + 1):
        k, v = per_head(keys[:, n - 1 : n]), per_head(values[:, n - 1 : n])
        _, state = omega_rule(
            k,
            k,
            v,
            alpha=gates,
            eta=gates * torch.tensor(STRENGTHS, dtype=torch.float64),
            theta=0.5 * gates if settings["momentum"] else None,
            gamma=gates.unsqueeze(-1).expand(-1, -1, -1, settings["window"]),
            weights=store.start(heads),
            rule=Rule(
                memory=store.memory,
                objective=settings["objective"],
                update=settings["update"],
                chunk_size=1,
                errors=errors,
                window=settings["window"],
            ),
            feature_map=store.feature_map(),
            state=state,
        )
        read = read_memory(
            per_head(keys[:, :n]),
            state.weights,
            memory=store.memory,
            feature_map=store.feature_map(),
        )
        nearest = torch.cdist(read.transpose(1, 2), values[:, None, :n]).argmin(-1)
        recalled.append((nearest == torch.arange(n)).double().sum(2).mean(0))
    by_strength = torch.stack(recalled)  # [N, H]
    return by_strength[:, by_strength.sum(0).argmax()].tolist()


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest n for which `fits` holds, if it holds up to there and not beyond; 0 for none."""
    low, high = 0, max(1, guess)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# --- the whole --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One memory with one feature map.

    proposed: by Propositions 1 and 2. stored: pairs stored exactly by the closed form in every
    seed; at_capacity: the largest error there, one_more: the smallest error with one pair more.
    curve: the largest error of 1, 2, ... pairs. learnt: pairs that descent learns in every seed.
    recalled: by rule, the pairs recalled after one pass over 1, 2, ... of them.
    """

    name: str
    features: int
    parameters: int
    proposed: int | None
    stored: int | None
    at_capacity: float | None
    one_more: float | None
    curve: list[float]
    learnt: int
    recalled: dict[str, list[float]]


def measure(config: CapacityConfig, store: Store) -> Row:
    """All three means on one memory."""

    def errors(count: int, error: Callable[..., float], *rest: Any) -> Iterator[float]:
        """One after the other: a descent that fails in one draw need not run in the next."""
        keys, values = pairs(config, count, config.seeds)
        return (error(store, keys[s], values[s], *rest) for s in range(config.seeds))

    def learns(count: int) -> bool:
        return all(error <= LEARNT for error in errors(count, descent, config.iterations))

    stored = at_capacity = one_more = None
    curve: list[float] = []
    if store.memory == "matrix":
        stored = largest(lambda n: max(errors(n, closed_form)) <= EXACT, store.width)
        at_capacity = max(errors(stored, closed_form)) if stored else None
        one_more = min(errors(stored + 1, closed_form))
        curve = [max(errors(n, closed_form)) for n in range(1, stored + 6)]
    # As many equations as parameters: a fair guess for any memory.
    guess = store.parameters // store.dim
    learnt = largest(learns, guess)
    shown = pairs(config, config.longest, config.passes)
    recalled = {rule: one_pass(store, *shown, rule) for rule in RULES}
    return Row(
        name=store.name,
        features=store.width,
        parameters=store.parameters,
        proposed=store.proposed(config.unit_keys),
        stored=stored,
        at_capacity=at_capacity,
        one_more=one_more,
        curve=curve,
        learnt=learnt,
        recalled=recalled,
    )


def run(console: Console, config: CapacityConfig, out: Path) -> list[Row]:
    """Measure every store, print the table, write capacity.json and the plot into `out`."""
    files.check_folder("out", out)
    rows = []
    with display.working(console, "measuring: minutes in all") as say:
        for store in stores(config):
            say(f"measuring {store.name}")
            rows.append(measure(config, store))
    console.print(tables(config, rows))
    result = {
        "config": config.to_dict(),
        "thresholds": {"exact": EXACT, "learnt": LEARNT},
        "strengths": STRENGTHS,
        "hardware": machine(torch.device("cpu")),
        "versions": versions(),
        "commit": commit(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    files.write_json(out / "capacity.json", result)
    written = ["capacity.json", *plot(console, out / "capacity.png", config, rows)]
    console.print(f"[bold]{out}[/]: {', '.join(written)}")
    return rows


def tables(config: CapacityConfig, rows: Sequence[Row]) -> Group:
    """Pairs that each memory stores, by each means."""
    keys = "unit" if config.unit_keys else "normal"
    solved = Table(
        title=f"pairs stored: D = {config.dim}, {keys} keys, {config.seeds} draws, float64",
        caption=f"closed form: error below {EXACT:g} in every draw; the largest error there, the "
        f"smallest with one pair more. descent: error below {LEARNT:g}.",
    )
    solved.add_column("memory", style="cyan", no_wrap=True)
    for column in ("weights", "stated", "closed form", "error", "one more", "descent"):
        solved.add_column(column, justify="right", no_wrap=True)
    passed = Table(
        title=f"most pairs recalled after one pass: {config.passes} draws of {config.longest}",
        caption="mean over draws, at the best length of the pass; guessing recalls one.",
    )
    passed.add_column("memory", style="cyan", no_wrap=True)
    for rule in RULES:
        passed.add_column(rule, justify="right", no_wrap=True)
    for row in rows:
        style = "bold green" if row.stored == row.proposed else "bold red"
        solved.add_row(
            row.name,
            f"{row.parameters}",
            "-" if row.proposed is None else f"{row.proposed}",
            "-" if row.stored is None else f"[{style}]{row.stored}[/]",
            "-" if row.at_capacity is None else f"{row.at_capacity:.0e}",
            "-" if row.one_more is None else f"{row.one_more:.2f}",
            f"{row.learnt}",
        )
        passed.add_row(row.name, *(f"{max(row.recalled[rule]):.1f}" for rule in RULES))
    return Group(display.Whole(solved), display.Whole(passed))


def plot(console: Console, path: Path, config: CapacityConfig, rows: Sequence[Row]) -> list[str]:
    """Errors and recall over the number of pairs; the file's name, or none without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        console.print(f"no {path.name}: matplotlib is missing (pip install 'atlas-blocks[plot]')")
        return []
    figure = Figure(figsize=(11, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    exact, passing = figure.subplots(1, 2)
    for i, row in enumerate(row for row in rows if row.curve):
        counts = range(1, len(row.curve) + 1)
        exact.semilogy(counts, [max(e, 1e-17) for e in row.curve], label=row.name, color=f"C{i}")
        if row.proposed is not None:
            exact.axvline(row.proposed + 0.5, color=f"C{i}", linestyle=":", linewidth=1)
    exact.set(
        xlabel="pairs", ylabel="largest relative error", title="closed form (dotted: proposition)"
    )
    for i, row in enumerate(rows):
        counts = range(1, config.longest + 1)
        passing.plot(counts, row.recalled["delta rule"], label=row.name, color=f"C{i}")
    passing.set(xlabel="pairs shown once", ylabel="pairs recalled", title="one pass, delta rule")
    exact.legend(frameon=False, fontsize=7, loc="center right")
    passing.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (exact, passing):
        axes.grid(alpha=0.2)
    figure.savefig(path)
    return [path.name]
