"""The table of docs/blocks.md, what every block holds, is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import draw
from torch import nn

import atlas_blocks
from atlas_blocks.blocks.base import Block
from atlas_blocks.blocks.conv import ShortConv
from atlas_blocks.blocks.feed_forward import SquaredReLU, SwiGLU
from atlas_blocks.blocks.lstm import LSTM

PAGE = (Path(__file__).parents[2] / "docs" / "blocks.md").read_text()
TABLE = re.findall(r"^\| `(\w+)` \| (yes|no) \| (yes|no) \| (yes|no) \|$", PAGE, re.MULTILINE)
PARTS = (Block, ShortConv, SwiGLU, SquaredReLU)
SIZES: dict[Any, tuple[int, ...]] = {LSTM: (16,)}


def block_named(name: str) -> Block:
    kind = LSTM if name == "LSTM" else getattr(atlas_blocks, name)
    return kind(*SIZES.get(kind, (16, 2))).double()


def test_the_table_lists_every_block_but_parts_of_blocks() -> None:
    kinds = [kind for kind in vars(atlas_blocks).values() if isinstance(kind, type)]
    blocks = {k.__name__ for k in kinds if issubclass(k, Block) and k not in PARTS}
    assert blocks <= {name for name, *_ in TABLE}


@pytest.mark.parametrize(("name", "norm", "residual", "mlp"), TABLE)
@torch.no_grad()
def test_a_block_holds_what_the_table_says(name: str, norm: str, residual: str, mlp: str) -> None:
    block, x = block_named(name), draw(2, 9, 16)
    assert any(isinstance(m, SwiGLU) for m in block.modules()) == (mlp == "yes")
    assert any(n.endswith("mixer_norm") for n, _ in block.named_modules()) == (norm == "yes")
    for p in block.parameters():
        nn.init.zeros_(p)
    assert torch.equal(block(x)[0], x if residual == "yes" else torch.zeros_like(x))
