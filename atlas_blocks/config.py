"""Configs: frozen dataclasses that sit beside the class they build and round-trip through JSON.

A config holds what defines a function (window, chunk size, degree, ...), never what a caller
passes at run time. Nested configs are allowed; `to_dict` tags each with its class name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from atlas_blocks import check
from atlas_blocks.names import class_of, full_name, name_of

C = TypeVar("C", bound="Config")
# Where a value is to go, part by part, and the value.
Setting = tuple[list[str], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of every config: dict and JSON round trip, and `replace`."""

    _classes: ClassVar[dict[str, type[Config]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Config._classes[full_name(cls)] = cls

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed. Raises ValueError for an unknown field."""
        for name in changes:
            _check_field(type(self), name)
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
        return _config(data, "")

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

    @classmethod
    def from_file(cls: type[C], path: str | os.PathLike[str]) -> C:
        """The config in a .toml or .json file, of this class where the file names no "type".

        "none" stands for None, which TOML has not. Raises ValueError that names the file, the
        field, what was expected and what came.
        """
        path = Path(path)
        with _inside(f"config {path}: "):
            data = _read_file(path)
            if isinstance(data, dict) and cls is not Config:
                data = {"type": name_of(cls), **data}
            config: Any = _config(data, "")
            if not isinstance(config, cls):
                check.fail("type", name_of(cls), name_of(type(config)))
        return config


def with_settings(config: C, settings: Mapping[str, Any]) -> C:
    """A copy with other values at some paths, such as {"layers.0.mixer.window": 32}.

    A path is fields, and places in a tuple, counted from 0; * stands for every place. The fields
    of one config change together, and before what lies in them. A dict with a "type" is read as a
    config. Raises ValueError that names the path, what was expected and what came.
    """
    return _changed(config, [(path.split("."), value) for path, value in settings.items()], "")


def _changed(value: Any, settings: list[Setting], path: str) -> Any:
    for parts, new in settings:
        if not parts:
            value = _read(new, path)
    for deep in (False, True):
        found: dict[Any, list[Setting]] = {}
        for parts, new in settings:
            if parts and (len(parts) > 1) == deep:
                for key in _keys(value, parts[0], path):
                    found.setdefault(key, []).append((parts[1:], new))
        if not found:
            continue
        changes = {
            key: _changed(
                value[key] if isinstance(value, tuple) else getattr(value, key, None),
                inner,
                _joined(path, key),
            )
            for key, inner in found.items()
        }
        if isinstance(value, tuple):
            value = tuple(changes.get(i, old) for i, old in enumerate(value))
        else:
            with _inside(_joined(path, "")):
                value = value.replace(**_fitted(type(value), changes))
    return value


def _keys(value: Any, part: str, path: str) -> list[Any]:
    """What one part of a path stands for: a field, or places in a tuple."""
    if isinstance(value, Config):
        with _inside(f"{path}: " if path else ""):
            _check_field(type(value), part)
        return [part]
    if not isinstance(value, tuple):
        check.fail(_joined(path, part), f"no more after {path}, which is {value!r}", repr(part))
    if part == "*":
        return list(range(len(value)))
    if not part.isdecimal() or int(part) >= len(value):
        places = (
            f"a place from 0 to {len(value) - 1}, or *" if value else "no place, as it is empty"
        )
        check.fail(path, places, repr(part))
    return [int(part)]


def _read(value: Any, path: str) -> Any:
    """The config that a dict describes, a tuple for a list, anything else as it is."""
    if isinstance(value, dict):
        return _config(value, path)
    if isinstance(value, (list, tuple)):
        return tuple(_read(v, _joined(path, i)) for i, v in enumerate(value))
    return value


def _config(data: Any, path: str) -> Config:
    where = path or "config"
    if not isinstance(data, dict) or "type" not in data:
        check.fail(where, 'a dict with a "type"', repr(data)[:200])
    with _inside(f"{path}: " if path else ""):
        cls = _class(data["type"])
        for name in data:
            if name != "type":
                _check_field(cls, name)
    fields = {n: _read(v, _joined(path, n)) for n, v in data.items() if n != "type"}
    try:
        with _inside(_joined(path, "")):
            return cls(**_fitted(cls, fields))
    except TypeError as error:
        raise ValueError(f"{where} {cls.__name__}: {error}") from error


def _class(name: object) -> type[Config]:
    classes = Config._classes.values()
    if isinstance(name, str) and "." in name and name not in {name_of(c) for c in classes}:
        module = name.rpartition(".")[0]
        check.fail("config type", f"a config class of {module}, once that is imported", repr(name))
    return class_of(name, classes, "config type")


def _check_field(cls: type[Config], name: str) -> None:
    """The constructor may take more than there are fields: what older files have."""
    check.choice(f"{cls.__name__} field", name, _parameters(cls))


@functools.cache
def _parameters(cls: type[Config]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls).parameters)


def _fitted(cls: type[Config], fields: dict[str, Any]) -> dict[str, Any]:
    """With None for "none" where a field may be None and no word."""
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}

    def fit(name: str, value: Any) -> Any:
        kind = types.get(name, "")
        optional = ("None" in kind or "Optional" in kind) and "str" not in kind
        return None if optional and value == "none" else value

    return {name: fit(name, value) for name, value in fields.items()}


def _read_file(path: Path) -> Any:
    check.choice("suffix", path.suffix, (".toml", ".json"))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from error
    if path.suffix == ".json":
        return json.loads(text)
    if sys.version_info < (3, 11):
        check.fail("suffix", ".json, as Python reads TOML from 3.11 on", path.suffix)
    return importlib.import_module("tomllib").loads(text)


def _joined(path: str, part: object) -> str:
    return f"{path}.{part}" if path else str(part)


@contextlib.contextmanager
def _inside(words: str) -> Iterator[None]:
    """Put words in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{words}{error}") from error
