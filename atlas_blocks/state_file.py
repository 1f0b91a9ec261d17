"""A state as a safetensors file: its tensors by name, its structure as JSON in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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

    header = {"format": FORMAT, "state": json.dumps(named(structure))}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(_apart(tensors), partial, header)
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
        return build(_filled(json.loads(header["state"]), tensors))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a file that State.save wrote, got {error}") from error


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
