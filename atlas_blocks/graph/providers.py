"""Which implementation serves an op: the definition or another provider, asked for or by itself.

The choice is made in Python before the op is called, from the device, dtypes and widths of a call
(never from its lengths: one compiled graph serves them all), and the name of the chosen provider is
an argument of the op. A compiler pass can read it in the graph and change it.
"""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from atlas_blocks import check
from atlas_blocks.graph.flops import register_flop_formulas

M = TypeVar("M", bound=nn.Module)
DEFINITION = "definition"


class ProviderWarning(UserWarning):
    """A call is served by a provider that is not the first choice on its device."""


@dataclass(frozen=True)
class Provider:
    """One implementation of one op.

    supports(call): None where it can serve the call, else why not, in one sentence. `call` is what
    the op says of a call, such as `omega.op.OmegaCall`; its GPU is then the current device.
    forward, backward: serve the op and its backward; their arguments are the ops' without the
    provider's name, the settings as one tuple.
    saves: whether the forward, asked to save, hands out what the op keeps for the backward; one
    that computes everything anew in its backward does not, and is given nothing there.
    """

    name: str
    supports: Callable[[Any], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    saves: bool = True


@dataclass(frozen=True)
class Choice:
    """Who serves a call, and why not the others: their names and reasons, the preferred first."""

    op: str
    provider: str
    refusals: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """A provider's place in an op's table.

    load: imports it; raises ImportError where it cannot be. automatic_on: device types where it is
    chosen without being asked for. special: for one case alone, so that it is not worth a word that
    it does not serve another.
    """

    load: Callable[[], Provider]
    automatic_on: tuple[str, ...] = ()
    special: bool = False


def lazily(module: str, *, automatic_on: tuple[str, ...] = (), special: bool = False) -> Entry:
    """A provider that its module has as PROVIDER, imported when it is first needed."""

    def load() -> Provider:
        return importlib.import_module(module).PROVIDER

    return Entry(load, automatic_on, special)


# Every op's providers but the definition, by name, the preferred first.
_PROVIDERS: dict[str, dict[str, Entry]] = {}
_DEFINITIONS: dict[str, Provider] = {}


def define(
    op: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    **others: Entry,
) -> None:
    """Make `op` known by its definition, which serves every call, and its other providers, the
    preferred first."""
    _DEFINITIONS[op] = Provider(DEFINITION, lambda call: None, forward, backward)
    _PROVIDERS[op] = others


def register_provider(
    op: str, provider: Provider, *, automatic_on: tuple[str, ...] = ("cuda",)
) -> None:
    """Add a provider, preferred to those there are.

    automatic_on: device types where it is chosen without being asked for; () for none. Raises
    ValueError for an op that is not there or a name that is taken.
    """
    check.choice("op", op, _PROVIDERS)
    if provider.name in ("auto", DEFINITION, *_PROVIDERS[op]):
        check.fail("provider.name", f"a name that {op} does not have yet", repr(provider.name))
    _PROVIDERS[op] = {provider.name: Entry(lambda: provider, automatic_on), **_PROVIDERS[op]}


class _Thread:
    """What is asked for in a thread, and before that, and who asked for something else."""

    def __init__(self) -> None:
        self.name = "auto"
        self.before: list[tuple[object, str]] = []


class _Asked(threading.local):
    # Set here and not on the class: torch.compile guards on what the instance holds, so that a
    # graph is compiled anew where another provider is asked for. It cannot trace a ContextVar, and
    # what it traces of a write to the thread-local itself is lost.
    def __init__(self) -> None:
        self.here = _Thread()


_asked = _Asked()


class use_provider:
    """`with use_provider("triton"):` ops inside are served by that provider, or raise ValueError.

    name: a provider's name, "definition", or "auto" to let every op choose. An op that has no
    provider of this name chooses for itself. Contexts nest; a `provider=` argument beats them. Each
    thread has its own; do not hold one across an `await`. A compiled function is compiled anew
    where it is called in another context. Activation checkpointing computes a forward again outside
    of its contexts, and maybe in a thread of autograd's: there `keep_provider` is what lasts.
    Raises ValueError for a name that no op has.
    """

    def __init__(self, name: str) -> None:
        known = {provider for entries in _PROVIDERS.values() for provider in entries}
        check.choice("provider", name, {"auto", DEFINITION} | known)
        self.name = name

    def __enter__(self) -> None:
        here = _asked.here
        here.before.append((self, here.name))
        here.name = self.name

    def __exit__(self, *error: object) -> None:
        # A hook may be called to leave what a failure kept it from entering.
        here = _asked.here
        if here.before and here.before[-1][0] is self:
            _, here.name = here.before.pop()


def keep_provider(module: M, name: str) -> M:
    """Make every call of the module one inside of `use_provider(name)`; returns the module.

    In any thread, when a checkpoint computes it again, compiled, copied or pickled. A second name
    takes the place of the first; "auto" leaves the choice to the ops, whatever context the module
    is called in. Raises ValueError as `use_provider` does.
    """
    kept = _Kept(name)
    drop_provider(module)
    module.register_forward_pre_hook(kept.enter, prepend=True)
    module.register_forward_hook(kept.leave, always_call=True)
    return module


def drop_provider(module: nn.Module) -> None:
    """Undo `keep_provider`; nothing where there is nothing to undo."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(_owner(hook), _Kept)]:
            del hooks[key]


class _Kept:
    """The hooks of a module that keeps a provider."""

    def __init__(self, name: str) -> None:
        self.context = use_provider(name)

    def enter(self, module: nn.Module, arguments: Any) -> None:
        self.context.__enter__()

    def leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.context.__exit__()


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def context() -> str:
    """The name given to the innermost `use_provider`, or "auto"."""
    return _asked.here.name


def names(op: str) -> tuple[str, ...]:
    """The names of the op's providers, the definition first, then the preferred first."""
    return (DEFINITION, *_PROVIDERS[op])


def refusal(op: str, name: str, call: Any) -> str | None:
    """Why the provider cannot serve the call of `op`, or None where it can. Asked with the call's
    GPU as the current one."""
    try:
        with _current(call):
            return find(op, name).supports(call)
    except ImportError as error:
        return f"it cannot be imported: {error}"


def _current(call: Any) -> AbstractContextManager[object]:
    index = getattr(call, "index", None)
    if index is None or call.device != "cuda" or not torch.cuda.is_available():
        return nullcontext()
    return torch.cuda.device(index)


def find(op: str, name: str) -> Provider:
    """The provider of `op` with this name. Raises ImportError where it cannot be imported."""
    return _DEFINITIONS[op] if name == DEFINITION else _PROVIDERS[op][name].load()


def choose(op: str, argument: str, context: str, device: str, call: Any) -> str:
    """The name of the provider that serves a call on a device type.

    argument: what the op was given as `provider`; context: the name in force around it. Raises
    ValueError where the one that was asked for cannot serve. Warns, once for each op and reason,
    where the device has a preferred provider that cannot.
    """
    known = names(op)
    check.choice("provider", argument, ("auto", *known))
    chosen = context if argument == "auto" and context in known else argument
    if chosen == "auto":
        chosen, refusals = _automatic(op, device, call)
        missed = [n for n in refusals if not _PROVIDERS[op][n].special]
        if missed:
            _warn_once(op, chosen, missed[0], refusals[missed[0]])
    elif (reason := refusal(op, chosen, call)) is not None:
        raise ValueError(f"provider: {chosen!r} cannot serve this call of {op}: {reason}")
    if chosen != DEFINITION:
        register_flop_formulas()
    return chosen


def _automatic(op: str, device: str, call: Any) -> tuple[str, dict[str, str]]:
    """The first provider of this device type that can serve, and why those before cannot."""
    refusals = {}
    for name, entry in _PROVIDERS[op].items():
        if device in entry.automatic_on:
            reason = refusal(op, name, call)
            if reason is None:
                return name, refusals
            refusals[name] = reason
    return DEFINITION, refusals


@functools.cache
def _warn_once(op: str, chosen: str, name: str, reason: str) -> None:
    message = f"{op} is served by {chosen!r}, not by the preferred {name!r}: {reason}"
    warnings.warn(message, ProviderWarning, stacklevel=4)


def explain_choice(op: str, call: Any) -> Choice:
    """Who serves a call when nothing is asked for, and why every other provider does not.

    call: what the op says of a call, such as `omega.op.OmegaCall`; its `device` is a device type.
    Imports the providers. Raises ValueError for an op that is not there.
    """
    check.choice("op", op, _PROVIDERS)
    chosen, _ = _automatic(op, call.device, call)
    reasons = {}
    for name, entry in _PROVIDERS[op].items():
        reason = refusal(op, name, call)
        if reason is None and call.device not in entry.automatic_on:
            reason = f"on {call.device} it serves only where it is asked for"
        elif reason is None and name != chosen:
            reason = f"{chosen!r} is preferred"
        if reason is not None:
            reasons[name] = reason
    return Choice(op, chosen, reasons)
