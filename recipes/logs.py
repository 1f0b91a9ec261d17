"""What a run tells for good: JSON lines always, TensorBoard's files where that is installed, and
Weights & Biases where a project is named."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas_blocks.recipes import files
from atlas_blocks.recipes.data.sources import needed

LINES, TENSORBOARD = "log.jsonl", "tensorboard"


class Log:
    """The scalars of a run in the folder `out`, which stands after `step` steps.

    Whatever the folder's log has of later steps, of a run that was killed, is dropped: they come
    again. project: of Weights & Biases, or "".
    """

    def __init__(self, out: Path, step: int, *, project: str = "") -> None:
        kept = [line for line in _lines(out / LINES) if line["step"] <= step]
        with files.replacing(out / LINES) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        # By lines: what a kill leaves is whole.
        self._lines = (out / LINES).open("a", buffering=1)
        self._board: Any = None
        if has_tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1, max_queue=1000)
        self._project: Any = None
        if project:
            # The folder names the run, so that one that goes on is one there too.
            place = out.resolve()
            number = hashlib.sha256(str(place).encode()).hexdigest()[:16]
            self._project = needed("wandb", "wandb", "wandb").init(
                project=project, dir=str(out), id=number, name=place.name, resume="allow"
            )

    def write(self, step: int, **values: float | str) -> None:
        """The values after `step` steps; what is empty is left out, what is not finite is null."""
        words = {name: v for name, v in values.items() if isinstance(v, str) and v}
        numbers = {name: v for name, v in values.items() if not isinstance(v, str)}
        scalars = {name: v for name, v in numbers.items() if math.isfinite(v)}
        line = {"step": step} | dict.fromkeys(numbers) | scalars | words
        self._lines.write(json.dumps(line) + "\n")
        if self._board is not None:
            # One event for all of them: a small model's step is not much longer than each takes.
            self._board.file_writer.add_summary(_summary(scalars), step)
        if self._project is not None:
            self._project.log(scalars, step=step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._project is not None:
            self._project.finish()


def _summary(scalars: Mapping[str, float]) -> Any:
    summary: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
    return summary(value=[summary.Value(tag=n, simple_value=v) for n, v in scalars.items()])


def has_tensorboard() -> bool:
    """Whether its library is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a kill may leave the last in part."""
    found = []
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "step" in line]
