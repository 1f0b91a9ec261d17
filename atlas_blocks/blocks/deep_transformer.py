"""The rule with phi*: DeepTransformer, SWDT and Dot (specification section 8), one layer.

B batch, T tokens, H heads of width D, G <= H heads of keys and values, c window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.attention.definition import rotary
from atlas_blocks.blocks.base import Block
from atlas_blocks.blocks.conv import ConvState, ShortConv
from atlas_blocks.blocks.gates import Gate, GateLogits
from atlas_blocks.blocks.grouped_query import for_every_query, kv_head_count
from atlas_blocks.blocks.memory import AtlasMemoryConfig
from atlas_blocks.blocks.norm import RMSNorm, rms_norm, unit_length
from atlas_blocks.blocks.parameters import Linear
from atlas_blocks.blocks.settings import takes
from atlas_blocks.config import Config
from atlas_blocks.kernel_attention.definition import KernelState
from atlas_blocks.kernel_attention.op import kernel_attention
from atlas_blocks.state import State


@dataclass(frozen=True)
class DeepTransformerConfig(Config):
    """What a layer with exact phi* and a matrix memory computes; the defaults are DeepTransformer.

    objective, window, chunk_size, normalise: see `kernel_attention`. "l2" needs qk_norm="unit", and
    its write strength counts in units of 1 / exp(scale), at which one write stores a key's value.
    errors: "online" (specification 9b) or "chunk" with "l2"; they are the same with "dot", whose
    writes do not depend on what is stored.
    gates: "learned" starts as a memory layer's do; "neutral" starts at exactly 1 (the gamma of
    older lags at 0), where it changes nothing, and learns from there; "none".
    qk_norm: "unit" length, "rms" with a learned scale, or "none". scale: of the scores; None is
    sqrt(D) for unit length, else 1 / sqrt(D).
    rope_base: base of the rotary frequencies; None: no positions. rope_width: of every head the
    first so many coordinates turn; None: all. kv_heads: heads of keys and
    values, None: as many as of queries. head_width: None is dim / heads. qkv_bias, out_bias: of the
    projections. conv_width: short convolution and SiLU after the first projection; None: neither.
    output_gate: RMSNorm of each head's output, times SiLU(Linear x).
    gate_rank, retention_init, eta_init, lag_init: of learned gates, as in AtlasMemoryConfig.
    eta_max: their largest write strength. "l2" at 2 turns what a key reads into its negative, so
    that a layer can follow a state (Grazzi et al. 2024). Online errors would cut that to 1, at
    which a key is written whole: it needs errors="chunk", exact with chunk_size and window 1.
    Raises ValueError naming the bad field.
    """

    objective: str = "dot"
    window: int = 1
    chunk_size: int = 64
    normalise: bool = True
    errors: str = "online"
    gates: str = "learned"
    qk_norm: str = "unit"
    scale: float | None = None
    rope_base: float | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    conv_width: int | None = 4
    output_gate: bool = True
    gate_rank: int = 32
    retention_init: float = 0.99
    eta_init: float = 0.5
    lag_init: float = 0.02
    eta_max: float = 1.0
    rope_width: int | None = None

    def __post_init__(self) -> None:
        check.choice("objective", self.objective, ("dot", "l2"))
        check.choice("gates", self.gates, ("learned", "neutral", "none"))
        check.choice("errors", self.errors, ("chunk", "online"))
        check.choice("qk_norm", self.qk_norm, ("unit", "rms", "none"))
        for name in ("normalise", "qkv_bias", "out_bias", "output_gate"):
            check.boolean(name, getattr(self, name))
        for name in ("window", "chunk_size", "gate_rank"):
            check.at_least(name, getattr(self, name), 1)
        for name in ("kv_heads", "head_width", "conv_width"):
            if getattr(self, name) is not None:
                check.at_least(name, getattr(self, name), 1)
        if self.scale is not None:
            check.between("scale", self.scale, 0.0, 1e6)
        if self.rope_base is not None:
            check.between("rope_base", self.rope_base, 1.0, 1e12)
        if self.rope_width is not None:
            check.at_least("rope_width", self.rope_width, 2)
            if self.rope_base is None or self.rope_width % 2:
                check.fail("rope_width", "an even number, with rope_base", self.rope_width)
        for name in ("retention_init", "lag_init"):
            check.between(name, getattr(self, name), 1e-6, 1 - 1e-6)
        check.between("eta_max", self.eta_max, 1e-6, 2.0)
        check.between("eta_init", self.eta_init, 1e-6, self.eta_max - 1e-6)
        if self.eta_max > 1 and self.objective == "l2" and self.errors == "online":
            check.fail("eta_max", 'at most 1 with errors="online"', self.eta_max)
        if self.objective == "l2" and self.qk_norm != "unit":
            check.fail("qk_norm", '"unit" with objective="l2"', repr(self.qk_norm))
        if self.gates == "none" and self.window > 1:
            check.fail("gates", "learned or neutral with a window above 1", repr(self.gates))

    def build(self, dim: int, heads: int) -> DeepTransformerLayer:
        return DeepTransformerLayer(dim, heads, self)


SYSTEMS = {"deep-transformer": ("dot", False), "swdt": ("dot", True), "dot": ("l2", True)}


def phi_star(
    system: str, memory: str = "matrix", window: int = 16, degree: int = 2
) -> DeepTransformerConfig | AtlasMemoryConfig:
    """The layer config of "deep-transformer", "swdt" or "dot" (specification section 8).

    memory: "matrix" takes phi* exactly. A deep memory ("mlp", "gated_mlp") cannot be computed with
    infinitely many features, as the paper's equations ask: it takes the Taylor series of exp up to
    `degree`, in the ordinary memory layer. window: of swdt and dot.
    Raises ValueError for an unknown system or memory.
    """
    check.choice("system", system, SYSTEMS)
    check.choice("memory", memory, ("matrix", "mlp", "gated_mlp"))
    objective, sliding = SYSTEMS[system]
    window = window if sliding else 1
    if memory == "matrix":
        return DeepTransformerConfig(objective=objective, window=window)
    return AtlasMemoryConfig(
        memory=memory,
        objective=objective,
        window=window,
        update="gd",
        momentum=False,
        feature_map="taylor_exp",
        degree=degree,
    )


class DeepTransformerState(State):
    """conv: tail of the short convolution, where there is one; kernel: keys and coefficients."""

    conv: ConvState | None
    kernel: KernelState


class Amount(nn.Module):
    """[width] numbers in [0, 1] that start at exactly 0 and still get a gradient there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        # Straight through: at the bound too the gradient says which way is better.
        return self.weight + (self.weight.clamp(0, 1) - self.weight).detach()


