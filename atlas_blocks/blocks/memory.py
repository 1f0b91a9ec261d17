"""The memory layer: projections and gates around the Omega rule (specification section 9).

B batch, T tokens, H heads, D head width, c window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.base import Block
from atlas_blocks.blocks.conv import ConvState, ShortConv
from atlas_blocks.blocks.norm import RMSNorm
from atlas_blocks.config import Config
from atlas_blocks.functional.features import (
    FeatureMap,
    PolynomialMap,
    SketchMap,
    polynomial_width,
    sketch_tables,
    taylor_coefficients,
)
from atlas_blocks.functional.memories import MEMORIES, weight_shapes
from atlas_blocks.functional.omega_rule import read_memory
from atlas_blocks.functional.rule import OmegaState
from atlas_blocks.ops.omega_rule import omega_rule
from atlas_blocks.state import State

# Momentum that never decays (theta = 1) at retention 1 is an undamped oscillator, which the chunk's
# delayed gradients drive apart, so the layer's theta stays below this.
MAX_THETA = 0.99
FEATURE_MAPS = ("identity", "polynomial", "sketch", "taylor_exp")


@dataclass(frozen=True)
class AtlasMemoryConfig(Config):
    """What a memory layer computes. The defaults are Atlas; specification section 8 has the rest.

    memory, objective, update, window, chunk_size, ns_steps, ns_every: see `omega_rule`.
    momentum: whether theta is there. feature_map: "polynomial" (exact, C(D + degree, degree) wide,
    learnable coefficients), "sketch" (TensorSketch of it, `sketch_width` wide, None = twice the
    head width), "taylor_exp" (polynomial with fixed 1/n!), "identity". degree: p.
    expansion: hidden units of a deep memory, as a multiple of the head width.
    write_discount: None turns it on for update="gd".
    conv_width, gate_rank: of the short convolution and of the gates' low-rank Linears.
    retention_init, eta_init, momentum_init, lag_init: what alpha, eta, theta and the gamma of
    older lags start at; gamma of the token itself starts at 0.98. eta_init: None is 0.5 for
    update="gd" and 0.05 for "muon", whose steps all have spectral size 1, whatever the error.
    Raises ValueError naming the bad field.
    """

    memory: str = "mlp"
    objective: str = "l2"
    update: str = "muon"
    window: int = 16
    chunk_size: int = 64
    momentum: bool = True
    feature_map: str = "sketch"
    degree: int = 2
    sketch_width: int | None = None
    expansion: int = 4
    ns_steps: int = 5
    ns_every: int = 1
    write_discount: bool | None = None
    conv_width: int = 4
    gate_rank: int = 32
    retention_init: float = 0.99
    eta_init: float | None = None
    momentum_init: float = 0.5
    lag_init: float = 0.02

    def __post_init__(self) -> None:
        check.choice("memory", self.memory, MEMORIES)
        check.boolean("momentum", self.momentum)
        if self.write_discount is not None:
            check.boolean("write_discount", self.write_discount)
        check.choice("objective", self.objective, ("l2", "dot"))
        check.choice("update", self.update, ("gd", "muon"))
        check.choice("feature_map", self.feature_map, FEATURE_MAPS)
        for name in (
            "window",
            "chunk_size",
            "expansion",
            "ns_every",
            "conv_width",
            "gate_rank",
            "degree",
        ):
            check.at_least(name, getattr(self, name), 1)
        check.at_least("ns_steps", self.ns_steps, 0)
        if self.feature_map == "sketch":
            check.at_least("degree", self.degree, 2)
        if self.sketch_width is not None:
            check.at_least("sketch_width", self.sketch_width, 1)
        for name in ("retention_init", "lag_init"):
            check.between(name, getattr(self, name), 1e-6, 1 - 1e-6)
        if self.eta_init is not None:
            check.between("eta_init", self.eta_init, 1e-6, 1 - 1e-6)
        check.between("momentum_init", self.momentum_init, 1e-6, MAX_THETA - 1e-6)

    def build(self, dim: int, heads: int) -> AtlasMemory:
        return AtlasMemory(dim, heads, self)


@dataclass(frozen=True)
class MemoryState(State):
    """conv: tails of the short convolution; rule: the memory itself."""

    conv: ConvState
    rule: OmegaState


class Gate(nn.Sequential):
    """x [B, T, dim] -> top * sigmoid(W_2 W_1 x + bias) [B, T, width], `init` before training."""

    def __init__(self, dim: int, rank: int, init: list[float], top: float = 1.0) -> None:
        down, up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, len(init))
        super().__init__(down, up)
        self.top = top
        self.init = [math.log(y / (top - y)) for y in init]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        down, up = cast("tuple[nn.Linear, nn.Linear]", tuple(self))
        down.reset_parameters()
        nn.init.zeros_(up.weight)
        with torch.no_grad():
            up.bias.copy_(torch.tensor(self.init))

    def forward(self, x: Tensor) -> Tensor:
        # Decays need float32 whatever autocast makes of the Linears.
        logits = super().forward(x)
        return self.top * torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


class AtlasMemory(Block):
    """A layer whose memory is optimised at test time over a window of tokens (ATLAS Fig. 3).

        q, k, v = silu(conv(W x)), q and k of unit length
        alpha, eta, theta, gamma = sigmoid(low-rank Linears of x)
        M_t by the Omega rule; y = W_out (norm(M_t(phi(q_t))) * silu(W_gate x))

    x [B, T, dim] -> y [B, T, dim]; state MemoryState of a size that does not depend on T.
    heads must divide dim. Raises ValueError where it does not, and as `Block.forward` does.
    """

    state_type = MemoryState
    buckets: Tensor
    signs: Tensor

    def __init__(
        self, dim: int, heads: int, config: AtlasMemoryConfig = AtlasMemoryConfig()
    ) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        check.at_least("heads", heads, 1)
        if dim % heads:
            check.fail("heads", f"a divisor of dim = {dim}", heads)
        self.dim, self.heads, self.config = dim, heads, config
        width = dim // heads
        c = config

        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, c.conv_width)
        self.alpha = Gate(dim, c.gate_rank, heads * [c.retention_init])
        eta = c.eta_init or (0.5 if c.update == "gd" else 0.05)
        self.eta = Gate(dim, c.gate_rank, heads * [eta])
        self.theta = None
        if c.momentum:
            self.theta = Gate(dim, c.gate_rank, heads * [c.momentum_init], MAX_THETA)
        self.gamma = Gate(dim, c.gate_rank, heads * [0.98, *(c.window - 1) * [c.lag_init]])

        self._make_feature_map(width)
        features = self.feature_width(width)
        self.memory = nn.ParameterList(
            torch.empty(heads, *shape)
            for shape in weight_shapes(c.memory, features, width, c.expansion * width)
        )
        self.norm = RMSNorm(width)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def _make_feature_map(self, width: int) -> None:
        c = self.config
        if c.feature_map in ("polynomial", "sketch"):
            # a_n = exp(log a_n) stays positive.
            self.log_coefficients = nn.Parameter(torch.empty(c.degree + 1))
        if c.feature_map == "sketch":
            self.sketch_width = 2 * width if c.sketch_width is None else c.sketch_width
            for name, table in zip(
                ("buckets", "signs"), sketch_tables(width, self.sketch_width, c.degree), strict=True
            ):
                self.register_buffer(name, table)

    def feature_width(self, width: int) -> int:
        """Dphi: the width of keys after the feature map."""
        c = self.config
        if c.feature_map == "sketch":
            return self.sketch_width
        return width if c.feature_map == "identity" else polynomial_width(width, c.degree)

    def feature_map(self) -> FeatureMap | None:
        """phi with its present coefficients, as `omega_rule` takes it."""
        name = self.config.feature_map
        if name == "identity":
            return None
        if name == "taylor_exp":
            return PolynomialMap(taylor_coefficients(self.config.degree).to(self.out.weight.device))
        coefficients = self.log_coefficients.exp()
        if name == "polynomial":
            return PolynomialMap(coefficients)
        return SketchMap(coefficients, self.buckets, self.signs, self.sketch_width)

    def reset_parameters(self) -> None:
        """M_0 with 1/sqrt(din) entries, gates at their initial values, a_n = 1/n!."""
        for weight in self.memory:
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        if self.config.feature_map in ("polynomial", "sketch"):
            with torch.no_grad():
                self.log_coefficients.copy_(taylor_coefficients(self.config.degree).log())

    def mix(self, x: Tensor, state: MemoryState | None) -> tuple[Tensor, MemoryState]:
        c = self.config
        qkv, conv = self.conv(self.qkv(x), state and state.conv, detach_state=False)
        q, k, v = F.silu(qkv).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        y, rule = omega_rule(
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            alpha=self.alpha(x),
            eta=self.eta(x),
            theta=None if self.theta is None else self.theta(x),
            gamma=self.gamma(x).unflatten(-1, (self.heads, c.window)),
            weights=list(self.memory),
            memory=c.memory,
            objective=c.objective,
            feature_map=self.feature_map(),
            update=c.update,
            ns_steps=c.ns_steps,
            ns_every=c.ns_every,
            chunk_size=c.chunk_size,
            write_discount=c.update == "gd" if c.write_discount is None else c.write_discount,
            state=state and state.rule,
        )
        y = self.norm(y).flatten(-2) * F.silu(self.gate(x))
        return self.out(y), MemoryState(conv, rule)

    def recall(self, queries: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Read a fixed memory: queries [B, T, dim], weights of an OmegaState -> [B, T, dim]."""
        q = F.normalize(queries.unflatten(-1, (self.heads, -1)), dim=-1)
        read = read_memory(q, weights, memory=self.config.memory, feature_map=self.feature_map())
        return self.norm(read).flatten(-2)
