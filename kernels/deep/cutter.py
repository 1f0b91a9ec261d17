"""Streams of tokens cut into chunks, and gradients of chunks put together again.

A kernel that goes over a chunk's tokens many times reads them from [slots, H, rows, W]: dense,
without masks, zero where a chunk has no token. (matrix.py reads each once, from the stream.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atlas_blocks.kernels.coefficients import Spans
from atlas_blocks.kernels.tiles import Layout


@dataclass(frozen=True)
class Cutter:
    """The tokens of some slots.

    tokens: int32 [slots, SPAN], where a chunk's own lie in a stream [tokens, ...], -1 for none of
    this call's; keys: int32 [slots, SPAN + HALO], where its own and then its halo's lie in a stream
    whose rows begin with HIST tokens, as those of keys and gates do.
    """

    tokens: Tensor
    keys: Tensor

    @staticmethod
    def of(at: Layout, spans: Spans) -> Cutter:
        device = at.slots.device
        row, first, low, high = (c[:, None] for c in at.slots.long().unbind(1))
        t = torch.arange(spans.span, device=device)
        i = torch.arange(spans.halo, device=device)
        used, history = low < high, spans.history
        token, past = first + t, first - spans.halo + i
        inside = used & (t < spans.chunk) & (token < high)
        near = used & (i > spans.halo - spans.window) & (past < high)
        shift = (row + 1) * history
        own = torch.where(inside & (token >= low - history), token + shift, -1)
        halo = torch.where(near & (past >= low - history), past + shift, -1)
        return Cutter(
            torch.where(inside & (token >= low), token, -1).int(),
            torch.cat([own, halo], 1).int(),
        )


def cut(stream: Tensor, index: Tensor) -> Tensor:
    """[B, tokens, H, W] -> [slots, H, rows, W] for an index [slots, rows]."""
    flat = stream.flatten(0, 1)
    found = flat[index.clamp(min=0).long()] * (index >= 0)[..., None, None]
    return found.transpose(1, 2).contiguous()


def put(stream: Tensor, parts: Tensor, index: Tensor) -> None:
    """Add parts [slots, H, rows, W] to the stream [B, tokens, H, W] that they were cut from.

    A stream is a float32 accumulator; nothing of rows that no token has may be NaN.
    """
    flat, found = stream.flatten(0, 1), parts.transpose(1, 2).flatten(0, 1)
    there = index.flatten()
    found = torch.where((there >= 0)[:, None, None], found, 0.0)
    flat.index_add_(0, there.clamp(min=0).long(), found)