class NeutralGates(nn.Module):
    """x [B, T, dim] -> alpha, eta [B, T, H], gamma [B, T, H, c] that start at 1, 1 and (1, 0, ..).

    alpha = 1 - a_1 sigmoid(..),  eta = 2 sigmoid(..),  gamma = (1, a_2 sigmoid(..), ...)
    """

    def __init__(self, dim: int, heads: int, window: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        lags = heads * (window - 1)
        self.alpha, self.decay = Gate(dim, rank, heads * [0.5]), Amount(heads)
        self.eta = Gate(dim, rank, heads * [1.0], 2.0)
        self.gamma = Gate(dim, rank, lags * [0.5]) if lags else None
        self.reach = Amount(lags) if lags else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha = 1 - self.decay() * self.alpha(x)
        gamma = torch.ones_like(alpha)[..., None]
        if self.gamma is not None and self.reach is not None:
            older = (self.reach() * self.gamma(x)).unflatten(-1, (self.heads, -1))
            gamma = torch.cat([gamma, older], -1)
        return alpha, self.eta(x), gamma

    def untouched(self) -> bool:
        """Whether every gate is still neutral for every input."""
        up = self.eta[1]
        assert isinstance(up, GateLogits)
        amounts = [a.weight for a in (self.decay, self.reach) if a is not None]
        return not any(bool(t.any()) for t in (*amounts, up.weight, up.bias))


class LearnedGates(nn.Module):
    """x [B, T, dim] -> alpha, eta [B, T, H], gamma [B, T, H, c], as in a memory layer."""

    def __init__(self, dim: int, heads: int, c: DeepTransformerConfig) -> None:
        super().__init__()
        self.heads = heads
        self.alpha = Gate(dim, c.gate_rank, heads * [c.retention_init])
        self.eta = Gate(dim, c.gate_rank, heads * [c.eta_init], c.eta_max)
        self.gamma = None
        if c.window > 1:
            self.gamma = Gate(dim, c.gate_rank, heads * [0.98, *(c.window - 1) * [c.lag_init]])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eta = self.eta(x)
        if self.gamma is None:  # a window of the token alone: eta is all that weighs it
            return self.alpha(x), eta, torch.ones_like(eta)[..., None]
        return self.alpha(x), eta, self.gamma(x).unflatten(-1, (self.heads, -1))


class DeepTransformerLayer(Block):
    """Attention generalised: the rule on phi* exactly, with a window, gates and a "l2" objective.

        q, k, v = W x (then convolution and SiLU), q and k normalised (then rotated)
        M_t by the rule with phi*; y = W_out M_t(phi*(q_t)), or of its norm times a gate

    With "dot", window 1, no gates or neutral ones, and normalise it is softmax attention.
    x [B, T, dim] -> y [B, T, dim]; the state DeepTransformerState grows with T.
    Raises ValueError where heads and widths do not fit, and as `Block.forward` does.
    """

    state_type = DeepTransformerState

    @takes(DeepTransformerConfig)
    def __init__(
        self, dim: int, heads: int, config: DeepTransformerConfig = DeepTransformerConfig()
    ) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        check.at_least("heads", heads, 1)
        c = config
        if c.head_width is None and dim % heads:
            check.fail("heads", f"a divisor of dim = {dim}", heads)
        width = c.head_width or dim // heads
        kv_heads = kv_head_count(c.kv_heads, heads)
        if c.rope_base is not None and c.rope_width is None and width % 2:
            check.fail("head width", "an even number with rope_base", width)
        if c.rope_width is not None and c.rope_width > width:
            check.fail("rope_width", f"at most the head width {width}", c.rope_width)
        self.dim, self.heads, self.config = dim, heads, config
        self.width, self.kv_heads = width, kv_heads

        total = (heads + 2 * kv_heads) * width
        self.qkv = Linear(dim, total, bias=c.qkv_bias)
        self.conv = None if c.conv_width is None else ShortConv(total, c.conv_width)
        rms = c.qk_norm == "rms"
        self.q_scale = nn.Parameter(torch.empty(width)) if rms else None
        self.k_scale = nn.Parameter(torch.empty(width)) if rms else None
        self.gates = None
        if c.gates == "learned":
            self.gates = LearnedGates(dim, heads, c)
        elif c.gates == "neutral":
            self.gates = NeutralGates(dim, heads, c.window, c.gate_rank)
        # Reads far from every key are small, not noise: below any eps of float32.
        self.norm = RMSNorm(width, eps=1e-12) if c.output_gate else None
        self.gate = Linear(dim, heads * width, bias=False) if c.output_gate else None
        self.out = Linear(heads * width, dim, bias=c.out_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the parameters that this module itself holds."""
        for scale in (self.q_scale, self.k_scale):
            if scale is not None:
                nn.init.ones_(scale)

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        if self.config.scale is not None:
            return self.config.scale
        return self.width ** (0.5 if self.config.qk_norm == "unit" else -0.5)

    def mix(
        self, x: Tensor, state: DeepTransformerState | None
    ) -> tuple[Tensor, DeepTransformerState]:
        c, H, G = self.config, self.heads, self.kv_heads
        if state is not None and (state.conv is None) != (self.conv is None):
            wanted = "None, as conv_width is" if self.conv is None else "ConvState"
            check.fail("state.conv", wanted, type(state.conv).__name__)
        qkv, conv = check.whole("qkv", self.qkv(x), (H + 2 * G) * self.width), None
        if self.conv is not None:
            qkv, conv = self.conv(qkv, state and state.conv, detach_state=False)
            qkv = F.silu(qkv)
        q, k, v = qkv.unflatten(-1, (-1, self.width)).split([H, G, G], -2)
        q, k = self._normalise(q, self.q_scale), self._normalise(k, self.k_scale)
        if c.rope_base is not None:
            steps = torch.arange(x.shape[1], device=x.device)
            if state is not None:
                position = state.kernel.position
                check.tensor("state.position", position, "[B]", (len(x),), (torch.int64,))
                steps = position.to(x.device)[:, None] + steps
            q, k = (_turned(t, steps, c.rope_base, c.rope_width) for t in (q, k))
        k, v = (for_every_query(t, H, -2) for t in (k, v))
        alpha = eta = gamma = None
        if self.gates is not None:
            alpha, eta, gamma = self.gates(x)
            if c.qk_norm == "unit":
                # One write of strength 1 stores a value: eta counts in units of 1 / exp(k . k).
                eta = eta * math.exp(-self.scale)
        y, kernel = kernel_attention(
            q,
            k,
            v,
            alpha=alpha,
            eta=eta,
            gamma=gamma,
            objective=c.objective,
            scale=self.scale,
            normalise=c.normalise,
            chunk_size=c.chunk_size,
            errors=c.errors,
            state=None if state is None else state.kernel,
        )
        y = (y if self.norm is None else self.norm(y)).flatten(-2)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return self.out(y), DeepTransformerState(conv, kernel)

    def _normalise(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if self.config.qk_norm == "unit":
            return unit_length(x)
        return x if scale is None else rms_norm(x, scale)


def _turned(x: Tensor, positions: Tensor, base: float, width: int | None) -> Tensor:
    """`rotary` of the first `width` coordinates of x [B, T, H, D]."""
    if width is None or width == x.shape[-1]:
        return rotary(x, positions, base)
    return torch.cat([rotary(x[..., :width], positions, base), x[..., width:]], -1)
