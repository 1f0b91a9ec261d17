"""State carried between calls: an argument and a result, never hidden in a module.

A state is an immutable record of tensors with the batch first, tuples of such tensors, other
states, tuples of states, or None. It can be detached, moved, sliced and reordered along the batch,
joined, split, and saved; torch's pytrees walk it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

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


def _named(value: Any, name: str = "", exact: bool = False) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor under its name, and whether it is of an EXACT field."""
    if isinstance(value, Tensor):
        yield name, value, exact
    elif isinstance(value, State):
        for key, part in zip(value.field_names, value._values(), strict=True):
            yield from _named(part, f"{name}.{key}" if name else key, key in value.EXACT)
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _named(part, f"{name}.{i}", exact)


def _map_exact(fn: Callable[[Tensor, bool], Tensor], value: Any, exact: bool = False) -> Any:
    """`map` where `fn` also learns whether the tensor is of an EXACT field."""
    if isinstance(value, Tensor):
        return fn(value, exact)
    if isinstance(value, State):
        named = zip(value.field_names, value._values(), strict=True)
        return type(value)(*(_map_exact(fn, v, name in value.EXACT) for name, v in named))
    if isinstance(value, tuple):
        return tuple(_map_exact(fn, v, exact) for v in value)
    return value


def _inferred(*tensors: Tensor) -> bool:
    """Whether one was made under inference_mode."""
    return any(t.is_inference() for t in tensors)


def _copied(state: S) -> S:
    return state.clone()


# Dynamo, which cannot trace the one, calls it, and leaves the graph for the other: the marks that
# torch.compiler sets, whose functions import all of Dynamo.
_inferred._dynamo_marked_constant = True  # type: ignore[attr-defined]
_copied._torchdynamo_disable = True  # type: ignore[attr-defined]
_copied._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "state: it was made under inference_mode; state.clone() goes on in one graph"
)


def _spelt(name: str) -> str:
    """ "rule.weights.0" as people write it."""
    return "state." + re.sub(r"\.(\d+)", r"[\1]", name)


@functools.cache
def _kinds(cls: type[State]) -> dict[str, Any]:
    """The annotations of the fields; {} where a name in them cannot be found."""
    try:
        found = typing.get_type_hints(cls)
    except NameError:
        return {}
    return {name: found[name] for name in cls.field_names}


def _is(value: Any, kind: Any) -> bool:
    """Whether a field's value is what its annotation says, as far as states are made of it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is tuple:
        each = isinstance(value, tuple) and len(parts) == 2 and parts[1] is Ellipsis
        return all(_is(v, parts[0]) for v in value) if each else isinstance(value, tuple)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _called(kind: Any) -> str:
    """An annotation for people."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_called(part) for part in parts)
    if origin is tuple:
        return f"a tuple of {_called(parts[0])}"
    name = getattr(kind, "__name__", str(kind))
    return {"Tensor": "a tensor", "NoneType": "None"}.get(name, name)


def _check(value: Any, batch: int, name: str = "", exact: bool = False) -> None:
    """Raise ValueError for the first part that is of another kind, dtype or batch than it must."""
    if isinstance(value, State):
        kinds = _kinds(type(value))
        for key, part in zip(value.field_names, value._values(), strict=True):
            path = f"{name}.{key}" if name else key
            if key in kinds and not _is(part, kinds[key]):
                check.fail(_spelt(path), _called(kinds[key]), type(part).__name__)
            _check(part, batch, path, key in value.EXACT)
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            _check(part, batch, f"{name}.{i}", exact)
    elif isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != batch:
            check.fail(_spelt(name), f"a batch of {batch} as its first axis", list(value.shape))
        if exact and not value.is_floating_point():
            check.fail(_spelt(name), "a floating dtype", value.dtype)


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
        made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        cls.field_names = tuple(f.name for f in dataclasses.fields(made))
        del made.__dataclass_fields__
        name = full_name(cls)
        State._classes[name] = cls

        def flat(state: Any) -> tuple[list[Any], str]:
            # Without what is None, which is a leaf to torch.
            there = state._present()
            return list(there.values()), ",".join(there)

        def whole(parts: Any, names: Any) -> Any:
            found = dict(zip(names.split(",") if names else (), parts, strict=True))
            return cls(**dict.fromkeys(cls.field_names) | found)

        def keyed(state: Any) -> tuple[list[tuple[Any, Any]], str]:
            parts, names = flat(state)
            keys = map(pytree.GetAttrKey, state._present())
            return list(zip(keys, parts, strict=True)), names

        pytree.register_pytree_node(
            cls, flat, whole, serialized_type_name=name, flatten_with_keys_fn=keyed
        )

    def _values(self) -> list[Any]:
        """The fields, in their order."""
        return [getattr(self, name) for name in self.field_names]

    def _present(self) -> dict[str, Any]:
        """The fields that are not None."""
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
        return {name: t for name, t, _ in _named(self)}

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def __len__(self) -> int:
        """Rows of the batch; 0 where there is no tensor."""
        tensors = self.tensors()
        return tensors[0].shape[0] if tensors else 0

    def __bool__(self) -> Literal[True]:
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
        place = None if device is None else torch.device(device)
        least = None if dtype is None else torch.promote_types(dtype, torch.float32)

        def moved(t: Tensor, exact: bool) -> Tensor:
            if t.is_floating_point():
                return t.to(device=place, dtype=least if exact else dtype)
            # Positions are read on the host, where nothing waits for a device.
            return t.cpu() if place is not None and place.type == "cpu" else t

        return _map_exact(moved, self)

    def check(self) -> None:
        """Raise ValueError for the first field that is not what its annotation says, of another
        batch than the rest, or EXACT and not floating. Other sizes are for blocks to check."""
        tensors = self.tensors()
        first = next((t.shape[0] for t in tensors if t.ndim), 0)
        _check(self, first)

    def fitted(self: S, *inputs: Tensor) -> S:
        """What a call with these inputs goes on from: in float64 where one is, and with copies of
        what was computed under inference_mode, where gradients are recorded.

        Raises ValueError for tensors on another device, and for a memory below float32.
        """
        device, dtype, copied = inputs[0].device, torch.float32, False
        tensors = [named for named in _named(self) if named[1].is_floating_point()]
        if any(
            t.dtype == torch.float64 for t in (*inputs, *(t for _, t, exact in tensors if exact))
        ):
            dtype = torch.float64
        for name, t, exact in tensors:
            if t.device != device:
                check.fail(_spelt(name), f"device {device} (state.to moves it)", t.device)
            if exact and t.dtype not in (torch.float32, torch.float64):
                check.fail(_spelt(name), "torch.float32 or torch.float64, as in a memory", t.dtype)
        if torch.is_grad_enabled():
            found = self.tensors()
            if torch.compiler.is_compiling():
                # Dynamo computes what it asks about: positions depend on little in a graph.
                found = [t for t in found if not t.is_floating_point()] or found
            copied = _inferred(*found)
        if copied and torch.compiler.is_compiling():
            # Copied within a graph, the originals might be what it saves for its backward.
            return _copied(self).fitted(*inputs)
        if not copied and all(t.dtype == dtype for _, t, exact in tensors if exact):
            return self

        def fit(t: Tensor, exact: bool) -> Tensor:
            t = t.clone() if copied else t
            return t.to(dtype) if exact and t.is_floating_point() else t

        return _map_exact(fit, self)

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
