"""Configs: frozen dataclasses that sit beside the class they build and round-trip through JSON.

A config holds what defines a function (window, chunk size, degree, ...), never what a caller
passes at run time. Nested configs are allowed; `to_dict` tags each with its class name.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, TypeVar

from atlas_blocks import check
from atlas_blocks.names import class_of, full_name, name_of

C = TypeVar("C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of every config: dict and JSON round trip, and `replace`."""

    _classes: ClassVar[dict[str, type[Config]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Config._classes[full_name(cls)] = cls

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed. Raises ValueError for an unknown field."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            check.choice(f"{type(self).__name__} field", name, names)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types, with the class name under "type"."""

        def plain(value: Any) -> Any:
            if isinstance(value, Config):
                return value.to_dict()
            if isinstance(value, (tuple, list)):
                return [plain(v) for v in value]
            return value

        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"type": name_of(type(self)), **fields}

    @staticmethod
    def from_dict(data: Any) -> Any:
        """The config that `to_dict` wrote. Raises ValueError where the dict is not one."""

        def read(value: Any) -> Any:
            if isinstance(value, dict):
                return Config.from_dict(value)
            return tuple(read(v) for v in value) if isinstance(value, list) else value

        if not isinstance(data, dict) or "type" not in data:
            check.fail("config", 'a dict with a "type"', repr(data)[:200])
        cls = class_of(data["type"], Config._classes.values(), "config type")
        names = [f.name for f in dataclasses.fields(cls)]
        fields = {name: read(value) for name, value in data.items() if name != "type"}
        for name in fields:
            check.choice(f"{cls.__name__} field", name, names)
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"config {cls.__name__}: {error}") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_json(text: str) -> Any:
        """The config that `to_json` wrote. Raises ValueError where the text is not one."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"config: expected JSON, got {text[:80]!r} ({error})") from error
        return Config.from_dict(data)
