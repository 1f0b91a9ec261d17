"""An LSTM as a token mixer: the recurrent baseline of the recipes.

B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.base import Block
from atlas_blocks.blocks.lstm_op import lstm
from atlas_blocks.config import Config
from atlas_blocks.state import State


@dataclass(frozen=True)
class LSTMConfig(Config):
    """One layer of torch.nn.LSTM, as wide as the model; it has no heads."""

    def build(self, dim: int, heads: int) -> LSTM:
        return LSTM(dim)


class LSTMState(State):
    """hidden, cell: [B, dim]."""

    hidden: Tensor
    cell: Tensor


class LSTM(Block):
    """torch.nn.LSTM's equations in the form of every block: x [B, T, dim] -> y, LSTMState.

    Computed in the dtype of its weights, under autocast too.
    """

    state_type = LSTMState

    def __init__(self, dim: int) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        self.dim = dim
        self.weight_ih = nn.Parameter(torch.empty(4 * dim, dim))
        self.weight_hh = nn.Parameter(torch.empty(4 * dim, dim))
        self.bias_ih = nn.Parameter(torch.empty(4 * dim))
        self.bias_hh = nn.Parameter(torch.empty(4 * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.LSTM: uniform within 1/sqrt(dim)."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.dim**-0.5), self.dim**-0.5)

    def mix(self, x: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
        weights = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        x = x.to(self.weight_ih.dtype)
        if state is None:
            state = LSTMState(*(x.new_zeros(len(x), self.dim) for _ in range(2)))
        shape = (len(x), self.dim)
        check.tensor("state.hidden", state.hidden, "[B, dim]", shape)
        check.tensor("state.cell", state.cell, "[B, dim]", shape)
        y, *after = lstm(x, state.hidden.to(x.dtype), state.cell.to(x.dtype), weights)
        return y, LSTMState(*after)
