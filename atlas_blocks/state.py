"""State carried between calls: an argument and a result, never hidden in a module.

A state is an immutable record of tensors with the batch first, tuples of such tensors, other
states, tuples of states, or None. It can be detached, moved, sliced and reordered along the batch,
joined, split, and saved; torch's pytrees walk it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import dataclass_transform

from atlas_blocks import check, rows, state_file
from atlas_blocks.names import class_of, full_name, name_of

S = TypeVar("S", bound="State")


def _map(fn: Callable[..., Any], value: Any, *others: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value, *others)
    if isinstance(value, State):
        columns = zip(value._values(), *(o._values() for o in others), strict=True)
        return type(value)(*(_map(fn, *column) for column in columns))
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
    columns = [_aligned(column) for column in zip(*(v._values() for v in values), strict=True)]
    return [type(first)(*fields) for fields in zip(*columns, strict=True)]


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    parts: Any = ()
    if isinstance(value, State):
        parts = zip(value.field_names, value._values(), strict=True)
    elif isinstance(value, tuple):
        parts = enumerate(value)
    for key, part in parts:
        yield from _named(part, f"{name}.{key}" if name else str(key))


def _to(value: Any, device: torch.device | None, dtype: torch.dtype | None, exact: bool) -> Any:
    """exact: of what is never less than float32."""
    if isinstance(value, State):
        named = zip(value.field_names, value._values(), strict=True)
        return type(value)(*(_to(v, device, dtype, name in value.EXACT) for name, v in named))
    if isinstance(value, tuple):
        return tuple(_to(v, device, dtype, exact) for v in value)
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        # Positions are read on the host, where nothing waits for a device.
        return value.cpu() if device is not None and device.type == "cpu" else value
    if exact and dtype is not None:
        dtype = torch.promote_types(dtype, torch.float32)
    return value.to(device=device, dtype=dtype)


@dataclass_transform(frozen_default=True, eq_default=False)
class State:
    """Base of every state. A subclass lists its fields as annotations, as a dataclass does, and
    needs no decorator; positions are int64 tensors [B].

    What walks dataclasses to cast what it finds (Lightning Fabric's precision, FSDP2's mixed
    precision) sees none in a state and hands it on as it is: a memory keeps its float32.
    """

    field_names: ClassVar[tuple[str, ...]] = ()
    # Fields that rounding below float32 would spoil: `to` leaves them at least that.
    EXACT: ClassVar[tuple[str, ...]] = ()
    _classes: ClassVar[dict[str, type[State]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__mro__[1].__dict__.get("field_names"):
            raise TypeError(f"{cls.__name__}: a state with fields is not subclassed; hold one")
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        cls.field_names = tuple(f.name for f in dataclasses.fields(cls))
        del cls.__dataclass_fields__
        name = full_name(cls)
        State._classes[name] = cls
        pytree.register_pytree_node(
            cls,
            lambda state: (list(state._present().values()), ",".join(state._present())),
            lambda parts, names: cls(
                **dict.fromkeys(cls.field_names)
                | dict(zip(names.split(",") if names else (), parts, strict=True))
            ),
            serialized_type_name=name,
            flatten_with_keys_fn=lambda state: (
                [(pytree.GetAttrKey(name), part) for name, part in state._present().items()],
                ",".join(state._present()),
            ),
        )

    def _values(self) -> list[Any]:
        """The fields, in their order."""
        return [getattr(self, name) for name in self.field_names]

    def _present(self) -> dict[str, Any]:
        """The fields but those that are None, which is a leaf to torch's pytrees."""
        return {name: v for name in self.field_names if (v := getattr(self, name)) is not None}

    def replace(self: S, **changes: Any) -> S:
        """A copy with these fields changed. Raises TypeError for a name that is none."""
        return type(self)(**dict(zip(self.field_names, self._values(), strict=True)) | changes)

    def map(self: S, fn: Callable[[Tensor], Tensor]) -> S:
        """The same state with `fn` applied to every tensor."""
        return _map(fn, self)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in field order."""
        found: list[Tensor] = []
        self.map(lambda t: found.append(t) or t)
        return found

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor under a name such as "rule.weights.0"."""
        return dict(_named(self, ""))

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def __len__(self) -> int:
        """Rows of the batch; 0 where there is no tensor."""
        tensors = self.tensors()
        return tensors[0].shape[0] if tensors else 0

    def __bool__(self) -> bool:
        """A state of no rows is a state."""
        return True

    def __repr__(self) -> str:
        tensors = self.tensors()
        floats = sorted(
            {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
        )
        devices = sorted({str(t.device) for t in tensors})
        what = [f"batch {len(self)}", f"{len(tensors)} tensors", f"{self.nbytes:,} bytes"]
        return f"{type(self).__name__}({', '.join([*what, *floats, *devices])})"

    def detach(self: S) -> S:
        """Cut from the graph."""
        return self.map(Tensor.detach)

    def clone(self: S) -> S:
        """With contiguous memory of its own, in the graph."""
        return self.map(lambda t: t.clone(memory_format=torch.contiguous_format))

    def to(
        self: S,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> S:
        """Moved, in another dtype, or both; `to(dtype)` alone does too.

        int64 positions keep their dtype, and their device unless that is the CPU. What a memory
        holds is never less than float32.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            check.fail("dtype", "a floating dtype", dtype)
        return _to(self, None if device is None else torch.device(device), dtype, exact=False)

    def cpu(self: S) -> S:
        """All of it on the CPU."""
        return self.to("cpu")

    def __getitem__(self: S, index: Any) -> S:
        """Batch rows: a slice, row numbers as a list or tensor (repeats allowed, negative ones
        count from the end), a mask of bool [B], or one number, which keeps a batch of 1.

        Raises ValueError for any other index, and for a number outside of the batch (on a device
        other than the CPU, torch's own error).
        """
        if isinstance(index, slice):
            return self.map(lambda t: t[index])
        chosen = rows.chosen(index, len(self))
        return self.map(lambda t: t.index_select(0, chosen.to(t.device)))

    __iter__ = None  # rows are those of `split`

    def split(self: S, sizes: int | Sequence[int] = 1) -> list[S]:
        """Consecutive rows: so many each, or of these sizes. Raises ValueError where the sizes do
        not add up to the batch."""
        count = len(self)
        if isinstance(sizes, int):
            check.at_least("sizes", sizes, 1)
            sizes = [min(sizes, count - first) for first in range(0, count, sizes)]
        if sum(sizes) != count:
            check.fail("sizes", f"numbers that add up to the batch of {count}", list(sizes))
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [self[end - size : end] for size, end in zip(sizes, ends, strict=True)]

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

        fields = zip(self.field_names, self._values(), strict=True)
        return {"type": name_of(type(self)), **{name: plain(value) for name, value in fields}}

    @staticmethod
    def from_dict(data: Any) -> Any:
        """The state that `to_dict` wrote. Raises ValueError where the dict is not one."""

        def read(value: Any) -> Any:
            if isinstance(value, dict):
                return State.from_dict(value)
            return tuple(read(v) for v in value) if isinstance(value, list) else value

        if not isinstance(data, dict) or "type" not in data:
            check.fail("state", 'a dict with a "type"', type(data).__name__)
        cls = class_of(data["type"], State._classes.values(), "state type")
        if set(data) != {*cls.field_names, "type"}:
            check.fail(f"{cls.__name__}", f"the fields {sorted(cls.field_names)}", sorted(data))
        return cls(**{name: read(value) for name, value in data.items() if name != "type"})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the tensors by name, the structure in its header. The file is
        there whole or not at all."""
        state_file.save(Path(path), self.to_dict(), self.named_tensors())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Any:
        """The state in a file that `save` wrote, on the CPU. Raises ValueError where it is none."""
        return state_file.load(Path(path), State.from_dict)
