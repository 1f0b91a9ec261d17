"""Tasks that show what a model remembers: generated, from a seed, without a download.

`TASKS` has each by its name; `task` gives one at a length, with other settings. `MapTask` is for a
memory alone: its pairs are vectors.
"""

from __future__ import annotations

from typing import Any

from atlas_blocks import check
from atlas_blocks.recipes.tasks.babi import BabiTask
from atlas_blocks.recipes.tasks.base import (
    FILLER,
    IGNORE,
    TextTask,
    TokenTask,
    accuracy,
    effective,
    macro_accuracy,
    resized,
    training_rows,
    wilson,
)
from atlas_blocks.recipes.tasks.mad import (
    MADCompression,
    MADCopy,
    MADFuzzy,
    MADMemorization,
    MADRecall,
)
from atlas_blocks.recipes.tasks.maps import MapTask
from atlas_blocks.recipes.tasks.mqar import MQARTask
from atlas_blocks.recipes.tasks.niah import NeedleTask
from atlas_blocks.recipes.tasks.prose import Prose, Question, draws_of
from atlas_blocks.recipes.tasks.recall import OverwriteTask, ParityTask, RecallTask

TASKS: dict[str, TokenTask | TextTask] = {
    "recall": RecallTask(),
    "overwrite": OverwriteTask(),
    "parity": ParityTask(),
    "mqar": MQARTask(),
    "mad-recall": MADRecall(),
    "mad-noisy": MADRecall(vocab_size=32, noise=0.2, noise_vocab=16),
    "mad-fuzzy": MADFuzzy(),
    "mad-copy": MADCopy(),
    "mad-compression": MADCompression(),
    "mad-memorization": MADMemorization(),
    "niah-1": NeedleTask(),
    "niah-2": NeedleTask(haystack="prose"),
    "niah-3": NeedleTask(haystack="prose", value="uuid"),
    "niah-multikey": NeedleTask(haystack="prose", keys=4, length=2048),
    "niah-multivalue": NeedleTask(haystack="prose", values=4, length=2048),
    **{f"babi-qa{n}": BabiTask(number=n) for n in (1, 2, 3, 4, 5)},
}


def task(name: str, **settings: Any) -> TokenTask | TextTask:
    """The task of that name, with other settings, such as length=4096.

    Raises ValueError for a name or a setting that there is not, and for a value that does not fit.
    """
    check.choice("task", name, TASKS)
    return resized(TASKS[name], **settings)


__all__ = [
    "FILLER",
    "IGNORE",
    "TASKS",
    "BabiTask",
    "MADCompression",
    "MADCopy",
    "MADFuzzy",
    "MADMemorization",
    "MADRecall",
    "MQARTask",
    "MapTask",
    "NeedleTask",
    "OverwriteTask",
    "ParityTask",
    "Prose",
    "Question",
    "RecallTask",
    "TextTask",
    "TokenTask",
    "accuracy",
    "draws_of",
    "effective",
    "macro_accuracy",
    "resized",
    "task",
    "training_rows",
    "wilson",
]
