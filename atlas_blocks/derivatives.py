"""Where an autograd.Function meets other derivatives than the first: torch.func, forward mode,
a second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, eagerly: a Function takes
    neither, the plain operations that it stands for take both."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a Function's backward that has no derivative itself.

    With torch's decorator of that name torch.autograd.grad of a gradient leaves this part out and
    says nothing, as no path leads through it. Here it raises NotImplementedError.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        saved = ctx.saved_tensors  # a checkpoint hands them out once
        with torch.no_grad():
            found = backward(SimpleNamespace(**vars(ctx), saved_tensors=saved), *grads)
        place = [i for i, g in enumerate(found) if isinstance(g, Tensor)]
        inputs = [t for t in (*grads, *saved) if isinstance(t, Tensor) and t.requires_grad]
        name = backward.__qualname__.split(".")[0].strip("_")
        results = _First.apply(name, len(place), *(found[i] for i in place), *inputs)
        found = list(found)
        for i, g in zip(place, results, strict=True):
            found[i] = g
        return tuple(found)

    return run


class _First(torch.autograd.Function):
    """The first `count` tensors, which depend on all of them in a way that cannot be told."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.name}: no second derivative of what a provider computes; the definition has one "
            '(use_provider("definition"), not compiled)'
        )
