"""An LSTM as a token mixer: the recurrent baseline of the recipes.

B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.base import Block
from atlas_blocks.config import Config
from atlas_blocks.state import State


@dataclass(frozen=True)
class LSTMConfig(Config):
    """One layer of torch.nn.LSTM, as wide as the model; it has no heads."""

    def build(self, dim: int, heads: int) -> LSTM:
        return LSTM(dim)


@dataclass(frozen=True)
class LSTMState(State):
    """hidden, cell: [B, dim]."""

    hidden: Tensor
    cell: Tensor


class LSTM(Block):
    """torch.nn.LSTM in the form of every block: x [B, T, dim] -> y [B, T, dim], LSTMState.

    torch.compile cannot trace it and breaks the graph here.
    """

    state_type = LSTMState

    def __init__(self, dim: int) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        self.dim = dim
        self.lstm = nn.LSTM(dim, dim, batch_first=True)

    def mix(self, x: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
        if state is None:
            zeros = x.new_zeros(len(x), self.dim)
            state = LSTMState(zeros, zeros)
        shape = (len(x), self.dim)
        check.tensor("state.hidden", state.hidden, "[B, dim]", shape)
        check.tensor("state.cell", state.cell, "[B, dim]", shape)
        if x.numel() == 0:  # torch's takes no empty sequence
            return x, state
        before = tuple(t.unsqueeze(0).to(x.dtype) for t in (state.hidden, state.cell))
        y, (hidden, cell) = self.lstm(x, before)
        return y, LSTMState(hidden[0], cell[0])
