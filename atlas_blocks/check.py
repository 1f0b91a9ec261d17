"""Argument checks: one ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.masked import MaskedTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fail(name: str, expected: str, got: object) -> NoReturn:
    """Raise the one kind of error users see."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def choice(name: str, value: object, options: Collection[str]) -> None:
    """`value` must be one of `options`."""
    if not isinstance(value, str) or value not in options:
        fail(name, "one of " + ", ".join(sorted(options)), repr(value))


def boolean(name: str, value: object) -> None:
    """`value` must be True or False."""
    if not isinstance(value, bool):
        fail(name, "True or False", repr(value))


def at_least(name: str, value: object, minimum: int) -> None:
    """`value` must be an int (not a bool) of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        fail(name, f"an int >= {minimum}", repr(value))


def between(name: str, value: object, low: float, high: float) -> None:
    """`value` must be a number with low <= value <= high."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        fail(name, f"a number in [{low}, {high}]", repr(value))


def tensor(
    name: str,
    value: object,
    axes: str,
    sizes: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """`value` must be a tensor of shape `sizes` (None = any), spelt `axes`, with an allowed dtype.

    axes: how the shape is written for people, such as "[B, T, H, Dk]".
    """
    if not isinstance(value, Tensor):
        fail(name, f"a tensor {axes}", type(value).__name__)
    masked = isinstance(value, MaskedTensor)
    if masked or value.is_nested or value.layout != torch.strided:
        kind = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        kind = "a masked one" if masked else kind
        fail(name, f"a dense tensor {axes} (cu_seqlens packs rows of unequal length)", kind)
    shape = tuple(value.shape)
    fits = len(shape) == len(sizes) and all(
        w is None or w == g for w, g in zip(sizes, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        fail(name, f"shape {axes} = [{wanted}]", list(shape))
    if value.dtype not in dtypes:
        fail(name, "dtype " + " or ".join(str(d) for d in dtypes), value.dtype)
    if device is not None and value.device != device:
        fail(name, f"device {device}", value.device)


def whole(name: str, y: Tensor, width: int) -> Tensor:
    """y, the output of the projection `name`, which must have all of its `width`."""
    if y.shape[-1] != width:
        wanted = f"{width} outputs (a tensor-parallel plan must gather them, output_layouts="
        fail(name, f"{wanted}Replicate(), or leave this layer alone)", y.shape[-1])
    return y


def agree(name: str, expected: str, ours: Tensor, true: Tensor) -> None:
    """`ours`, computed in float64, must be `true` but for rounding."""
    if ours.shape != true.shape or not torch.allclose(ours, true, rtol=1e-6, atol=1e-8):
        fail(name, expected, "another")
