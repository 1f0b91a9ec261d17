"""What data parallelism does not see: that a gradient may come into a block through its state
alone (FSDP2), and that a batch of no tokens has gradients, of zero (DDP)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from atlas_blocks.state import State

S = TypeVar("S", bound=State)


def distributed() -> bool:
    """Whether parameters may be sharded, in eager mode: a compiled graph is one node anyway, and
    torch.func goes with no FSDP."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def together(block: nn.Module, y: Tensor, state: S) -> tuple[Tensor, S]:
    """y and the state behind one node: what hooks y (FSDP2, which walks no State) and brings the
    parameters back before a gradient comes, does so for one of the state too.

    The gradient raises RuntimeError where the parameters are not there all the same, as when a
    module around the block is the unit.
    """
    tensors = [t for t in state.tensors() if t.requires_grad]
    if not (y.requires_grad and tensors and torch.is_grad_enabled()):
        return y, state
    y, *found = _Together.apply([*_parameters(block)], y, *tensors)
    parts = iter(found)
    return y, state.map(lambda t: next(parts) if t.requires_grad else t)


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """Those inside, but of parts that are units by themselves."""
    yield from module.parameters(recurse=False)
    for part in module.children():
        if not hasattr(part, "unshard"):
            yield from _parameters(part)


class _Together(torch.autograd.Function):
    """The tensors themselves; no copies, and no views either."""

    @staticmethod
    def forward(ctx: Any, parameters: Sequence[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parameters = parameters
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if any(p.numel() and not p.untyped_storage().nbytes() for p in ctx.parameters):
            raise RuntimeError(
                "state: its gradient came to a block whose parameters FSDP2 has sharded again: "
                "make the block a unit (fully_shard(block)), or detach the state"
            )
        return None, *grads


def of_parameters(block: nn.Module, y: Tensor) -> Tensor:
    """An empty y, of which all parameters have a gradient of zero, as of torch's Linear."""
    for p in _parameters(block):
        if p.requires_grad:
            here: Any = p.to_local() if hasattr(p, "to_local") else p  # type: ignore[operator]
            y = y + here.flatten()[:0].sum()
    return y
