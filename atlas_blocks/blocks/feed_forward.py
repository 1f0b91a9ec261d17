"""The feed-forward layers of the stacks.

B batch, T tokens, N = B T, E experts, k experts of a token, W hidden units of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.blocks.parameters import GroupedLinear, Linear
from atlas_blocks.config import Config


def default_width(dim: int, kind: MLP = "swiglu") -> int:
    """Hidden units, of each expert where there are some: 8/3 dim, rounded up to a multiple of 64;
    half as many again for "relu2", whose two matrices then have as many parameters as three."""
    width = -(-8 * dim // 3 // 64) * 64
    return 3 * width // 2 if kind == "relu2" else width


class SwiGLU(Block):
    """y = W_down (silu(W_gate x) * W_up x) (Shazeer 2020). Stateless: its state is None.

    x [B, T, dim] -> y [B, T, dim]. width: hidden units, None = `default_width(dim)`.
    """

    def __init__(self, dim: int, width: int | None = None) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        width = default_width(dim) if width is None else width
        check.at_least("width", width, 1)
        self.dim, self.width = dim, width
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
        self.dim, self.width = dim, width
        self.up = Linear(dim, width, bias=False)
        self.down = Linear(width, dim, bias=False)

    def tensor_plan(self) -> dict[str, tuple[int, int]]:
        return {"up.weight": (0, 1), "down.weight": (1, 1)}

    def mix(
        self, x: Tensor, state: None, documents: Documents | None = None
    ) -> tuple[Tensor, None]:
        return self.down(F.relu(self.up(x)).square()), None

    mix_packed = mix


@dataclass(frozen=True)
class MixtureOfExpertsConfig(Config):
    """experts: E. experts_per_token: k, by the router's largest probabilities. balance: weight of
    the balance loss, which the training loop adds; 0 for none."""

    experts: int = 8
    experts_per_token: int = 2
    balance: float = 0.01

    def __post_init__(self) -> None:
        check.at_least("experts", self.experts, 1)
        check.at_least("experts_per_token", self.experts_per_token, 1)
        if self.experts_per_token > self.experts:
            expected = f"at most experts = {self.experts}"
            check.fail("experts_per_token", expected, self.experts_per_token)
        number = isinstance(self.balance, (int, float)) and not isinstance(self.balance, bool)
        if not (number and 0 <= self.balance < float("inf")):
            check.fail("balance", "a finite number >= 0", repr(self.balance))


class MixtureOfExperts(Block):
    """y = sum over the k chosen experts of p_e SwiGLU_e(x), p the router's softmax over E, made to
    sum to one over the chosen (Jiang et al. 2024, Mixtral). Stateless: its state is None.

    x [B, T, dim] -> y [B, T, dim]. width: hidden units W of one expert, None: `default_width(dim)`.
    No token is dropped, so that y at t depends on x at t alone. The experts are products of unequal
    groups of rows (torch's grouped_mm) where that op takes the dtype and the widths; else, as in
    float64 and in a compiled graph of float32, every expert computes every token, and what it was
    not chosen for counts as nothing. Raises ValueError for a setting out of range.

    balance: after a forward in training, E sum_e f_e P_e (Fedus et al. 2021, Switch, eq. 4): f_e
    the share of the choices that fell on expert e, P_e its mean probability; 1 where all are alike.
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        config: MixtureOfExpertsConfig = MixtureOfExpertsConfig(),
    ) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        width = default_width(dim) if width is None else width
        check.at_least("width", width, 1)
        if not isinstance(config, MixtureOfExpertsConfig):
            check.fail("config", "MixtureOfExpertsConfig", f"{type(config).__name__}, {config!r}")
        self.dim, self.width, self.config = dim, width, config
        self.router = Linear(dim, config.experts, bias=False)
        self.gate = GroupedLinear(config.experts, dim, width)
        self.up = GroupedLinear(config.experts, dim, width)
        self.down = GroupedLinear(config.experts, width, dim)
        self.balance: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # It may be part of a graph, which no copy is.
        return {**self.__dict__, "balance": None}

    def mix(
        self, x: Tensor, state: None, documents: Documents | None = None
    ) -> tuple[Tensor, None]:
        rows = x.reshape(-1, self.dim)
        probabilities = self.router(rows).softmax(-1, dtype=_at_least_float32(x.dtype))  # [N, E]
        shares, chosen = probabilities.topk(self.config.experts_per_token, sorted=False)  # [N, k]
        shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
        experts = torch.arange(self.config.experts, device=x.device)
        counts = (chosen[..., None] == experts).sum((0, 1))  # [E]
        # No tokens (rows that are all padding) have none, and leave that of the others.
        if self.training and torch.is_grad_enabled() and len(rows):
            fractions = counts / chosen.numel()
            balance = self.config.experts * (fractions * probabilities.mean(0)).sum()
            # Of a checkpoint that computes again in a backward it is nobody's loss.
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
                self.balance = balance
        run = self._grouped if self.gate.serves(x) and self.down.serves(x) else self._dense
        return run(rows, shares, chosen, counts).to(x.dtype).view_as(x), None

    mix_packed = mix

    def _grouped(self, rows: Tensor, shares: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by their expert, and back."""
        order = chosen.flatten().argsort(stable=True)  # [N k]
        ends = counts.cumsum(0).to(torch.int32)
        sorted_rows = rows[order // chosen.shape[1]]
        hidden = F.silu(self.gate(sorted_rows, ends)) * self.up(sorted_rows, ends)
        y = self.down(hidden, ends)[order.argsort()].unflatten(0, chosen.shape)
        return (y * shares[..., None]).sum(1)

    def _dense(self, rows: Tensor, shares: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """The definition."""
        y = torch.zeros_like(rows)
        for e in range(self.config.experts):
            mine = chosen == e
            share = (shares * mine).sum(-1, keepdim=True)
            # Of the others it computes zeros, which cannot overflow.
            own = rows.masked_fill(~mine.any(-1, keepdim=True), 0)
            hidden = F.silu(F.linear(own, self.gate.weight[e])) * F.linear(own, self.up.weight[e])
            y = y + share * F.linear(hidden, self.down.weight[e])
        return y


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def balance_loss(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Of the last forward in training, taken off the model: the balance losses of all its mixtures
    of experts by their weights, summed, to be added to the loss; and their mean without weights,
    cut from the graph. None where there are none."""
    found = []
    for module in model.modules():
        if isinstance(module, MixtureOfExperts) and module.balance is not None:
            found.append((module.config.balance, module.balance))
            module.balance = None
    if not found:
        return None
    mean = torch.stack([loss.detach() for _, loss in found]).mean()
    return torch.stack([weight * loss for weight, loss in found]).sum(), mean


MLPS: dict[str, type[SwiGLU] | type[SquaredReLU]] = {"swiglu": SwiGLU, "relu2": SquaredReLU}
MLP = str | MixtureOfExpertsConfig
MOE = "moe"


def checked_mlp(width: int | None, kind: MLP) -> MLP:
    """Of a config's `mlp_width` and `mlp`; "moe" is the config's defaults."""
    if width is not None:
        check.at_least("mlp_width", width, 1)
    if isinstance(kind, MixtureOfExpertsConfig):
        return kind
    check.choice("mlp", kind, (*MLPS, MOE))
    return MixtureOfExpertsConfig() if kind == MOE else kind


def build_mlp(kind: MLP, dim: int, width: int | None) -> Block:
    """The layer that a config's `mlp` and `mlp_width` say."""
    if isinstance(kind, MixtureOfExpertsConfig):
        return MixtureOfExperts(dim, width, kind)
    return MLPS[kind](dim, width)
