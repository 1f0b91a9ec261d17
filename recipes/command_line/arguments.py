"""Arguments of the command line as values."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from atlas_blocks import check

Cache = Annotated[
    Path | None,
    typer.Option(help="Folder for compiled graphs: the next process has them at once."),
]


def setting_of(
    text: str, form: str = "PATH=VALUE, such as layers.0.mixer.window=32"
) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON has it, or else as a word. form: how it is written, for the
    error."""
    path, equals, value = text.partition("=")
    if not (path and equals):
        check.fail("set", form, repr(text))
    for spelling in (value, value.lower()):  # True is true
        with contextlib.suppress(json.JSONDecodeError):
            return path, json.loads(spelling)
    return path, value


def device_of(name: str) -> torch.device:
    """The device of that name. Raises ValueError where it cannot be used."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {name!r}: {str(error).splitlines()[0]}") from error


def integers_of(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: expected integers such as 64,128, got {text!r}") from None
