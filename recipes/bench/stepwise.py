"""The definition with its chunk step compiled, for comparison.

torch.compile of a whole call unrolls the loop over chunks, and compiling takes minutes. Here what
needs no memory is one graph and one chunk of the walk another: the same functions that the
definition calls, once for each chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.functional.chunks import cut
from atlas_blocks.functional.omega_rule import pieces, prepare
from atlas_blocks.functional.rule import Arguments, first_state
from atlas_blocks.functional.walk import walk_gradient


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: a step that fell back to eager would be timed under a false name.
    return torch.compile(function, fullgraph=True, dynamic=False)


class CompiledSteps:
    """`omega_rule` with gradient descent from a sequence's start: y, then M and S at the end.

    transform: what becomes of each of the definition's functions. Muon is left out: the code that
    torch 2.13 makes of its step for a CPU corrupts the heap and ends the process.
    """

    def __init__(self, transform: Callable[[Callable[..., Any]], Callable[..., Any]] = _compile):
        self.cut = transform(cut)
        self.gradient = transform(walk_gradient)

    def __call__(self, a: Arguments) -> tuple[Tensor, list[Tensor]]:
        assert a.rule.update == "gd"
        tokens, memory, _ = prepare(a._replace(state=first_state(a)), 0)
        outputs = []
        for piece in pieces(a.q.shape[1], 0, a.rule.chunk_size):
            write, read = self.cut(a.rule, a.feature_map, tokens, piece)
            for chunk in zip(write.unbind(), read.unbind(), strict=True):
                one = (part.map(lambda t: t.unsqueeze(0)) for part in chunk)
                y, memory = self.gradient(a.rule, *one, memory, piece.place, None)
                outputs.append(y)

        def rows(t: Tensor) -> Tensor:
            """[B H, ...] -> [B, H, ...]."""
            return t.unflatten(0, (a.q.shape[0], a.q.shape[2]))

        y = rows(torch.cat(outputs, 1)).transpose(1, 2).to(a.q.dtype)
        return y, [rows(w) for w in (*memory.weights, *memory.momentum)]
