"""A chunk whose tokens each have a step of their own, compiled once: on a CPU it is many small
operations."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from atlas_blocks.graph import compiled_steps
from atlas_blocks.graph.compiled_steps import Key, alike, in_order
from atlas_blocks.omega import walk
from atlas_blocks.omega.chunks import Read, Write
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.walk import ChunkMemory


def compiled_stepwise_chunk(
    rule: Rule, write: Write, read: Read, memory: ChunkMemory, place: int
) -> tuple[Tensor, ChunkMemory]:
    """`walk.stepwise_chunk`, compiled for whole chunks."""
    if write.eta.shape[-1] < rule.chunk_size:
        return walk.stepwise_chunk(rule, write, read, memory, place)
    write, read, memory = write.map(alike), read.map(alike), memory.map(alike)
    tensors = (*write.tensors(), *read.tensors(), *memory.tensors())
    return _whole_chunk(compiled_steps.key(rule, write.k, (t.shape[1:] for t in tensors)))(
        write, read, memory
    )


@functools.cache
def _whole_chunk(key: Key) -> Callable[[Write, Read, ChunkMemory], tuple[Tensor, ChunkMemory]]:
    """For a rule and these sizes, whatever the batch and the length."""
    rule = key.what
    assert isinstance(rule, Rule)

    def chunk(write: Write, read: Read, memory: ChunkMemory) -> tuple[Tensor, ChunkMemory]:
        y, end = walk.stepwise_chunk(rule, write, read, memory, 0)
        # Entering the next chunk sets M^(0).
        end = end._replace(chunk_start=[])
        return y, end.map(in_order)

    run = compiled_steps.once(chunk)

    def call(write: Write, read: Read, memory: ChunkMemory) -> tuple[Tensor, ChunkMemory]:
        y, end = run(write, read, memory)
        return y, end._replace(chunk_start=end.weights)

    return call
