"""Causal depthwise convolution over a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.blocks.causal_conv import causal_conv
from atlas_blocks.documents.definition import last_tokens, with_past
from atlas_blocks.state import State


class ConvState(State):
    """The last width - 1 inputs, [B, width - 1, dim], zero before the sequence begins."""

    tail: Tensor


class ShortConv(Block):
    """y_t = sum_{i < width} w_i * x_{t-i}, a channel at a time (specification section 9).

    x [B, T, dim] -> y [B, T, dim]; state ConvState. Raises ValueError for dim or width below 1.
    """

    state_type = ConvState

    def __init__(self, dim: int, width: int = 4) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        check.at_least("width", width, 1)
        self.dim, self.width = dim, width
        self.weight = nn.Parameter(torch.empty(width, dim))  # weight[-1] is the token's own
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def mix(
        self, x: Tensor, state: ConvState | None, documents: Documents | None = None
    ) -> tuple[Tensor, ConvState]:
        rows = x.shape[0] if documents is None else documents.count
        size = (rows, self.width - 1, self.dim)
        if state is None:
            past = x.new_zeros(size)
        else:
            check.tensor("state.tail", state.tail, "[B, width - 1, dim]", size)
            past = state.tail.to(x.dtype)
        weight, n = self.weight.to(x.dtype), self.width - 1
        if documents is None:
            reach = torch.cat([past, x], 1)
            return causal_conv(reach, weight), ConvState(reach[:, reach.shape[1] - n :].clone())
        # Each document has its own past before it, of which no output is wanted.
        reach = with_past(past, x, documents.bounds, documents.of)
        wanted = torch.arange(x.shape[1], device=x.device) + documents.of * n
        y = causal_conv(reach, weight).index_select(1, wanted)
        return y, ConvState(last_tokens(reach, n, documents.bounds))

    mix_packed = mix
