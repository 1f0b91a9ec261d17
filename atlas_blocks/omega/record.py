"""Records of tensors that are stacked along an axis of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Record:
    """A dataclass of tensors stacked along a chunk axis, or of other such records, or None."""

    def unbind(self) -> Iterator[Self]:
        """The chunks one by one. (Indexing would cost a full-size gradient for every chunk.)"""
        columns: dict[str, Sequence[Any] | None] = {}
        for name, value in vars(self).items():
            columns[name] = None if value is None else list(value.unbind())
        count = next(len(c) for c in columns.values() if c is not None)
        for n in range(count):
            yield type(self)(**{k: None if c is None else c[n] for k, c in columns.items()})

    @classmethod
    def stack(cls, records: Sequence[Self]) -> Self:
        """The reverse of `unbind`, of records without others in them."""
        columns = zip(*(vars(r).values() for r in records), strict=True)
        return cls(*(None if c[0] is None else torch.stack(c) for c in columns))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same record with `fn` applied to every tensor."""

        def one(value: Any) -> Any:
            return value.map(fn) if isinstance(value, Record) else fn(value)

        fields = {k: None if v is None else one(v) for k, v in vars(self).items()}
        return type(self)(**fields)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in field order."""
        found: list[Tensor] = []
        self.map(lambda t: found.append(t) or t)
        return found

    def like(self, tensors: Iterator[Tensor]) -> Self:
        """The record of the same fields whose `tensors` come next."""
        return self.map(lambda _: next(tensors))

    def flatten(self) -> Self:
        """[N, G, ...] -> [N G, ...]."""
        return self.map(lambda t: t.flatten(0, 1))
