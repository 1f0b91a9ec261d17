"""What the nodes of a compiled graph run again and again, compiled once, and so not unrolled."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_blocks.graph.contract import recording
from atlas_blocks.graph.one_program import inductor

# Of torch.compile, whatever the graph around it is compiled by; None leaves everything as it is.
BACKEND: str | None = "inductor"
# Where the functions are that were compiled here, to tell them from a model's.
files: set[str] = {__file__}


class Key(NamedTuple):
    """What a compiled step is for; caches of them go by it."""

    what: Hashable  # the settings that its function closes over
    sizes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    grad: bool
    backend: str | None


def key(what: Hashable, like: Tensor, sizes: Iterable[torch.Size]) -> Key:
    """For these sizes, the dtype and device of `like`, and gradients if they are wanted now."""
    return Key(what, tuple(sizes), like.dtype, like.device, *here())


def here() -> tuple[bool, str | None]:
    """What is compiled depends on besides: gradients or not, and the backend."""
    return torch.is_grad_enabled(), _backend()


def _backend() -> str | None:
    """BACKEND, or None where it would not work."""
    return None if BACKEND == "inductor" and not _has_cpp_compiler() else BACKEND


@functools.cache
def _has_cpp_compiler() -> bool:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        message = "no C++ compiler is found: nodes of compiled graphs run uncompiled, and slower"
        warnings.warn(message, stacklevel=2)
        return False
    return True


def once(fn: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    """torch.compile of a function made for the purpose, in one graph."""
    backend = _backend()
    if backend is None:
        return fn
    shapes: Any = importlib.import_module("torch.fx.experimental._config")

    files.add(fn.__code__.co_filename)
    # Dynamo keeps what it compiled by code object, and not much for each.
    fn.__code__ = fn.__code__.replace()
    compiler: Any = inductor if backend == "inductor" else backend
    run = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=compiler)

    def call(*arguments: Any) -> Any:
        # Under one set of dispatch keys, whether a forward or a backward calls: they are guarded.
        # And no guard that a length is the offset of a view, as happened to be when it was traced.
        with recording(), shapes.patch(use_duck_shape=False), warnings.catch_warnings():
            # Of Dynamo's own doing, where it first sees a tensor and an autograd.Function.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            warnings.filterwarnings("ignore", ".*should not be instantiated")
            return run(*arguments)

    return call


def in_order(t: Tensor) -> Tensor:
    """In the layout that the shape alone decides: `contiguous` leaves axes of size 1 any stride."""
    return t.contiguous().view(-1).view(t.shape)


def alike(t: Tensor) -> Tensor:
    """What a loop begins with, made like what its turns leave to the next, so that one compiled
    turn serves all: in order, and with a gradient where gradients are recorded."""
    t = in_order(t if torch.is_grad_enabled() else t.detach())
    if t.requires_grad or not torch.is_grad_enabled() or not t.is_floating_point():
        return t
    return t.detach().requires_grad_()
