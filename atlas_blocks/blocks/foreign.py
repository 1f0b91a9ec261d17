"""Modules of somebody's as blocks: any `y, state = f(x, state)` in a stack or a language model.

B batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.config import Config
from atlas_blocks.names import full_name
from atlas_blocks.state import State


class Builds(Protocol):
    """A config that makes a module: of (x [B, T, dim], state or None) -> y [B, T, dim], state."""

    def build(self, dim: int, heads: int) -> nn.Module: ...


class ForeignState(State):
    """value: what the module returned: a State, a tensor with the batch first, or a tuple of
    them."""

    value: Any

    @classmethod
    def aligned(cls, states: Sequence[ForeignState]) -> Sequence[ForeignState]:
        """Tensors that grow with the text cannot be joined: where they begin is not known."""
        first, *rest = ([tuple(t.shape[1:]) for t in _tensors(s.value)] for s in states)
        for other in rest:
            if other != first:
                wanted = (
                    "tensors of one size after any text, or a State with an `aligned` of its own"
                )
                check.fail("state", wanted, f"{first} and {other}")
        return states


class ForeignBlock(Block):
    """A module of somebody's, `y, state = module(x, state)`, state None at the start.

    The module is asked for `cu_seqlens` [N + 1], on the device of x, where its forward takes it;
    where not, packed documents run apart, those of one length in one call.
    x [B, T, dim] -> y [B, T, dim]; ForeignState, or None where the module returns none.
    """

    state_type = ForeignState

    def __init__(self, dim: int, module: nn.Module, config: Config) -> None:
        super().__init__()
        self.dim, self.config, self.module = dim, config, module
        takes = inspect.signature(module.forward)
        try:
            takes.bind(None, None)
        except TypeError:
            wanted = f"a module whose forward takes (x, state) of {type(config).__name__}.build"
            check.fail("module", wanted, f"{type(module).__name__}.forward{takes}")
        self.takes_documents = "cu_seqlens" in takes.parameters

    def mix(
        self, x: Tensor, state: ForeignState | None, documents: Documents | None = None
    ) -> tuple[Tensor, ForeignState | None]:
        options = {} if documents is None else {"cu_seqlens": documents.bounds}
        found = self.module(x, None if state is None else state.value, **options)
        name = type(self.module).__name__
        if not isinstance(found, tuple) or len(found) != 2:
            check.fail(name, "y, state as its result", type(found).__name__)
        y, after = found
        check.tensor(f"y of {name}", y, "[B, T, dim]", tuple(x.shape))
        rows = len(x) if documents is None else documents.count
        for tensor in _tensors(after, name):
            if tensor.ndim == 0 or len(tensor) != rows:
                check.fail(f"state of {name}", f"a batch of {rows}, first", list(tensor.shape))
        return y, None if after is None else ForeignState(_own(after))

    def mix_packed(
        self, x: Tensor, state: ForeignState | None, documents: Documents
    ) -> tuple[Tensor, ForeignState | None]:
        if self.takes_documents:
            return self.mix(x, state, documents)
        return super().mix_packed(x, state, documents)


def _tensors(value: Any, name: str = "") -> Iterator[Tensor]:
    """Those of a state that lie in no State; ValueError for what is no state of a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part, name)
    elif not (value is None or isinstance(value, State)):
        wanted = "a State, a tensor, a tuple of them, or None"
        check.fail(f"state of {name}", wanted, type(value).__name__)


def _own(value: Any) -> Any:
    """Its tensors with memory of their own, as those of a State have; a slice would keep a whole
    call's alive."""
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    return tuple(map(_own, value)) if isinstance(value, tuple) else value


def is_foreign(config: object) -> bool:
    """Whether it is a config of somebody's own that builds a module."""
    own = full_name(type(config)).startswith("atlas_blocks.")
    return isinstance(config, Config) and not own and callable(getattr(config, "build", None))


def built(config: Builds, dim: int, heads: int) -> Block:
    """The block of a config. Raises ValueError where it builds no module."""
    module = config.build(dim, heads)
    if isinstance(module, Block):
        return module
    assert isinstance(config, Config)
    if not isinstance(module, nn.Module):
        name = f"{type(config).__name__}.build"
        check.fail(name, "a torch.nn.Module", type(module).__name__)
    return ForeignBlock(dim, module, config)
