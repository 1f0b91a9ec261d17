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
    return torch.autocast(kind, enabled=False)


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """That of autocast on the device of `like`, or None where it is off."""
    kind = like.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)
