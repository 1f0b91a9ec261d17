"""Checkpoints of several ranks: a folder to which each writes its own parts, by torch's distributed
checkpoints, and which any number of ranks reads, one process too.

    step-00000200.dcp/run.json       what is no tensor: the same words as in a single file
    step-00000200.dcp/.metadata      torch's: which part of which tensor is where
    step-00000200.dcp/__0_0.distcp   the parts of a rank

A folder gets its name when all of it is written. Groups of heads that lie one after the other have
an axis of their own there, so that a rank's heads are one part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from atlas_blocks import Config, check
from atlas_blocks.recipes import checkpoint, files
from atlas_blocks.recipes.checkpoint import MODEL, OPTIMIZER, RUN, WORDS, Run
from atlas_blocks.recipes.distributed import tensor
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig
from atlas_blocks.recipes.optimizers import slots
from atlas_blocks.recipes.training import TrainingConfig, make_optimizer

if TYPE_CHECKING:
    from atlas_blocks.recipes.distributed.parallel import Parallel

RECORD, PARTIAL, METADATA = "run.json", ".partial", ".metadata"
FORMAT = "atlas-blocks run of several ranks"
# What of a run has a row for each crop, and so is of the rank that has the crop.
CARRIED = "carried."


def save(folder: Path, model: LanguageModel, run: Run, parallel: Parallel | None = None) -> None:
    """Write the run to `folder`, which is there whole or not at all. Every rank calls.

    parallel: None writes what one process holds. Raises OSError where it cannot be written.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    where, leads = f"checkpoint {folder}", parallel is None or parallel.leads
    words = {name: getattr(run, name) for name in WORDS}
    record = {
        "format": FORMAT,
        "version": checkpoint.version(),
        "config": model.config.to_json(),
        "training": run.config.to_json(),
        "step": run.step,
        **words,
    }
    made = _made(model, run.optimizer)
    for name, t in run.tensors.items():
        rows = name.startswith(CARRIED)
        made[RUN + name] = parallel.joined(t) if parallel is not None and rows else t
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
    if parallel is not None:
        dist.barrier()
    try:
        with _without_warnings():
            state_dict_saver.save(made, checkpoint_id=partial, no_dist=parallel is None)
    except (CheckpointException, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"{where}: cannot be written: {reason}") from error

    def named() -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        whole = record | {"files": sizes}
        files.write_json(partial / RECORD, whole | {"checksum": _checksum(partial, whole)})
        # On the disk before the folder has its name.
        for file in [*partial.iterdir(), partial]:
            files.sync(file)
        remove(folder)
        os.replace(partial, folder)
        files.sync(folder.parent)

    if parallel is None:
        named()
    else:
        parallel.at_first(named)


def load(
    folder: Path, device: torch.device, parallel: Parallel | None = None
) -> tuple[LanguageModel, Run]:
    """The model and the run of a folder, over the ranks of `parallel`. Every rank calls.

    Raises ValueError where the folder does not hold a run, or one that cannot be divided so.
    """
    where, record = f"checkpoint {folder}", files.read_json("checkpoint", folder / RECORD)
    if record.get("format") != FORMAT:
        check.fail(where, "one that atlas-blocks wrote", "another's folder")
    sizes = record.get("files")
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        got = (folder / name).stat().st_size if (folder / name).is_file() else "none"
        if got != size:
            check.fail(where, f"{size} bytes in {name}", got)
    found = _config(where, record, "config", LanguageModelConfig)
    config = _config(where, record, "training", TrainingConfig)
    step = record.get("step")
    if not isinstance(step, int) or not 0 <= step <= config.steps:
        check.fail(f"{where}: step", f"an integer from 0 to {config.steps}", repr(step))
    if parallel is not None:
        parallel.layout.check(found, config)

    def check_sum() -> None:
        told = record.get("checksum")  # older folders have none
        if told is not None and told != _checksum(folder, record):
            wanted = "a folder as it was saved"
            check.fail(where, wanted, "one whose checksum is another: it is damaged")

    check_sum() if parallel is None else parallel.at_first(check_sum)
    model = found.build().to(device)
    if parallel is not None:
        parallel.shard(model)
    optimizer = make_optimizer(model, config)
    try:
        _check_metadata(where, folder / METADATA)
        reader = FileSystemReader(folder)
        there: dict[str, Any] = reader.read_metadata().state_dict_metadata
        if any(name.startswith(OPTIMIZER) for name in there):
            _fill(optimizer)
        wanted = _made(model, optimizer)
        own = {name: t for name, t in there.items() if name.startswith(RUN)}
        for name, t in own.items():
            rows = name.startswith(RUN + CARRIED)
            room = parallel.room if parallel is not None and rows else torch.zeros
            wanted[name] = room(t.size, dtype=t.properties.dtype)
        missing = [name for name in wanted if name not in there]
        unknown = [name for name in there if name not in wanted]
        if missing or unknown:
            got = f"no {missing[0]}" if missing else unknown[0]
            check.fail(where, "the tensors of its config and its optimizer", got)
        for name, t in wanted.items():
            if there[name].size != t.shape:
                check.fail(f"{where}: {name}", str(list(t.shape)), list(there[name].size))
        with _without_warnings():
            state_dict_loader.load(wanted, storage_reader=reader, no_dist=parallel is None)
    except (CheckpointException, OSError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: cannot be read: {reason}") from error
    words = {name: record.get(name, "") for name in WORDS}
    tensors = {
        name.removeprefix(RUN): getattr(wanted[name], "_local_tensor", wanted[name]) for name in own
    }
    return model, Run(config, optimizer, step, **words, tensors=tensors)


def to_file(folder: Path, path: Path) -> None:
    """The run of a folder as a single file, which everything reads. One process calls."""
    checkpoint.save(path, *load(folder, torch.device("cpu")))


def from_file(path: Path, folder: Path) -> None:
    """The run of a single file as a folder. One process calls."""
    model = checkpoint.load(path)
    save(folder, model, checkpoint.load_run(path, model))


def remove(folder: Path) -> None:
    """Take a folder away; one that is half gone has not its name."""
    if folder.exists():
        gone = folder.with_name(folder.name + PARTIAL + ".old")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone)


