"""What tensors hold, where there may be nothing: on the meta device and among fake tensors, whose
results are shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

R = TypeVar("R")


def there(t: Tensor) -> bool:
    """Whether the tensor holds anything."""
    return not t.is_meta and not isinstance(t, FakeTensor)


def numbers(t: Tensor) -> list[int]:
    """Of a tensor of integers [n], on the host; zeros where it holds nothing."""
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
