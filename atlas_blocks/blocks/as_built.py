"""Whether a module is what its config builds, or something was put into it.

An op that builds a module again and gives it the live one's tensors computes the same for the
first; of hooks, adapters, parametrisations, replaced parts and overridden methods it knows nothing.
Facts are plain values, which torch.compile traces without a guard on the module itself: equal
modules share a graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from atlas_blocks.config import Config

PLAIN = (int, float, str, Config)
# Of a tensor that computes as any other; export traces with the last two.
USUAL = ("Parameter", "Buffer", "Tensor", "FakeTensor", "FunctionalTensor")


class Facts(NamedTuple):
    """Of one module."""

    name: str  # "" for the one that holds all others
    classes: tuple[str, ...]  # its own, then those that it inherits from
    hooked: bool
    tensors: tuple[tuple[str, str], ...]  # name and type of its parameters and buffers
    plain: tuple[tuple[str, object], ...]  # its numbers, words and config
    attributes: tuple[str, ...]


def identity_of(module: nn.Module, parts: Collection[str]) -> tuple[tuple, ...]:
    """`Facts` of the module and of what is in these parts of it."""
    found = []
    for name, part in module.named_modules():
        first = name.split(".")[0]
        if first and first not in parts:
            continue
        hooks = (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        )
        own = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        values = part.__dict__.items()
        found.append(
            (
                name,
                tuple([f"{c.__module__}.{c.__qualname__}" for c in type(part).__mro__]),
                any([len(each) > 0 for each in hooks]),
                tuple([(n, type(t).__qualname__) for n, t in own]),
                # Not bool: `training` is no setting.
                tuple(
                    [
                        (n, _plain(v))
                        for n, v in values
                        if isinstance(v, PLAIN) and not isinstance(v, bool)
                    ]
                ),
                tuple(part.__dict__),
            )
        )
    return tuple(found)


def _plain(value: object) -> object:
    """The value as a constant, in a graph too whose numbers are symbolic."""
    if isinstance(value, Config):
        return tuple([(name, _plain(v)) for name, v in value.__dict__.items()])
    if isinstance(value, float):
        return math.frexp(value)
    return operator.index(value) if type(value) is int else value


def deviation(facts: tuple[tuple, ...], built: nn.Module, parts: Collection[str]) -> str | None:
    """What tells a module with these facts from what its config builds, None for nothing."""
    live = {f[0]: Facts(*f) for f in facts}
    plain = {f[0]: Facts(*f) for f in identity_of(built, parts)}
    modules = dict(built.named_modules())
    for name in [*plain, *live]:
        if name not in live:
            return f"it has no {name}"
        if name not in plain:
            return f"{name} was put into it"
        reason = _of_one(live[name], plain[name], modules[name])
        if reason is not None:
            return reason
    return None


def _of_one(live: Facts, plain: Facts, built: nn.Module) -> str | None:
    what = live.name or "it"
    classes = live.classes
    if classes[1].endswith(".FSDPModule"):  # fully_shard gives a module a class of its own
        classes = classes[2:]
    if classes[0] != plain.classes[0]:
        return f"{what} is a {live.classes[0]}, not a {plain.classes[0]}"
    if live.hooked and live.name:  # those of the whole run around what the op computes
        return f"{what} has hooks"
    names, expected = ([name for name, _ in f.tensors] for f in (live, plain))
    if names != expected:
        return f"{what} has the tensors {', '.join(names)}, not {', '.join(expected)}"
    for name, kind in live.tensors:
        if kind not in USUAL:
            return f"{name} of {what} is a {kind}"
    for attribute in live.attributes:
        if attribute not in plain.attributes and callable(getattr(type(built), attribute, None)):
            return f"{what} has a {attribute} of its own"
    values = dict(live.plain)
    for attribute, value in plain.plain:
        if values.get(attribute) != value:
            return f"{what} has another {attribute}"
    return None