def _made(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every tensor under its name in a folder, sharing memory with the model and the optimizer."""
    whole = tensor.fused(model)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    made = {MODEL + name: _form(t, whole.get(name)) for name, t in model.state_dict().items()}
    for parameter, own in slots(optimizer):
        name, kept = names[parameter], optimizer.state.get(parameter, {})
        for slot in own:
            if slot in kept:
                t = kept[slot]
                form = None if slot == "step" else whole.get(name)
                made[f"{OPTIMIZER}{name}.{slot}"] = _form(t, form)
    return made


def _form(t: Tensor, groups: tuple[int, int] | None) -> Tensor:
    """Groups of heads apart, where they are not already."""
    t = t.detach()
    if groups is None or t.ndim > 2:
        return t
    axis, parts = groups
    shape = [*t.shape[:axis], parts, t.shape[axis] // parts, *t.shape[axis + 1 :]]
    return t.view(shape)


def _fill(optimizer: torch.optim.Optimizer) -> None:
    """Room for what an optimizer keeps."""
    for parameter, own in slots(optimizer):
        for slot in own:
            room = torch.tensor(0.0) if slot == "step" else torch.zeros_like(parameter)
            optimizer.state[parameter][slot] = room.detach()


def _config(where: str, record: dict[str, Any], key: str, kind: type[Any]) -> Any:
    try:
        config = Config.from_json(record.get(key, ""))
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(f"{where}: {key}: {error}") from error
    if not isinstance(config, kind):
        check.fail(f"{where}: {key}", kind.__name__, type(config).__name__)
    return config


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Of its own parts; that a single process has no others is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _checksum(folder: Path, record: dict[str, Any]) -> str:
    """SHA-256 of the record without its checksum and of all the files that it names."""
    told = {name: value for name, value in record.items() if name != "checksum"}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    names: list[str] = sorted(record.get("files") or ())
    for name in names:
        with (folder / name).open("rb") as file:
            while piece := file.read(2**20):
                found.update(piece)
    return found.hexdigest()


class _Metadata(pickle.Unpickler):
    """Of what torch writes into a folder beside the tensors."""

    KNOWN = {  # noqa: RUF012
        "torch": ("Size",),
        "torch.serialization": ("_get_layout",),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed.checkpoint.metadata": (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "pathlib": ("PosixPath", "WindowsPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in self.KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is none of what torch writes")
        return super().find_class(module, name)


def _check_metadata(where: str, file: Path) -> None:
    """torch unpickles the file as it is, and would run what somebody has put into it."""
    try:
        with file.open("rb") as opened:
            _Metadata(opened).load()
    except Exception as error:  # of damaged bytes any
        raise ValueError(f"{where}: cannot be read: {METADATA}: {error}") from error
