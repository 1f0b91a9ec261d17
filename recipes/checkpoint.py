"""Checkpoints: one safetensors file that holds the weights and the config, never one alone.

The config is JSON in the file's metadata, beside the library's version. A training run adds the
optimizer's tensors and its own config, so that the same file resumes it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atlas_blocks import Config, check
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig
from atlas_blocks.recipes.training import TrainingConfig, make_optimizer

FORMAT = "atlas-blocks language model"
MODEL, OPTIMIZER = "model.", "optimizer."
C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run that a checkpoint can continue."""

    config: TrainingConfig
    optimizer: torch.optim.Optimizer
    step: int


def version() -> str:
    """The installed library's version."""
    return importlib.metadata.version("atlas-blocks")


def save(path: Path, model: LanguageModel, run: Run | None = None) -> None:
    """Write the model, and the run where given, to `path` in one atomic replacement."""
    tensors = {MODEL + name: t for name, t in model.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "version": version(),
        "config": model.config.to_json(),
    }
    if run is not None:
        for index, slots in run.optimizer.state_dict()["state"].items():
            for slot, value in slots.items():
                tensors[f"{OPTIMIZER}{index}.{slot}"] = value
        metadata |= {"training": run.config.to_json(), "step": str(run.step)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, device: torch.device | str = "cpu") -> LanguageModel:
    """The model saved at `path`. Raises ValueError that names the path and what is wrong."""
    tensors, metadata = _read(path, MODEL, device)
    config = _config(path, metadata, "config", LanguageModelConfig)
    model = config.build().to(device)
    expected = model.state_dict()
    problems = [f"{n} missing" for n in expected if n not in tensors]
    problems += [f"{n} unknown" for n in tensors if n not in expected]
    problems += [
        f"{n} is {list(tensors[n].shape)}, expected {list(t.shape)}"
        for n, t in expected.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"checkpoint {path}: tensors do not fit its config: {'; '.join(problems[:3])}{more}"
        )
    model.load_state_dict(tensors)
    return model


def load_run(path: Path, model: LanguageModel) -> Run:
    """The training run saved with `model` at `path`. Raises ValueError where there is none."""
    device = next(model.parameters()).device
    tensors, metadata = _read(path, OPTIMIZER, device)
    if "training" not in metadata:
        check.fail(f"checkpoint {path}", "a training run to resume", "a model alone")
    config = _config(path, metadata, "training", TrainingConfig)
    optimizer = make_optimizer(model, config)
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, slot = name.split(".")
        slots.setdefault(int(index), {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    return Run(config, optimizer, int(metadata["step"]))


def _read(
    path: Path, prefix: str, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under a prefix, which is cut off, and the metadata."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                check.fail(f"checkpoint {path}", "one that atlas-blocks wrote", "another's file")
            names = [n for n in file.keys() if n.startswith(prefix)]  # noqa: SIM118
            return {n.removeprefix(prefix): file.get_tensor(n) for n in names}, metadata
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path}: cannot be read: {error}") from error


def _config(path: Path, metadata: dict[str, str], key: str, kind: type[C]) -> C:
    try:
        config = Config.from_json(metadata[key])
    except (KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: {key}: {error}") from error
    if not isinstance(config, kind):
        check.fail(f"checkpoint {path}: {key}", kind.__name__, type(config).__name__)
    return config
