"""Checkpoints: one safetensors file that holds the weights and the config, never one alone.

The config is JSON in the file's metadata, beside the library's version and a checksum of all that
the file holds. A training run adds the optimizer's tensors and its own config, so that the same
file resumes it. What does not fit is refused by name, before anything is written or taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from atlas_blocks import Config, check
from atlas_blocks.recipes import describe, files
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig
from atlas_blocks.recipes.optimizers import slots
from atlas_blocks.recipes.training import TrainingConfig, make_optimizer

# Files of the first format have no checksum.
FIRST_FORMAT = "atlas-blocks language model"
FORMAT = "atlas-blocks language model, with checksum"
MODEL, OPTIMIZER, RUN = "model.", "optimizer.", "run."
# What torch.compile and activation checkpointing put into the names of what they wrap.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
# Attributes that say how parameters are initialised, and nothing more.
STARTS = {"start", "std"}
# What accelerate puts beside a forward that only moves or casts what the class's own computes with.
MOVERS = {"_hf_hook", "_original_forward"}
# Fields of a run that the file's metadata holds as they are.
WORDS = ("data", "tokenizer", "record")
C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run that a checkpoint can continue. data: what it trains on, in words that tell
    one text from another; empty where that is not known. tokenizer: the text of its tokenizer.json,
    where tokens are not bytes. record, tensors: what else the loop goes on from."""

    config: TrainingConfig
    optimizer: torch.optim.Optimizer
    step: int
    data: str = ""
    tokenizer: str = ""
    record: str = ""
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


def version() -> str:
    """The installed library's version."""
    return importlib.metadata.version("atlas-blocks")


