"""Named states on disk: what has been read once is gone on from, in any process.

A session is one safetensors file, there whole or not at all.
"""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atlas_blocks import State, check
from atlas_blocks.recipes import files
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
SUFFIX = ".safetensors"
NONE = -1


class InUse(ValueError):
    """Another request is at the session."""


class Session(State):
    """unread: int64 [1], the last token, which the state has not read, or NONE. tokens: int64 [1],
    all of the session. model: uint8 [1, 32], whose state it is."""

    state: LanguageModelState
    unread: Tensor
    tokens: Tensor
    model: Tensor


def fingerprint(model: LanguageModel) -> Tensor:
    """uint8 [1, 32] that tells a model from others: of its config and weights."""
    found = hashlib.sha256(model.config.to_json().encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype}".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.from_numpy(np.frombuffer(found.digest(), np.uint8).copy())[None]


class Sessions:
    """Those of a model in a folder."""

    def __init__(self, folder: Path, model: LanguageModel) -> None:
        """Raises ValueError where nothing can be written there."""
        files.check_folder("sessions", folder)
        self.folder, self.model = folder, fingerprint(model)
        self.device = next(model.parameters()).device
        self._used: set[str] = set()
        self._lock = threading.Lock()

    def take(self, name: str) -> None:
        """Have the session to oneself until `release`. Raises ValueError for a bad name, InUse."""
        self._path(name)
        with self._lock:
            if name in self._used:
                raise InUse(f"session: {name!r} is in use by another request")
            self._used.add(name)

    def release(self, name: str) -> None:
        with self._lock:
            self._used.discard(name)

    def load(self, name: str) -> Session | None:
        """The session, or None where there is none. Raises ValueError for what cannot be used."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            found: Any = State.load(path)
        except ValueError as error:
            raise ValueError(f"session: {error}") from error
        if not isinstance(found, Session):
            check.fail("session", "a file that this server wrote", path.name)
        if not torch.equal(found.model, self.model):
            check.fail("session", "a state of the model that is served", f"another's in {name!r}")
        return found.replace(state=found.state.to(self.device))

    def save(self, name: str, state: LanguageModelState, unread: int | None, tokens: int) -> None:
        """In one atomic replacement. Raises OSError where it cannot be written."""
        last = torch.tensor([NONE if unread is None else unread])
        Session(state, last, torch.tensor([tokens]), self.model).save(self._path(name))

    def delete(self, name: str) -> bool:
        """Whether there was one. Raises InUse."""
        self.take(name)
        try:
            there = self._path(name).is_file()
            self._path(name).unlink(missing_ok=True)
            return there
        finally:
            self.release(name)

    def names(self) -> list[str]:
        """All of them."""
        return sorted(f.name.removesuffix(SUFFIX) for f in self.folder.glob(f"*{SUFFIX}"))

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            check.fail("session", "up to 100 letters, digits, _, . and -", repr(name))
        return self.folder / f"{name}{SUFFIX}"
