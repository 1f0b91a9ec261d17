"""A function of tensors as a pair of ops whose backward computes it again, or has it kept.

For functions that need no provider, and whose loops tracing would unroll.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.autocast import no_autocast
from atlas_blocks.derivatives import once_differentiable
from atlas_blocks.graph import saved_graphs
from atlas_blocks.graph.contract import LIBRARY, distinct, implement, own, own_empty, recording

Run = Callable[..., Sequence[Tensor]]


def define_pair(
    name: str, settings: str, run: Run, fake: Run, differentiate: Run | None = None
) -> Callable[..., list[Tensor]]:
    """`atlas::{name}` and `atlas::{name}_backward`, and a differentiable call of them.

    run, fake: (tensors, *settings) -> tensors. settings: their types and names, as in a schema.
    differentiate: (grads, tensors, results, *settings) -> gradients of the floating tensors, for a
    function that can start from its results; None computes all of it again and saves none of them.
    The backward of a short call on a CPU computes nothing again (graph/saved_graphs.py).
    Tensors that are not floating, such as positions, have no gradient.
    """
    rest = f", {settings}" if settings else ""
    # wanted: of which tensors a backward will want the gradient; it takes the results and the key
    # of what is kept, the last result. Empty: there is no backward, and no key.
    LIBRARY.define(f"{name}(Tensor[] tensors{rest}, bool[] wanted) -> Tensor[]")
    # grads: of the floating results. -> those of the tensors that are wanted.
    LIBRARY.define(
        f"{name}_backward(Tensor[] grads, Tensor[] tensors, Tensor[] results, Tensor key{rest},"
        " bool[] wanted) -> Tensor[]"
    )

    def forward(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
        *settings, wanted = rest
        with no_autocast(tensors[0]):
            if wanted and saved_graphs.serves(tensors[0]):
                results, key = saved_graphs.keep(
                    lambda leaves: run(leaves, *settings), tensors, wanted
                )
                return [*results, key]
            with torch.no_grad():
                results = [own(t) for t in run([t.detach() for t in tensors], *settings)]
        return [*results, saved_graphs.no_key(tensors[0])] if wanted else results

    def forward_fake(tensors: list[Tensor], *rest: Any) -> list[Tensor]:
        *settings, wanted = rest
        results = list(fake(tensors, *settings))
        return [*results, saved_graphs.no_key(tensors[0])] if wanted else results

    def backward(
        grads: list[Tensor], tensors: list[Tensor], results: list[Tensor], key: Tensor, *rest: Any
    ) -> list[Tensor]:
        *settings, wanted = rest
        with no_autocast(tensors[0]), recording(), torch.enable_grad():
            found = saved_graphs.gradients(key, grads)
            if found is None and differentiate is not None:
                found = differentiate(grads, tensors, results, *settings)
                found = saved_graphs.those_wanted(found, tensors, wanted)
            elif found is None:
                leaves = saved_graphs.leaves(tensors, wanted)
                found = saved_graphs.differentiate(run(leaves, *settings), leaves, grads)
        return [own(g) for g in found]

    def backward_fake(
        grads: list[Tensor], tensors: list[Tensor], results: list[Tensor], key: Tensor, *rest: Any
    ) -> list[Tensor]:
        return [own_empty(t) for t, one in zip(tensors, rest[-1], strict=True) if one]

    implement(name, forward, forward_fake)
    implement(f"{name}_backward", backward, backward_fake)

    def call(tensors: list[Tensor], *settings: Any) -> list[Tensor]:
        wanted = [t.requires_grad for t in tensors]
        if torch.is_grad_enabled() and any(wanted):
            saves = differentiate is not None
            return list(_Recomputed.apply(name, settings, wanted, saves, *distinct(tensors)))
        return getattr(torch.ops.atlas, name).default(tensors, *settings, [])

    return call


class _Recomputed(torch.autograd.Function):
    """Both directions are ops."""

    @staticmethod
    def forward(
        ctx: Any, name: str, settings: tuple, wanted: list[bool], saves: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        op = getattr(torch.ops.atlas, name).default
        *outputs, key = op(list(tensors), *settings, wanted)
        ctx.name, ctx.settings, ctx.wanted = name, settings, wanted
        ctx.save_for_backward(*tensors, *(outputs if saves else ()), key)
        ctx.floating = [t.is_floating_point() for t in outputs]
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, key = ctx.saved_tensors
        tensors, results = saved[: len(ctx.wanted)], saved[len(ctx.wanted) :]
        of_results = [g for g, floating in zip(grads, ctx.floating, strict=True) if floating]
        op = getattr(torch.ops.atlas, f"{ctx.name}_backward").default
        found = iter(op(of_results, tensors, results, key, *ctx.settings, ctx.wanted))
        return None, None, None, None, *(next(found) if one else None for one in ctx.wanted)
