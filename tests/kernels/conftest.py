"""Kernels must write what they return."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from atlas_blocks.graph import saved_graphs


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN, not the zeros of a fresh page."""

    def filled(make: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-(2**30))

        return empty

    # `with torch.device(...)` keeps the set of functions that it changes: the true ones.
    _device_constructors()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, also where Triton is interpreted on a CPU."""
    monkeypatch.setattr(saved_graphs, "LARGEST", -1)
