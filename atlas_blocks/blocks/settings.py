"""What the constructors of blocks that have a config share: the errors for wrong arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from atlas_blocks import check
from atlas_blocks.config import Config

Init = TypeVar("Init", bound=Callable[..., None])


def takes(kind: type[Config]) -> Callable[[Init], Init]:
    """Of a constructor (dim, heads, config): ValueError for a config that is no `kind`, and for a
    setting given beside it."""

    default, names = kind(), [field.name for field in dataclasses.fields(kind)]

    def checked(init: Init) -> Init:
        @functools.wraps(init)
        def build(self: Any, dim: int, heads: int, config: Any = default, **settings: Any) -> None:
            for name, value in settings.items():
                check.choice(f"{kind.__name__} field", name, names)
                right = f"{type(self).__name__}(dim, heads, {kind.__name__}({name}={value!r}))"
                check.fail(name, f"it in a config, {right}", "it beside dim and heads")
            if not isinstance(config, kind):
                check.fail("config", kind.__name__, f"{type(config).__name__}, {config!r}"[:100])
            init(self, dim, heads, config)

        return cast("Init", build)

    return checked


def changed(config: Config) -> str:
    """The fields that differ from their defaults, "window=4, update='gd'"; not those that are
    configs of parts, which say so themselves."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config):
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            found.append(f"{field.name}={value!r}")
    return ", ".join(found)