def save(
    path: Path,
    model: nn.Module,
    run: Run | None = None,
    *,
    allow_nonfinite: bool = False,
    tokenizer: str = "",
) -> None:
    """Write the model, and the run where given, to `path` in one atomic replacement.

    model: a LanguageModel, also compiled, or inside DistributedDataParallel. One that
    `fully_shard` took apart is gathered: every rank calls, rank 0 writes.
    tokenizer: the text of its tokenizer.json, where there is no run that has it.
    Raises ValueError, before anything is written, for what `load` would refuse: parts that the
    model's config does not build, or weights that are not finite unless allow_nonfinite. Raises
    OSError where the file cannot be written; what was there before stays.
    Hooks are no part of a model here: the file has none, nor what they have changed in passing.
    Those that make a weight (pruning) are refused, by the names of what they make it from.
    """
    whole = _unwrapped(model)
    tensors = {MODEL + _plain(name): t for name, t in whole.state_dict().items()}
    metadata = {"format": FORMAT, "version": version(), "config": whole.config.to_json()}
    problems = _replaced(whole) or _misfits(whole.config, _under(tensors, MODEL))
    if problems:
        _refuse("model", "is not what its config builds", problems)
    if run is not None:
        tensors |= _slots(whole, run) | {RUN + name: t for name, t in run.tensors.items()}
        metadata |= {"training": run.config.to_json(), "step": str(run.step)}
        metadata |= {name: getattr(run, name) for name in WORDS}
    elif tokenizer:
        metadata["tokenizer"] = tokenizer
    sharded = any(hasattr(t, "full_tensor") for t in tensors.values())
    writes = not sharded or torch.distributed.get_rank() == 0
    # One at a time: the other ranks never hold a whole model.
    parts = {name: part for name, t in tensors.items() if (part := _whole(t, writes)) is not None}
    if not writes:
        return
    if not allow_nonfinite:
        _check_finite("model", parts)
    metadata["checksum"] = _checksum(metadata, sorted(parts.items()))
    try:
        with files.replacing(path) as partial:
            save_file(parts, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(f"checkpoint {path}: cannot be written: {error}") from error


def load(
    path: Path, device: torch.device | str = "cpu", *, allow_nonfinite: bool = False
) -> LanguageModel:
    """The model saved at `path`, in the dtype in which it was saved.

    Raises ValueError that names the path and what is wrong; weights that are not finite are wrong
    unless allow_nonfinite.
    """
    tensors, metadata = _read(path, MODEL)
    tensors = _under(tensors, MODEL)
    config = _config(path, metadata, "config", LanguageModelConfig)
    problems = _misfits(config, tensors)
    if problems:
        _refuse(f"checkpoint {path}", "does not hold what its config builds", problems)
    if not allow_nonfinite:
        _check_finite(f"checkpoint {path}", tensors)
    model = config.build().to(_dtype(tensors))
    model.load_state_dict(tensors)
    return model.to(device)


def config(path: Path) -> LanguageModelConfig:
    """The config of the model saved at `path`. Raises ValueError as `load`."""
    return _config(path, _read(path, MODEL)[1], "config", LanguageModelConfig)


def load_run(path: Path, model: nn.Module, *, allow_nonfinite: bool = False) -> Run:
    """The training run saved with `model` at `path`, for `load`'s model, wrapped or sharded since.

    Raises ValueError where there is none, or where it does not fit.
    """
    where, model = f"checkpoint {path}", _unwrapped(model)
    tensors, metadata = _read(path, OPTIMIZER, RUN)
    own, tensors = _under(tensors, RUN), _under(tensors, OPTIMIZER)
    if "training" not in metadata:
        check.fail(where, "a training run to resume", "a model alone")
    if _config(path, metadata, "config", LanguageModelConfig) != model.config:
        check.fail("model", f"the model of {path}", f"another ({model.config.name})")
    config = _config(path, metadata, "training", TrainingConfig)
    step = metadata.get("step", "")
    if not re.fullmatch(r"[0-9]{1,18}", step) or int(step) > config.steps:
        check.fail(f"{where}: step", f"an integer from 0 to {config.steps}", repr(step))
    optimizer = make_optimizer(model, config)
    found = _read_slots(where, optimizer, tensors)
    # A run all of whose steps were skipped has none, and a record that says so.
    if int(step) and not (found or metadata.get("record")):
        check.fail(where, f"the optimizer's tensors after step {step}", "none")
    if not allow_nonfinite:
        _check_finite(where, tensors)
    groups = optimizer.state_dict()["param_groups"]
    for index, parameter in enumerate(_parameters(optimizer)):
        if hasattr(parameter, "full_tensor") and index in found:
            found[index] |= _sharded_as(parameter, found[index])
    optimizer.load_state_dict({"state": found, "param_groups": groups})
    words = {name: metadata.get(name, "") for name in WORDS}
    return Run(config, optimizer, int(step), **words, tensors=own)


def tokenizer(path: Path) -> str | None:
    """The tokenizer.json of the model saved at `path`; None where its tokens are bytes.

    Raises ValueError where the file cannot be read; `load` checks what is in it.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return (file.metadata() or {}).get("tokenizer") or None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path}: cannot be read: {error}") from error


# --- the file ---------------------------------------------------------------------------------


def _checksum(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the metadata without its checksum and of all tensors on the CPU, in order."""
    found = hashlib.sha256()
    told = {key: value for key, value in metadata.items() if key != "checksum"}
    found.update(json.dumps(told, sort_keys=True).encode())
    for name, tensor in tensors:
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read(path: Path, *prefixes: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under the prefixes and the metadata, all of it checked."""
    where, kept = f"checkpoint {path}", {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            form = metadata.get("format")
            if form not in (FORMAT, FIRST_FORMAT):
                check.fail(where, "one that atlas-blocks wrote", "another's file")

            def tensors() -> Iterator[tuple[str, Tensor]]:
                for name in sorted(file.keys()):
                    tensor = file.get_tensor(name)
                    if name.startswith(prefixes):
                        kept[name] = tensor
                    elif not name.startswith((MODEL, OPTIMIZER, RUN)):
                        check.fail(where, f"tensors of {MODEL}*, {OPTIMIZER}* and {RUN}*", name)
                    yield name, tensor

            _check_names_once(where, path)
            found = _checksum(metadata, tensors())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{where}: cannot be read: {error}") from error
    if form == FORMAT and metadata.get("checksum") != found:
        check.fail(where, "a file as it was saved", "one whose checksum is another: it is damaged")
    return kept, metadata


def _check_names_once(where: str, path: Path) -> None:
    """A reader takes the last of two equal names in the header, without a word."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            check.fail(where, "every name once", f"{twice} twice")
        return found

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        json.loads(file.read(size), object_pairs_hook=once)


def _config(path: Path, metadata: dict[str, str], key: str, kind: type[C]) -> C:
    if key not in metadata:
        check.fail(f"checkpoint {path}", f"a config ({key!r})", "none")
    try:
        config = Config.from_json(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path}: {key}: {error}") from error
    if not isinstance(config, kind):
        check.fail(f"checkpoint {path}: {key}", kind.__name__, type(config).__name__)
    return config


def _refuse(subject: str, fault: str, problems: list[str]) -> None:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise ValueError(f"{subject}: {fault}: {'; '.join(problems[:3])}{more}")


# --- the model --------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> LanguageModel:
    """The language model inside what torch.compile or DistributedDataParallel put around it."""
    while not isinstance(model, LanguageModel):
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            check.fail("model", "a LanguageModel", type(model).__name__)
        model = inner  # type: ignore[assignment]
    return model


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _replaced(model: LanguageModel) -> list[str]:
    """Parts of another type or config than the model's config builds."""
    # A wrapper comes before what it wraps, which has the same plain name.
    parts = {_plain(name): part for name, part in model.named_modules()}
    if Config.from_json(model.config.to_json()) != model.config:
        return ["its config does not come back from JSON as it was"]
    expected_parts = dict(describe.meta_model(model.config).named_modules())
    problems = []
    for name, expected in expected_parts.items():
        part = parts.get(name)
        if part is None:
            problems.append(f"{name} missing")
        elif _kind(part) is not type(expected):
            problems.append(f"{name} is {type(part).__name__}, not {type(expected).__name__}")
        elif getattr(part, "config", None) != getattr(expected, "config", None):
            problems.append(f"{name} has another config")
        elif "forward" in vars(part) and vars(part).keys().isdisjoint(MOVERS):
            problems.append(f"{name or 'the model'} has a forward of its own")
        else:
            theirs = vars(part)
            others = (key for key, value in _numbers(expected) if theirs.get(key) != value)
            problems += [f"{name or 'the model'} has another {key}" for key in others]
    return problems + [f"{name} unknown" for name in parts if name not in expected_parts]


def _numbers(part: nn.Module) -> list[tuple[str, object]]:
    """What a part computes with and no tensor holds (eps, the values of fixed gates)."""
    kinds = (int, float, str, list)
    read = ((k, v) for k, v in vars(part).items() if k not in STARTS and not k.startswith("_"))
    return [(key, value) for key, value in read if type(value) in kinds]


def _kind(part: nn.Module) -> type:
    """Its class; of FSDPLinear, which `fully_shard` made, Linear."""
    first, *others = type(part).__bases__
    return others[0] if others and first.__name__ == "FSDPModule" else type(part)


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """That of the weights; buffers may keep one of their own."""
    weight = tensors.get("embedding.weight")
    if weight is None or weight.dtype not in check.FLOATS:
        return torch.float32
    return weight.dtype


def _misfits(config: LanguageModelConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are missing, unknown, or of another shape or dtype than the config builds."""
    skeleton = describe.meta_model(config).to(_dtype(tensors))
    expected_tensors = skeleton.state_dict()
    # A shape and a dtype are enough, but for what has numbers there too.
    has_numbers = {name for name, t in expected_tensors.items() if not t.is_meta}
    shadows = {
        name: t if name in has_numbers else torch.empty(t.shape, dtype=t.dtype, device="meta")
        for name, t in tensors.items()
    }
    problems = []
    for name, expected in expected_tensors.items():
        found = shadows.get(name)
        if found is None:
            continue
        if found.shape != expected.shape:
            problems.append(f"{name} is {list(found.shape)}, expected {list(expected.shape)}")
            # Known already: what follows is not to find it again.
            shadows[name] = expected
        elif found.dtype != expected.dtype:
            problems.append(f"{name} is {found.dtype}, expected {expected.dtype}")
    try:
        # Its own way of loading: parts may read names and shapes that older files have.
        names = skeleton.load_state_dict(shadows, strict=False)
    except RuntimeError as error:
        return [*problems, " ".join(str(error).split())]
    problems += [f"{name} missing" for name in names.missing_keys]
    return [*problems, *(f"{name} unknown" for name in names.unexpected_keys)]


def _check_finite(subject: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            check.fail(subject, "finite numbers (allow_nonfinite takes others)", f"some in {name}")


def _whole(tensor: Tensor, wanted: bool) -> Tensor | None:
    """The tensor on the CPU with a storage of its own; of a sharded one, what all ranks hold."""
    sharded: Any = tensor
    full = sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    if not wanted:
        return None
    own = full.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()


# --- the optimizer ----------------------------------------------------------------------------


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _slots(model: LanguageModel, run: Run) -> dict[str, Tensor]:
    """The optimizer's tensors by the names they have in a file."""
    made = make_optimizer(model, run.config)
    ours, theirs = _parameters(made), _parameters(run.optimizer)
    same = len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
    if not (same and [s for _, s in slots(run.optimizer)] == [s for _, s in slots(made)]):
        check.fail("run", "the optimizer that make_optimizer makes for this model", "another")
    if not 0 <= run.step <= run.config.steps:
        check.fail("run", f"a step from 0 to {run.config.steps}", run.step)
    state = run.optimizer.state_dict()["state"]
    tensors = {f"{i}.{slot}": t for i, kept in state.items() for slot, t in kept.items()}
    _read_slots("run", run.optimizer, tensors)
    return {OPTIMIZER + name: t for name, t in tensors.items()}


def _read_slots(
    subject: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Tensors "3.exp_avg" by parameter and slot. Raises ValueError for one that does not fit."""
    expected = slots(optimizer)
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"([0-9]{1,9})\.(\w+)", name)
        if match is None or int(match[1]) >= len(expected):
            wanted = f"{OPTIMIZER}0 to {OPTIMIZER}{len(expected) - 1}"
            check.fail(subject, wanted, OPTIMIZER + name)
        parameter, names = expected[int(match[1])]
        if match[2] not in names:
            wanted = f"{OPTIMIZER}{match[1]} with {', '.join(names)}"
            check.fail(subject, wanted, OPTIMIZER + name)
        step = match[2] == "step"
        shape = torch.Size() if step else parameter.shape
        dtype = torch.float32 if step else parameter.dtype
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            got = f"{list(tensor.shape)} {tensor.dtype}"
            check.fail(f"{subject}: {OPTIMIZER}{name}", f"{list(shape)} {dtype}", got)
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    for index, kept in found.items():
        missing = [slot for slot in expected[index][1] if slot not in kept]
        if missing:
            check.fail(subject, f"{OPTIMIZER}{index}.{missing[0]}", "none")
    return found


def _sharded_as(parameter: Tensor, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The slots of a sharded parameter, each with this rank's part alone."""
    from torch.distributed.tensor import distribute_tensor

    place: Any = parameter
    return {
        slot: distribute_tensor(tensor.to(place.device), place.device_mesh, place.placements)
        for slot, tensor in slots.items()
        if slot != "step"
    }
