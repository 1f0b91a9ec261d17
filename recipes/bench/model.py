"""`atlas-blocks bench NAME`: a recipe or a block, eager and compiled, checked and then timed.

B batch, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.recipes import files
from atlas_blocks.recipes.bench import against, peers, report, subjects
from atlas_blocks.recipes.bench.cold import first_calls
from atlas_blocks.recipes.bench.contenders import Unavailable
from atlas_blocks.recipes.bench.measure import Meter, interleave, quartiles
from atlas_blocks.recipes.bench.subjects import (
    BOTH,
    CONTENDERS,
    DECODE,
    EAGER,
    FORWARD,
    MODES,
    TRAINING,
    Entrant,
    Size,
    Subject,
)

# A compiled result may err by so many times what eager float32 does, and by what float32 is good
# for where eager happens to be exact.
LIMIT, FLOOR = 4.0, 1e-5
# A tensor's error is relative to its own norm, or to so much of the largest of its kind.
NEGLIGIBLE = 1e-3
# Of one contender in one mode.
ENOUGH_SECONDS = 30.0
# Kind of result -> name -> tensor.
Results = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """What to time. modes: which of subjects.MODES. cold: also time the first call in fresh
    processes, for the training step (or the last of `modes`). cpu_time: a CPU's time is that of
    this process, not the wall clock's. beside_peers: not the block alone but layers of other
    libraries, see peers.py; forward and forward+backward only, and nothing cold."""

    name: str
    device: torch.device
    size: Size
    modes: tuple[str, ...]
    rounds: int
    cold: bool
    cpu_time: bool
    beside_peers: bool = False

    def __post_init__(self) -> None:
        check.choice("device", self.device.type, ("cpu", "cuda"))
        check.at_least("rounds", self.rounds, 1)
        for mode in self.modes:
            check.choice("modes", mode, (FORWARD, BOTH) if self.beside_peers else MODES)
        if self.beside_peers and self.name != peers.BLOCK:
            check.fail("peers", f"the name {peers.BLOCK}", repr(self.name))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return peers.DTYPES[self.device.type] if self.beside_peers else torch.float32

    @property
    def stem(self) -> str:
        """Of the names of its files."""
        return Path(self.name).name + ("_peers" if self.beside_peers else "")

    @property
    def clock_name(self) -> str:
        """Of a CPU's time."""
        return "CPU time of the process" if self.cpu_time else "wall clock"


@dataclass
class Row:
    """One contender in one mode; figures are None where there are none.

    problem: why. errors: the largest |x - true| / |true| of a kind of result, true being eager
    float64; none for another library's. quartiles: of the samples. ratio: the time of the mode's
    first contender (eager) over this one's, round by round, quartiles with the median between.
    peak_bytes: see Meter.peak.
    """

    contender: str
    mode: str
    problem: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    tokens_per_s: float | None = None
    tokens_per_s_quartiles: tuple[float, float] | None = None
    ratio: tuple[float, float, float] | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Group:
    """Rows that are timed in turn, and compared with the first. label: what row.mode says."""

    label: str
    mode: str
    entrants: list[Entrant]


