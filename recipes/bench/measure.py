"""Measuring contenders in turn: time by CUDA events or by the wall clock, memory, FLOP."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from atlas_blocks.recipes.bench.contenders import (
    PRODUCT,
    Contender,
    Shape,
    Subject,
    Unavailable,
    first_line,
)

K = TypeVar("K", bound=Hashable)
FORWARD, BOTH = "forward", "forward+backward"
# A slow contender leaves the rounds after so many seconds of its own and so many samples.
ENOUGH_SECONDS, ENOUGH_SAMPLES = 5.0, 3


@dataclass
class Row:
    """One contender in one direction at one shape; figures are None where there are none.

    problem: why it has none. quartiles_ms: the 25th and the 75th percentile. share_of_product:
    tflops over those of the matrix product timed in the same rounds. peak_bytes: most memory
    allocated at a time, above the inputs and weights.
    """

    part: str
    shape: Shape
    contender: str
    what: str
    direction: str
    problem: str = ""
    samples: int = 0
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    tokens_per_s: float | None = None
    flops: int | None = None
    tflops: float | None = None
    share_of_product: float | None = None
    peak_bytes: int | None = None


class Meter:
    """Time and memory of one call on a device.

    clock: what tells seconds on a CPU; time.process_time leaves out the time that other processes
    had the cores, and adds up the threads.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device, self.clock = device, clock
        self.on_gpu = device.type == "cuda"
        # Larger than any last-level cache of the device.
        size = 2**28 if self.on_gpu else 2**26
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Of one call that finds none of its data in the cache."""
        self._flush.zero_()
        if not self.on_gpu:
            began = self.clock()
            call()
            return 1e3 * (self.clock() - began)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes that a call adds to what is allocated, at most.

        Of CUDA's allocator; on a CPU of what PyTorch's profiler records, the compiler's code
        included.
        """
        if not self.on_gpu:
            return _profiled_peak(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def attempt(self, call: Callable[[], object]) -> str:
        """Why the call failed, in one line; empty where it did not."""
        try:
            call()
            return ""
        except Unavailable as error:
            return str(error)
        except torch.OutOfMemoryError:
            problem = "out of memory"
        except Exception as error:  # A contender's failure is a result to print, not to hide.
            problem = f"{type(error).__name__}: {first_line(error)}"
        # Give back what the failed contender held.
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        return problem


def _profiled_peak(call: Callable[[], object]) -> int:
    profiler: Any = torch.autograd.profiler.profile(profile_memory=True)
    with _silent(), profiler:
        call()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that some builds of the profiler write to stderr, below Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def interleave(
    runners: Mapping[K, Callable[[], object]],
    meter: Meter,
    rounds: int,
    on_step: Callable[[str], None],
    enough_seconds: float = ENOUGH_SECONDS,
) -> tuple[dict[K, list[float]], dict[K, str]]:
    """Milliseconds of every runner, each called once a round, and why some failed.

    on_step: told what comes next, `rounds` times. enough_seconds: after so many of its own, and
    ENOUGH_SAMPLES, a runner leaves the rounds.
    """
    times: dict[K, list[float]] = {name: [] for name in runners}
    problems: dict[K, str] = {}
    for number in range(rounds):
        on_step(f"round {number + 1} of {rounds}")
        for name, run in runners.items():
            so_far = times[name]
            enough = sum(so_far) > 1e3 * enough_seconds and len(so_far) >= ENOUGH_SAMPLES
            if name in problems or enough:
                continue
            problem = meter.attempt(lambda r=run, t=so_far: t.append(meter.milliseconds(r)))
            if problem:
                problems[name] = problem
    return times, problems


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 25th, 50th and 75th percentile."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return low, median, high


def compare(
    contenders: Sequence[Contender],
    shape: Shape,
    meter: Meter,
    *,
    part: str,
    rounds: int,
    on_step: Callable[[str], None],
) -> list[Row]:
    """Rows of all contenders in both directions; each round times every one of them once.

    on_step: told what comes next, 2 (contenders + rounds) times.
    """
    subjects: dict[Contender, Subject] = {}
    refused: dict[Contender, str] = {}
    for contender in contenders:
        problem = meter.attempt(lambda c=contender: subjects.update({c: _build(c, shape, meter)}))
        if problem:
            refused[contender] = problem
    found = []
    for direction in (FORWARD, BOTH):
        rows = {c: Row(part, shape, c.name, c.what, direction) for c in contenders}
        for contender, row in rows.items():
            on_step(f"{direction}: warming up {contender.name}, {contender.what}")
            row.problem = refused.get(contender, "")
            if not row.problem:
                subject = subjects[contender]
                row.problem = meter.attempt(lambda s=subject, r=row: _warm_up(s, r, meter))
        times, problems = interleave(
            {c: _runner(subjects[c], direction) for c, row in rows.items() if not row.problem},
            meter,
            rounds,
            lambda words, d=direction: on_step(f"{d}: {words}"),
        )
        for contender, samples in times.items():
            row = rows[contender]
            row.problem = problems.get(contender, "")
            if not row.problem:
                _fill(row, samples, counts_tokens=contender.tokens)
        rate = next((r.tflops for c, r in rows.items() if c == PRODUCT), None)
        for row in rows.values():
            if rate and row.tflops:
                row.share_of_product = row.tflops / rate
        found += rows.values()
    return found


def _build(contender: Contender, shape: Shape, meter: Meter) -> Subject:
    torch.manual_seed(0)
    return contender.build(shape, meter.device)


def _runner(subject: Subject, direction: str) -> Callable[[], list[Tensor]]:
    """A function that runs one direction and returns its results."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [subject.call()]

    def both() -> list[Tensor]:
        y = subject.call()
        # Handed out and not added to .grad; y itself serves as its gradient.
        found = torch.autograd.grad(y, subject.leaves, y.detach(), allow_unused=True)
        return [t for t in found if t is not None]

    return both if direction == BOTH and subject.leaves else forward


def _warm_up(subject: Subject, row: Row, meter: Meter) -> None:
    """Compile, tune, check that results are finite, take memory and FLOPs."""
    run = _runner(subject, row.direction)
    run()
    results = run()
    if not all(t.isfinite().all() for t in results):
        raise Unavailable("its results are not finite")
    del results
    row.peak_bytes = meter.peak(run)
    row.flops = subject.flops(row.direction == BOTH)


def _fill(row: Row, times: list[float], *, counts_tokens: bool) -> None:
    low, median, high = quartiles(times)
    row.samples, row.median_ms, row.quartiles_ms = len(times), median, (low, high)
    if counts_tokens:
        row.tokens_per_s = row.shape.batch * row.shape.tokens / (1e-3 * median)
    if row.flops is not None:
        row.tflops = row.flops / median / 1e9
