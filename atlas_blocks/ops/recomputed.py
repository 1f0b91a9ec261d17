"""A function of tensors as a pair of ops whose backward computes it again.

For functions that need no provider, and whose loops tracing would unroll.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atlas_blocks.ops.contract import LIBRARY, distinct, implement, own, own_empty, recording

Run = Callable[..., Sequence[Tensor]]


def define(
    name: str, settings: str, run: Run, fake: Run, differentiate: Run | None = None
) -> Callable[..., list[Tensor]]:
    """`atlas::{name}` and `atlas::{name}_backward`, and a differentiable call of them.

    run, fake: (tensors, *settings) -> tensors. settings: their types and names, as in a schema.
    differentiate: (grads, tensors, results, *settings) -> gradients, for a function that can start
    from its results; None computes all of it again under autograd and saves none of them.
    Tensors that are not floating, such as positions, have no gradient.
    """
    rest = f", {settings}" if settings else ""
    LIBRARY.define(f"{name}(Tensor[] tensors{rest}) -> Tensor[]")
    # grads: of the floating results. -> those of the floating tensors.
    LIBRARY.define(
        f"{name}_backward(Tensor[] grads, Tensor[] tensors, Tensor[] results{rest}) -> Tensor[]"
    )

    def forward(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
        with torch.no_grad(), _no_autocast(tensors):
            return [own(t) for t in run(tensors, *rest)]

    def run_again(
        grads: list[Tensor], tensors: list[Tensor], results: list[Tensor], *rest: Any
    ) -> Sequence[Tensor]:
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        outputs = [t for t in run(leaves, *rest) if t.is_floating_point()]
        wanted = [t for t in leaves if t.requires_grad]
        return torch.autograd.grad(
            outputs, wanted, grads, allow_unused=True, materialize_grads=True
        )

    def backward(
        grads: list[Tensor], tensors: list[Tensor], results: list[Tensor], *rest: Any
    ) -> list[Tensor]:
        with _no_autocast(tensors), recording(), torch.enable_grad():
            found = (differentiate or run_again)(grads, tensors, results, *rest)
        return [own(g) for g in found]

    def backward_fake(
        grads: list[Tensor], tensors: list[Tensor], results: list[Tensor], *rest: Any
    ) -> list[Tensor]:
        return [own_empty(t) for t in tensors if t.is_floating_point()]

    implement(name, forward, fake)
    implement(f"{name}_backward", backward, backward_fake)

    def call(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            saves = differentiate is not None
            return list(_Recomputed.apply(name, rest, saves, *distinct(tensors)))
        return getattr(torch.ops.atlas, name).default(tensors, *rest)

    return call


def _no_autocast(tensors: Sequence[Tensor]) -> torch.autocast:
    return torch.autocast(tensors[0].device.type, enabled=False)


class _Recomputed(torch.autograd.Function):
    """Both directions are ops."""

    @staticmethod
    def forward(
        ctx: Any, name: str, rest: tuple, saves: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = getattr(torch.ops.atlas, name).default(list(tensors), *rest)
        ctx.name, ctx.rest, ctx.inputs = name, rest, len(tensors)
        ctx.save_for_backward(*tensors, *(outputs if saves else ()))
        ctx.floating = [t.is_floating_point() for t in outputs]
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, results = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        wanted = [g for g, floating in zip(grads, ctx.floating, strict=True) if floating]
        op = getattr(torch.ops.atlas, f"{ctx.name}_backward").default
        found = iter(op(wanted, list(tensors), list(results), *ctx.rest))
        return None, None, None, *(next(found) if t.is_floating_point() else None for t in tensors)