def run(console: Console, plan: Plan, out: Path, earlier: Path | None) -> str:
    """Check and time; write NAME.json and NAME.png into the folder `out`.

    earlier: a file that an earlier run wrote, to compare with. Returns what was found wrong, in one
    line; empty where nothing was. The figures are written after every mode.
    """
    before = None if earlier is None else against.load(earlier, _what(plan))
    groups = _groups(plan)
    files.check_folder("out", out)
    file = out / f"{plan.stem}.json"
    record: dict[str, Any] = {
        "benchmark": "model",
        **report.stamp(plan.device),
        "what": _what(plan),
        "timer": "CUDA events" if plan.device.type == "cuda" else plan.clock_name,
        "memory": "CUDA allocator" if plan.device.type == "cuda" else "CPU allocator, by profiler",
        "limit": LIMIT,
        "compile": [],
        "rows": [],
    }

    def write() -> None:
        files.write_json(file, record)

    meter = Meter(plan.device, time.process_time if plan.cpu_time else time.perf_counter)
    rows: list[Row] = []
    everyone = [e for group in groups for e in group.entrants]
    compiled = [e for e in everyone if e.backend != EAGER and not subjects.unavailable(e.backend)]
    cold = list(dict.fromkeys(e.backend for e in compiled)) if plan.cold else []
    graphs = len(compiled) + 2 * len(cold)
    console.print(f"{plan.name}: {graphs} times to compile, up to a minute each, then to time")
    total = len(everyone) + len(groups) * plan.rounds + len(cold)
    with report.steps(console, total) as on_step:
        for group in groups:
            rows += _time(group, plan, meter, on_step)
            record["rows"] = [dataclasses.asdict(r) for r in rows]
            write()
        first_mode = TRAINING if TRAINING in plan.modes else plan.modes[-1]
        for backend in cold:
            on_step(f"{backend}: {first_mode} in fresh processes, cold and warm")
            record["compile"].append(_first_call(plan, backend, first_mode))
            write()
    record["complete"] = True
    write()
    dtype = str(plan.dtype).partition(".")[2]
    title = f"{plan.name}, B {plan.size.batch}, T {plan.size.tokens}, {dtype}"
    ratio = f"{peers.TITANS if plan.beside_peers else EAGER} / it"
    console.print(report.model_table(rows, title, ratio))
    console.print(report.compile_table(record["compile"]))
    if before is not None:
        console.print(against.table(against.moves(before, record), earlier))
    written = [file.name]
    if report.model_plot(picture := file.with_name(f"{plan.stem}.png"), rows, title):
        written.append(picture.name)
    else:
        console.print("no picture: matplotlib is missing (pip install 'atlas-blocks[plot]')")
    console.print(f"[bold]{out}[/]: {', '.join(written)}")
    wrong = [r for r in rows if r.errors and r.problem]
    return (
        "" if not wrong else f"{wrong[0].contender} is wrong ({wrong[0].mode}): {wrong[0].problem}"
    )


def _groups(plan: Plan) -> list[Group]:
    """What the plan says, built. Raises ValueError for an unknown name or a missing peer."""
    if not plan.beside_peers:
        model = subjects.build(plan.name, plan.size, plan.device)
        entrants = [Entrant(c, model, c) for c in CONTENDERS]
        return [Group(mode, mode, entrants) for mode in plan.modes]
    backends = [c for c in CONTENDERS if c != EAGER]
    found = []
    for memory in peers.MEMORIES:
        entrants = peers.entrants(memory, plan.size, plan.device, backends)
        found += [Group(f"{memory}, {mode}", mode, entrants) for mode in plan.modes]
    return found


def _what(plan: Plan) -> dict[str, Any]:
    size = dataclasses.asdict(plan.size)
    if plan.name not in subjects.BLOCKS:
        del size["dim"], size["heads"]
    return {
        "name": plan.name,
        **size,
        "dtype": str(plan.dtype).partition(".")[2],
        "threads": torch.get_num_threads(),
        "clock": plan.clock_name,
        **(peers.WHAT if plan.beside_peers else {}),
    }


