"""Arithmetic in the dtypes of its tensors, whatever autocast is on around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of `like`; nothing where a device, such as meta, has none."""
    kind = like.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    # Where it is off there is nothing to do, and a compiled graph that says so is not kept for the
    # next process. An exported one may be run inside an autocast region.
    if not torch.is_autocast_enabled(kind) and not torch.compiler.is_exporting():
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """That of autocast on the device of `like`, or None where it is off."""
    kind = like.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)
