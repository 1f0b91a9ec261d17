"""Names of classes in files: configs and states say what they are, and are found by it again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from atlas_blocks import check

T = TypeVar("T")


def full_name(cls: type) -> str:
    """Module and name: what tells a class from another of the same name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def name_of(cls: type) -> str:
    """What files call the class: this library's by their names alone, all others in full, so that
    nobody's class takes the place of one of ours."""
    full = full_name(cls)
    return cls.__name__ if full.startswith("atlas_blocks.") else full


def class_of(name: object, classes: Iterable[type], what: str) -> type:
    """The class that files call `name`. Raises ValueError, which names `what`, where none is.

    A class of somebody's is found without its module too, if no other is called so: files had no
    more once.
    """
    known = {name_of(cls): cls for cls in classes}
    if isinstance(name, str) and name not in known:
        alike = [cls for cls in known.values() if cls.__name__ == name]
        if len(alike) == 1:
            return alike[0]
    check.choice(what, name, known)
    return known[str(name)]


def add_to(what: str, table: dict[str, T], name: str, value: T) -> None:
    """Register `value` in a table under a name. Raises ValueError for one that is taken."""
    if not isinstance(name, str) or not name or name in table:
        check.fail(f"{what}'s name", "a str that is not taken yet", repr(name))
    table[name] = value
