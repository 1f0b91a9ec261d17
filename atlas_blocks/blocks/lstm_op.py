"""torch's LSTM as one node of a compiled graph: Dynamo takes no nn.LSTM, and would unroll it.

B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atlas_blocks.autocast import no_autocast
from atlas_blocks.graph import op_pair
from atlas_blocks.graph.contract import own_empty


def lstm(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer (torch.nn.LSTM's equations): x [B, T, D], hidden and cell [B, D].

    weights: of input [4 D, D] and hidden state [4 D, D], two biases [4 D]; one dtype for all.
    Returns y [B, T, D] and the hidden state and cell after token T.
    """
    tensors = [x, hidden, cell, *weights]
    y, hidden, cell = (_node if torch.compiler.is_compiling() else definition)(tensors)
    return y, hidden, cell


def definition(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The op's body: `lstm` of the same tensors in a row."""
    x, hidden, cell, *weights = tensors
    if x.numel() == 0:  # torch's takes no empty sequence
        return [x.clone(), hidden, cell]
    before = [hidden[None], cell[None]]
    with no_autocast(x):
        y, hidden, cell = torch.lstm(
            x,
            before,
            weights,
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=torch.is_grad_enabled(),
            bidirectional=False,
            batch_first=True,
        )
    return [y, hidden[0], cell[0]]


def _fake(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [own_empty(t) for t in tensors[:3]]


_node = op_pair.define_pair("lstm", "", definition, _fake)
