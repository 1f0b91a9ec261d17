"""Timing one training step eager and compiled, in one process and interleaved."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable

from torch import Tensor

from atlas_blocks.recipes.model import LanguageModel
from atlas_blocks.recipes.training import (
    TrainingConfig,
    compiled_blocks,
    make_optimizer,
    train_step,
)


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Milliseconds per step (medians) and what compiling cost.

    ratio: eager over compiled, pair by pair: (lowest, median, highest). problem: why there is no
    compiled figure, in the compiler's words; empty where there is one.
    """

    eager_ms: float
    compiled_ms: float | None = None
    compile_seconds: float | None = None
    ratio: tuple[float, float, float] | None = None
    problem: str = ""


def time_step(
    model: LanguageModel, rows: Tensor, config: TrainingConfig, *, repeats: int
) -> StepTiming:
    """Time one training step on rows [B, L + 1], eager and with every block compiled; the model
    itself is left as it is."""

    def stepper(config: TrainingConfig) -> tuple[LanguageModel, Callable[[], object]]:
        subject = copy.deepcopy(model)
        optimizer = make_optimizer(subject, config)
        return subject, lambda: train_step(subject, optimizer, rows, config, 0)

    def seconds(step: Callable[[], object]) -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    _, eager = stepper(config)
    seconds(eager)
    compiling = dataclasses.replace(config, compile=True)
    subject, fast = stepper(compiling)
    with compiled_blocks(subject, compiling):
        try:
            compile_seconds = seconds(fast)
            seconds(fast)
        except Exception as error:  # Any failure of the compiler is a result to report.
            eager_ms = 1e3 * statistics.median(seconds(eager) for _ in range(repeats))
            first_line = (str(error).strip().splitlines() or [""])[0]
            return StepTiming(eager_ms, problem=f"{type(error).__name__}: {first_line}")
        pairs = [(seconds(eager), seconds(fast)) for _ in range(repeats)]
    ratios = [slow / quick for slow, quick in pairs]
    return StepTiming(
        eager_ms=1e3 * statistics.median(slow for slow, _ in pairs),
        compiled_ms=1e3 * statistics.median(quick for _, quick in pairs),
        compile_seconds=compile_seconds,
        ratio=(min(ratios), statistics.median(ratios), max(ratios)),
    )