def _time(group: Group, plan: Plan, meter: Meter, on_step: Callable[[str], None]) -> list[Row]:
    """All contenders in one mode: compile, check, take memory, then time them in turn."""
    # Graphs of another mode are no use to this one and count towards the compiler's limit.
    torch.compiler.reset()
    mode = group.mode
    rows, ready = {e.name: Row(e.name, group.label) for e in group.entrants}, {}
    known: dict[nn.Module, tuple[Results, dict[str, float]]] = {}
    for entrant in group.entrants:
        row, model = rows[entrant.name], entrant.model
        on_step(f"{group.label}: {entrant.name} is checked")
        row.problem = entrant.problem or subjects.unavailable(entrant.backend)
        if row.problem or model is None:
            continue
        if entrant.checked and model not in known:
            truth = Subject(copy.deepcopy(model).double(), EAGER, mode, plan.size).results()
            eager = _errors(Subject(model, EAGER, mode, plan.size).results(), truth)
            known[model] = truth, eager
        subject = Subject(model, entrant.backend, mode, plan.size)

        def prepare(subject: Subject = subject, row: Row = row, entrant: Entrant = entrant) -> None:
            results = subject.results()
            if entrant.model in known:
                truth, eager = known[entrant.model]
                row.errors = _errors(results, truth)
                problem = _difference(row.errors, eager)
                if problem:
                    raise Unavailable(problem)
            elif not all(t.isfinite().all() for named in results.values() for t in named.values()):
                raise Unavailable("its results are not finite")
            subject.call()
            row.peak_bytes = meter.peak(subject.call)

        row.problem = meter.attempt(prepare)
        if not row.problem:
            ready[entrant.name] = subject.call
    # Compiling one may have made the graph of another stale, which shares its code.
    for name, call in list(ready.items()):
        rows[name].problem = meter.attempt(call)
        if rows[name].problem:
            del ready[name]
    times, problems = interleave(
        ready,
        meter,
        plan.rounds,
        lambda words: on_step(f"{group.label}: {words}"),
        ENOUGH_SECONDS,
    )
    tokens = plan.size.batch * (1 if mode == DECODE else plan.size.tokens)
    first = times.get(group.entrants[0].name, [])
    for name, samples in times.items():
        row = rows[name]
        row.problem = problems.get(name, "")
        if not row.problem:
            _fill(row, samples, first, tokens)
    return list(rows.values())


def _fill(row: Row, samples: Sequence[float], first: Sequence[float], tokens: int) -> None:
    low, median, high = quartiles(samples)
    row.samples, row.median_ms, row.quartiles_ms = len(samples), median, (low, high)
    row.tokens_per_s = 1e3 * tokens / median
    row.tokens_per_s_quartiles = 1e3 * tokens / high, 1e3 * tokens / low
    # Round by round, so that what slows the machine down for a while slows both.
    pairs = list(zip(first, samples, strict=False))
    if pairs:
        row.ratio = quartiles([slow / fast for slow, fast in pairs])


def _errors(found: Results, true: Results) -> dict[str, float]:
    """The largest error of each kind of result."""
    worst = {}
    for kind, tensors in true.items():
        if found[kind].keys() != tensors.keys():
            raise Unavailable(f"other {kind} than eager's")
        norms = {n: t.double().norm().item() for n, t in tensors.items()}
        # What is zero but for rounding has no relative error of its own.
        least = NEGLIGIBLE * max(norms.values(), default=0.0)
        errors = [
            (found[kind][n].double() - t.double()).norm().item() / (max(norms[n], least) or 1.0)
            for n, t in tensors.items()
        ]
        # NaN is larger than anything.
        worst[kind] = max(errors, key=lambda e: (e != e, e), default=0.0)
    return worst


def _difference(errors: dict[str, float], eager: dict[str, float]) -> str:
    """What differs from eager, in words; empty where nothing does."""
    for kind, error in errors.items():
        allowed = LIMIT * eager[kind] + FLOOR
        if not error <= allowed:
            return (
                f"the error of its {kind} against float64 is {error:.2g}, allowed are {allowed:.2g}"
            )
    return ""


def _first_call(plan: Plan, backend: str, mode: str) -> dict[str, Any]:
    found = {"contender": backend, "mode": mode, "problem": ""}
    try:
        times = first_calls(plan.name, backend, mode, plan.size, plan.device)
    except Unavailable as error:
        return found | {"problem": str(error)}
    return found | dataclasses.asdict(times)
