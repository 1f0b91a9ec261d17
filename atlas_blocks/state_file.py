"""A state as a safetensors file: its tensors by name, its structure as JSON in the header, beside
a checksum of both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "atlas_blocks.state"


def save(path: Path, structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors and the nested dict that holds them, at once or not at all."""
    # Imported here: composing blocks needs no file format.
    from safetensors.torch import save_file

    names = {id(t): name for name, t in tensors.items()}

    def named(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": names[id(value)]}
        if isinstance(value, Mapping):
            return {key: named(v) for key, v in value.items()}
        return [named(v) for v in value] if isinstance(value, list) else value

    apart, text = _apart(tensors), json.dumps(named(structure))
    header = {"format": FORMAT, "state": text, "checksum": _checksum(text, apart)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(apart, partial, header)
        # On the disk before it has its name: a power cut must not leave the name to nothing.
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path, build: Callable[[dict[str, Any]], Any]) -> Any:
    """What `build` makes of the nested dict with its tensors. Raises ValueError where the file is
    not one of `save`."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # the usual OSError for what is not there
        pass
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"format {header.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["checksum"] != _checksum(header["state"], tensors):
            raise ValueError("one whose checksum is another: it is damaged")
        return build(_filled(json.loads(header["state"]), tensors))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a file that State.save wrote, got {error}") from error


def _checksum(structure: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the structure and of all tensors, contiguous on the CPU."""
    found = hashlib.sha256(structure.encode())
    for name, t in sorted(tensors.items()):
        found.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        found.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _filled(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _filled(v, tensors) for key, v in value.items()}
    return [_filled(v, tensors) for v in value] if isinstance(value, list) else value


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous and on the CPU, with copies of what shares memory, as the format asks."""
    seen: set[int] = set()
    found = {}
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        storage = t.untyped_storage()._cdata
        if storage in seen:
            t = t.clone()
        seen.add(storage)
        found[name] = t
    return found
