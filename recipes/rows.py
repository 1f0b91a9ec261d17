"""Sequences that go on together, a token each at a step; they join, fork and leave at any step.

On a CPU a row's numbers are the same, to the last bit, whoever is beside it, if torch computes with
one thread and the state does not grow with the text (tests/recipes/serving/test_engine.py):

* matrix products of a multiple of TILE rows treat every row alike, those of fewer do not: the batch
  is filled up with copies of a row; where a processor's library treats them otherwise in batches
  of another size (MKL's with AVX-512, from a width of 128 on), products are taken TILE rows at a
  time;
* attention takes another way, which rounds otherwise, where all rows stand at one position: the
  copies stand one further, and there is one at least where all others are at one;
* the memory's step is the provider "one_token"'s, which takes rows at different places of their
  chunks in one batch, where the definition takes those of each place apart.

B rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atlas_blocks import State, use_provider
from atlas_blocks.blocks.attention import AttentionState
from atlas_blocks.blocks.memory_as_context import ContextState
from atlas_blocks.kernel_attention.definition import KernelState
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState

TILE = 4
ATTENTIONS = (AttentionState, KernelState, ContextState)
KEYS = ".keys"


class Rows:
    """The rows in the order in which they joined, those that left taken out."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self._count = model, 0
        # With the rows that fill it up.
        self._state: LanguageModelState | None = None
        # Names of its parts that keep every key.
        self._growing: set[str] = set()
        self._tiled: dict[int, set[torch.Size]] = {}  # see `tiled_shapes`, by the batch's size

    def __len__(self) -> int:
        return self._count

    def join(self, states: Sequence[LanguageModelState]) -> None:
        """Rows of these states come after those that are there."""
        if states:
            there = [] if self._state is None else [self._state[: self._count]]
            joined = State.cat([*there, *states])
            self._set(joined, list(range(len(joined))))

    def keep(self, rows: Sequence[int]) -> None:
        """All but these rows leave."""
        if self._state is not None and list(rows) != list(range(self._count)):
            self._set(self._state, list(rows))

    def _set(self, state: LanguageModelState, rows: list[int]) -> None:
        self._count = len(rows)
        if not rows:
            self._state = None
            return
        state = _cut(state[rows], self._growing)
        missing = -len(rows) % TILE
        positions: list[Tensor] = []
        _map_positions(lambda t: positions.append(t) or t, state)
        if any(bool((t == t[0]).all()) for t in positions):
            missing = missing or TILE
        if missing:
            copies = _map_positions(lambda t: t + 1, state[missing * [0]])
            state = State.cat([state, copies])
        self._state = state

    def state(self, row: int) -> LanguageModelState:
        """Of one row, a copy."""
        assert self._state is not None
        return self._state[[row]]

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """Every row reads its token: logits [B, V] of what comes next."""
        assert self._state is not None
        device = next(self.model.parameters()).device
        # A copy reads what the row does that it was copied from.
        filled = [*tokens, *tokens[:1] * (len(self._state) - self._count)]
        column = torch.tensor(filled, device=device)[:, None]
        before = self._state.named_tensors()
        with one_token_at_a_time(device), self._products(len(filled), device):
            logits, after = self.model(column, self._state)
        self._state = after
        for name, t in after.named_tensors().items():
            if name.endswith(KEYS) and t.shape[1] > before[name].shape[1]:
                self._growing.add(name.removesuffix(KEYS))
        return logits[: self._count, -1]

    def _products(self, size: int, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Those of a batch of this size, every row's as in a batch of TILE."""
        if device.type != "cpu":
            return contextlib.nullcontext()
        if size not in self._tiled:
            self._tiled[size] = tiled_shapes(self.model, size)
        found = self._tiled[size]
        return TiledProducts(found) if found else contextlib.nullcontext()


def tiled_shapes(model: nn.Module, size: int) -> set[torch.Size]:
    """Shapes of a model's matrices whose products with so many rows are not, to the last bit, those
    with TILE of them at a time."""
    # Of quantised ones and the like torch's products are not the ones that are taken.
    plain = [p for p in model.parameters() if p.ndim == 2 and type(p) is nn.Parameter]
    kinds = {(p.shape, p.dtype) for p in plain if p.is_floating_point()}
    return {shape for shape, dtype in kinds if differ(shape, dtype, size)}


@functools.cache
def differ(shape: torch.Size, dtype: torch.dtype, size: int) -> bool:
    """Whether they do, for random numbers: a model's own matrix may be zero."""
    draw = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(n, shape[1], generator=draw).to(dtype) for n in (shape[0], size))
    parts = [F.linear(x, weight) for x in rows.split(TILE)]
    return not torch.equal(F.linear(rows, weight), torch.cat(parts))


class TiledProducts(TorchFunctionMode):
    """Within, products x W^T with matrices of these shapes are taken TILE of a batch at a time."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shape = None
        if func is F.linear and len(args) > 1:
            shape = args[1].shape
        elif func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
            shape = args[1].shape[::-1]
        if shape not in self.shapes:
            return func(*args, **kwargs)
        return torch.cat([func(part, *args[1:], **kwargs) for part in args[0].split(TILE)])


def _cut(state: LanguageModelState, growing: Iterable[str]) -> LanguageModelState:
    """Without keys that stand before the first token of the longest row: each row is as long as
    the longest, and one that was longer may have left."""
    named = state.named_tensors()
    sizes = {part: named[part + KEYS].shape[1] for part in growing}
    longest = {part: int(named[part + ".position"].max()) for part in growing}
    names = iter(named)

    def shorter(t: Tensor) -> Tensor:
        name = next(names)
        part = next((p for p in sizes if name.startswith(p + ".")), None)
        if part is None or t.ndim < 2 or t.shape[1] != sizes[part]:
            return t
        return t[:, max(0, sizes[part] - longest[part]) :].clone()

    return state.map(shorter) if sizes else state


def _map_positions(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A state with `fn` applied to the position of every attention in it, int64 [B]. A memory's
    agrees with what else it holds, and somebody's own state may too."""
    if isinstance(value, tuple):
        return tuple(_map_positions(fn, part) for part in value)
    if not isinstance(value, State):
        return value
    fields = {name: getattr(value, name) for name in value.field_names}
    moved = {name: _map_positions(fn, part) for name, part in fields.items()}
    if isinstance(value, ATTENTIONS):
        moved["position"] = fn(value.position)
    return value.replace(**moved)


def one_token_at_a_time(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For a token of rows that stand at different places of their chunks."""
    # On a GPU the kernels take rows at any place.
    return use_provider("one_token") if device.type == "cpu" else contextlib.nullcontext()
