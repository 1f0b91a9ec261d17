"""What the ops share: how torch wants them to choose, return and differentiate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)
LIBRARY = torch.library.Library("atlas", "FRAGMENT")


def implement(name: str, body: Callable, fake: Callable) -> None:
    """Give the op that `LIBRARY.define` declared its body, and what it makes of fake tensors."""

    @functools.wraps(body)
    def run(*arguments: Any) -> Any:
        # A compiled graph runs with every view noting how to be made again, which in a loop over
        # many chunks costs ten times what is computed.
        with torch.autograd.grad_mode._force_original_view_tracking(False), _device_of(arguments):
            return body(*arguments)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atlas::{name}", fake, lib=LIBRARY)


def _device_of(arguments: Sequence[Any]) -> AbstractContextManager[object]:
    """The GPU of the first tensor made the current one, which kernels are launched on and asked of:
    the tensors may lie on another."""
    first = next(
        (a[0] if isinstance(a, (list, tuple)) else a for a in arguments if _holds(a)), None
    )
    if first is None or first.device.type != "cuda":
        return nullcontext()
    return torch.cuda.device(first.device)


def _holds(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return len(argument) > 0 and isinstance(argument[0], Tensor)
    return isinstance(argument, Tensor)


def untraced(fn: F) -> F:
    """`torch.compiler.assume_constant_result`: Dynamo calls `fn` and takes its result as given.

    Only the mark that it sets: the function itself imports all of Dynamo, and with it Triton.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def traced() -> bool:
    """Whether a compiler traces this, other than torch.export, which keeps every op a node."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def own(t: Tensor) -> Tensor:
    """A contiguous copy: an op may not return its inputs, or two views of one tensor."""
    return t.clone(memory_format=torch.contiguous_format)


def own_empty(t: Tensor) -> Tensor:
    """What `own` returns, of a fake tensor."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def distinct(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, while compiling with clones where one comes twice.

    Dynamo takes no tensor twice as an input of an autograd.Function: q and k may be one.
    """
    if not torch.compiler.is_compiling():
        return tensors
    return [t.clone() if any(t is u for u in tensors[:i]) else t for i, t in enumerate(tensors)]


@contextmanager
def recording() -> Iterator[None]:
    """Autograd works inside, in the body of an op too.

    Under a dispatch mode, such as a FLOP counter, an op's body runs below autograd, which then
    records nothing and makes every gradient zero.
    """
    c = torch._C
    autograd = c.DispatchKeySet(c.DispatchKey.AutogradFunctionality)
    autograd = autograd | c.DispatchKeySet(c.DispatchKey.ADInplaceOrView)
    excluded = c._dispatch_tls_local_exclude_set() - autograd
    with c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded):
        yield
