"""What the ops' definitions and fakes share: torch's rules for tensors that an op returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def own(t: Tensor) -> Tensor:
    """A contiguous copy: an op may not return its inputs, or two views of one tensor."""
    return t.clone(memory_format=torch.contiguous_format)


def own_empty(t: Tensor) -> Tensor:
    """What `own` returns, of a fake tensor."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


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
