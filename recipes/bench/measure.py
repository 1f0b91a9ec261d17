"""Measuring contenders in turn: time by CUDA events or by the wall clock, memory, FLOP."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """Time and memory of one call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        # Larger than any last-level cache of the device.
        size = 2**28 if self.on_gpu else 2**26
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Of one call that finds none of its data in the cache."""
        self._flush.zero_()
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - began)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes that a call adds to what is allocated, at most; None where nobody counts them."""
        if not self.on_gpu:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give back what a failed contender held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


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
        problem = _attempt(meter, lambda c=contender: subjects.update({c: _build(c, shape, meter)}))
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
                row.problem = _attempt(meter, lambda s=subject, r=row: _warm_up(s, r, meter))
        times: dict[Contender, list[float]] = {c: [] for c in contenders}
        for number in range(rounds):
            on_step(f"{direction}: round {number + 1} of {rounds}")
            for contender, row in rows.items():
                so_far = times[contender]
                enough = sum(so_far) > 1e3 * ENOUGH_SECONDS and len(so_far) >= ENOUGH_SAMPLES
                if row.problem or enough:
                    continue
                run = _runner(subjects[contender], direction)
                row.problem = _attempt(
                    meter, lambda r=run, t=so_far: t.append(meter.milliseconds(r))
                )
        for contender, row in rows.items():
            if not row.problem:
                _fill(row, times[contender], counts_tokens=contender.tokens)
        rate = next((r.tflops for c, r in rows.items() if c == PRODUCT), None)
        for row in rows.values():
            if rate and row.tflops:
                row.share_of_product = row.tflops / rate
        found += rows.values()
    return found


def _build(contender: Contender, shape: Shape, meter: Meter) -> Subject:
    torch.manual_seed(0)
    return contender.build(shape, meter.device)


def _attempt(meter: Meter, call: Callable[[], object]) -> str:
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
    meter.release()
    return problem


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
    low, median, high = _quartiles(times)
    row.samples, row.median_ms, row.quartiles_ms = len(times), median, (low, high)
    if counts_tokens:
        row.tokens_per_s = row.shape.batch * row.shape.tokens / (1e-3 * median)
    if row.flops is not None:
        row.tflops = row.flops / median / 1e9


def _quartiles(values: list[float]) -> list[float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
