"""What tensors hold, where there may be nothing: on the meta device and among fake tensors, whose
results are shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_get_bdim
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from atlas_blocks import check

R = TypeVar("R")


def there(t: Tensor) -> bool:
    """Whether the tensor holds anything that can be read; one inside of torch.func does not."""
    return not (t.is_meta or isinstance(t, FakeTensor) or _wrapped(t))


def _wrapped(t: Tensor) -> bool:
    return not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(t)


def numbers(t: Tensor) -> list[int]:
    """Of a tensor of integers [n], on the host; zeros where it holds nothing.

    Under vmap those of every row. Raises ValueError where they differ from row to row.
    """
    if _wrapped(t):
        inside, axis = get_unwrapped(t), maybe_get_bdim(t)
        rows = [numbers(row) for row in (inside.unbind(axis) if axis >= 0 else [inside])]
        if any(row != rows[0] for row in rows):
            check.fail("state.position", "one position for all rows of a vmap", rows)
        return rows[0]
    return t.tolist() if there(t) else [0] * t.numel()


def remembered(fn: Callable[..., R]) -> Callable[..., R]:
    """`fn`, of hashable arguments, called once for each; what it makes among fake tensors, under
    another mode or inside of torch.func is not kept, for it may be no data, or of no use outside.
    """
    outside = torch.inference_mode(False)(fn)
    kept = functools.lru_cache(maxsize=256)(outside)

    @functools.wraps(fn)
    def call(*arguments: object) -> R:
        if (
            torch.compiler.is_compiling()
            or _get_current_dispatch_mode() is not None
            or torch._C._are_functorch_transforms_active()
        ):
            return outside(*arguments)
        return kept(*arguments)

    return call
