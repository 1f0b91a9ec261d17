"""The feed-forward layers of the stacks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.blocks.parameters import Linear


def default_width(dim: int, kind: str = "swiglu") -> int:
    """Hidden units: 8/3 dim, rounded up to a multiple of 64; half as many again for "relu2", whose
    two matrices then have as many parameters as three."""
    width = -(-8 * dim // 3 // 64) * 64
    return width if kind == "swiglu" else 3 * width // 2


class SwiGLU(Block):
    """y = W_down (silu(W_gate x) * W_up x) (Shazeer 2020). Stateless: its state is None.

    x [B, T, dim] -> y [B, T, dim]. width: hidden units, None = `default_width(dim)`.
    """

    def __init__(self, dim: int, width: int | None = None) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        width = default_width(dim) if width is None else width
        check.at_least("width", width, 1)
        self.dim = dim
        self.gate = Linear(dim, width, bias=False)
        self.up = Linear(dim, width, bias=False)
        self.down = Linear(width, dim, bias=False)

    def tensor_plan(self) -> dict[str, tuple[int, int]]:
        return {"gate.weight": (0, 1), "up.weight": (0, 1), "down.weight": (1, 1)}

    def mix(
        self, x: Tensor, state: None, documents: Documents | None = None
    ) -> tuple[Tensor, None]:
        return self.down(F.silu(self.gate(x)) * self.up(x)), None

    mix_packed = mix


class SquaredReLU(Block):
    """y = W_down relu(W_up x)^2 (So et al. 2021). Stateless: its state is None.

    x [B, T, dim] -> y [B, T, dim]. width: hidden units, None = `default_width(dim, "relu2")`.
    """

    def __init__(self, dim: int, width: int | None = None) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        width = default_width(dim, "relu2") if width is None else width
        check.at_least("width", width, 1)
        self.dim = dim
        self.up = Linear(dim, width, bias=False)
        self.down = Linear(width, dim, bias=False)

    def tensor_plan(self) -> dict[str, tuple[int, int]]:
        return {"up.weight": (0, 1), "down.weight": (1, 1)}

    def mix(
        self, x: Tensor, state: None, documents: Documents | None = None
    ) -> tuple[Tensor, None]:
        return self.down(F.relu(self.up(x)).square()), None

    mix_packed = mix


MLPS: dict[str, type[SwiGLU] | type[SquaredReLU]] = {"swiglu": SwiGLU, "relu2": SquaredReLU}


def check_mlp(width: int | None, kind: str) -> None:
    """Of a config's `mlp_width` and `mlp`."""
    if width is not None:
        check.at_least("mlp_width", width, 1)
    check.choice("mlp", kind, MLPS)
