"""State carried between calls: an argument and a result, never hidden in a module.

A state is a frozen dataclass whose fields are tensors with the batch first, tuples of such
tensors, other states, tuples of states, or None. It can be detached, moved, sliced and reordered
along the batch, concatenated, and turned into a dict of plain types and tensors for torch.save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from atlas_blocks import check

S = TypeVar("S", bound="State")


def _map(fn: Callable[..., Any], value: Any, *others: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value, *others)
    if isinstance(value, State):
        fields = {
            f.name: _map(fn, getattr(value, f.name), *(getattr(o, f.name) for o in others))
            for f in dataclasses.fields(value)
        }
        return type(value)(**fields)
    if isinstance(value, tuple):
        return tuple(_map(fn, *items) for items in zip(value, *others, strict=True))
    return value


def _aligned(values: Sequence[Any]) -> Sequence[Any]:
    """Corresponding values of several states, every group of states in them aligned."""
    first = values[0]
    if isinstance(first, tuple):
        columns = [_aligned(column) for column in zip(*values, strict=True)]
        return list(zip(*columns, strict=True)) if columns else values
    if not isinstance(first, State):
        return values
    values = type(first).aligned(values)
    columns = [_aligned([getattr(v, f.name) for v in values]) for f in dataclasses.fields(first)]
    return [type(first)(*fields) for fields in zip(*columns, strict=True)]


@dataclasses.dataclass(frozen=True)
class State:
    """Base of every state. Positions are int64 tensors [B]; `to` moves everything but them."""

    _classes: ClassVar[dict[str, type[State]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        State._classes[cls.__name__] = cls

    def map(self: S, fn: Callable[[Tensor], Tensor]) -> S:
        """The same state with `fn` applied to every tensor."""
        return _map(fn, self)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in field order."""
        found: list[Tensor] = []
        self.map(lambda t: found.append(t) or t)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def detach(self: S) -> S:
        """Cut from the graph."""
        return self.map(Tensor.detach)

    def to(self: S, device: torch.device | str) -> S:
        """Moved to `device`; int64 positions stay where they are."""
        return self.map(lambda t: t.to(device) if t.is_floating_point() else t)

    def __getitem__(self: S, index: slice | Sequence[int] | Tensor) -> S:
        """Batch rows chosen by a slice or by a list or tensor of row numbers (repeats allowed)."""
        if isinstance(index, slice):
            return self.map(lambda t: t[index])
        rows = torch.as_tensor(index, dtype=torch.int64)
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    @staticmethod
    def cat(states: Sequence[S]) -> S:
        """States of the same block joined along the batch."""
        if len(states) == 0:
            check.fail("states", "at least one state", "none")
        first, *rest = _aligned(states)
        return _map(lambda *ts: torch.cat(ts), first, *rest)

    @classmethod
    def aligned(cls: type[S], states: Sequence[S]) -> Sequence[S]:
        """The states brought to one size, where a state grows with its sequence. Used by `cat`."""
        return states

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and plain types, safe for torch.save and weights_only loading."""

        def plain(value: Any) -> Any:
            if isinstance(value, State):
                return value.to_dict()
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"type": type(self).__name__, **fields}

    @staticmethod
    def from_dict(data: Any) -> Any:
        """The state that `to_dict` wrote. Raises ValueError where the dict is not one."""

        def read(value: Any) -> Any:
            if isinstance(value, dict):
                return State.from_dict(value)
            return tuple(read(v) for v in value) if isinstance(value, list) else value

        if not isinstance(data, dict) or "type" not in data:
            check.fail("state", 'a dict with a "type"', type(data).__name__)
        check.choice("state type", data["type"], State._classes)
        cls = State._classes[data["type"]]
        names = {f.name for f in dataclasses.fields(cls)}
        if set(data) != names | {"type"}:
            check.fail(f"{cls.__name__}", f"the fields {sorted(names)}", sorted(data))
        return cls(**{name: read(value) for name, value in data.items() if name != "type"})
