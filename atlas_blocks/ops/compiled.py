"""What the nodes of a compiled graph run again and again, compiled once, and so not unrolled."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atlas_blocks.functional import walk
from atlas_blocks.functional.chunks import Read, Write
from atlas_blocks.functional.rule import Rule
from atlas_blocks.functional.walk import ChunkMemory

# Of torch.compile, whatever the graph around it is compiled by; None leaves everything as it is.
BACKEND: str | None = "inductor"


class Key(NamedTuple):
    """What a compiled function of the rule is for; caches of them go by it."""

    rule: Rule
    sizes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device
    grad: bool
    backend: str | None


def key(rule: Rule, write: Write, sizes: Iterable[torch.Size]) -> Key:
    """For these sizes, `write`'s dtype and device, and gradients if they are wanted now."""
    return Key(rule, tuple(sizes), write.k.dtype, write.k.device, *here())


def here() -> tuple[bool, str | None]:
    """What is compiled depends on besides: gradients or not, and the backend."""
    return torch.is_grad_enabled(), BACKEND


def once(fn: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    """torch.compile of a function made for the purpose, in one graph."""
    if BACKEND is None:
        return fn
    # Dynamo keeps what it compiled by code object, and not much for each.
    fn.__code__ = fn.__code__.replace()
    run = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=BACKEND)

    def call(*arguments: Any) -> Any:
        with warnings.catch_warnings():
            # Of Dynamo's own doing, where it first sees a tensor and an autograd.Function.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            warnings.filterwarnings("ignore", ".*should not be instantiated")
            return run(*arguments)

    return call


def muon_chunk(
    rule: Rule, write: Write, read: Read, memory: ChunkMemory, place: int
) -> tuple[Tensor, ChunkMemory]:
    """`walk.muon_chunk`, compiled for whole chunks."""
    if write.eta.shape[-1] < rule.chunk_size:
        return walk.muon_chunk(rule, write, read, memory, place)
    # Of one layout, so that the first chunk's serves those that follow.
    write, read = write.map(Tensor.contiguous), read.map(Tensor.contiguous)
    memory = memory.map(Tensor.contiguous)
    tensors = (*write.tensors(), *read.tensors(), *memory.tensors())
    return _whole_chunk(key(rule, write, (t.shape[1:] for t in tensors)))(write, read, memory)


@functools.cache
def _whole_chunk(key: Key) -> Callable[[Write, Read, ChunkMemory], tuple[Tensor, ChunkMemory]]:
    """For these sizes, whatever the batch and the length."""

    def chunk(write: Write, read: Read, memory: ChunkMemory) -> tuple[Tensor, ChunkMemory]:
        y, end = walk.muon_chunk(key.rule, write, read, memory, 0)
        # Entering the next chunk sets M^(0).
        end = end._replace(chunk_start=[])
        return y, end.map(Tensor.contiguous)

    run = once(chunk)

    def call(write: Write, read: Read, memory: ChunkMemory) -> tuple[Tensor, ChunkMemory]:
        y, end = run(write, read, memory)
        return y, end._replace(chunk_start=end.weights)

    return call
