"""The memory layer: projections and gates around the Omega rule (specification section 9).

B batch, T tokens, H heads, D head width, c window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.base import Block, Documents
from atlas_blocks.blocks.conv import ConvState, ShortConv
from atlas_blocks.blocks.gates import FixedGate, Gate
from atlas_blocks.blocks.norm import RMSNorm, unit_length
from atlas_blocks.blocks.parameters import Linear, fill
from atlas_blocks.blocks.settings import takes
from atlas_blocks.config import Config
from atlas_blocks.omega.definition import read_memory
from atlas_blocks.omega.feature_maps import (
    FEATURE_MAPS,
    FeatureMap,
    PolynomialMap,
    SketchMap,
    map_of,
    parts_of,
    polynomial_width,
    sketch_sizes,
    sketch_tables,
    sketch_tables_for,
)
from atlas_blocks.omega.memories import MEMORIES, weight_shapes
from atlas_blocks.omega.op import omega_rule
from atlas_blocks.omega.polynomial_node import as_node
from atlas_blocks.omega.rule import NAMES as RULE_NAMES
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState, initial_state
from atlas_blocks.omega.updates import UPDATES
from atlas_blocks.state import State

# Momentum that never decays (theta = 1) at retention 1 is an undamped oscillator, which the chunk's
# delayed gradients drive apart, so the layer's theta stays below this.
LARGEST_THETA = 0.99
# What the layer makes itself, by its own settings; every other map is made by its class.
POLYNOMIAL = ("polynomial", "sketch", "taylor_exp")
OWN_MAPS = ("identity", *POLYNOMIAL)
FIXABLE = ("alpha", "eta", "theta", "gamma", "coefficients")
# What was read, of the queries [B, T, H, D], what the memory answers [B, T, H, D], and its state.
Reading = Callable[[Tensor, Tensor, OmegaState], Tensor]


@dataclass(frozen=True)
class AtlasMemoryConfig(Config):
    """What a memory layer computes. The defaults are Atlas; specification section 8 has the rest.

    memory, objective, update, window, chunk_size, ns_steps, ns_every: see `Rule`.
    momentum: whether theta is there. feature_map: "polynomial" (exact, C(D + degree, degree) wide,
    learnable coefficients), "sketch" (TensorSketch of it, `sketch_width` wide, None = twice the
    head width; its tables follow from `sketch_seed`), "taylor_exp" (polynomial with fixed 1/n!),
    "identity", or a name given to `register_feature_map`. degree: p.
    expansion: hidden units of a deep memory, as a multiple of the head width.
    errors: None is "online" for update="gd", where "chunk" may diverge, and "chunk" for others.
    decay_to: None is "initial" for a deep memory, whose hidden units fade away where retention
    leads to "zero", and "zero" for a matrix.
    conv_width, gate_rank: of the short convolution and of the gates' low-rank Linears.
    retention_init, eta_init, momentum_init, own_init, lag_init: what alpha, eta, theta, the gamma
    of the token itself and that of older lags start at. eta_init: None is the update's own, see
    `UPDATES`. retention_init: a pair spreads the heads between the two, 1 - alpha evenly in its
    logarithm (RetNet).
    fixed: which of "alpha", "eta", "theta", "gamma" and "coefficients" (of the feature map) keep
    the value they start at, for every token and throughout training; a fixed gate may be 0 or 1.
    initial_memory: M_0, "learned" or, for a matrix memory, "zero" (no gradient in deep ones).
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
    sketch_seed: int = 0
    expansion: int = 4
    ns_steps: int = 5
    ns_every: int = 1
    errors: str | None = None
    decay_to: str | None = None
    conv_width: int = 4
    gate_rank: int = 32
    retention_init: float | tuple[float, float] = 0.99
    eta_init: float | None = None
    momentum_init: float = 0.5
    own_init: float = 0.98
    lag_init: float = 0.02
    fixed: tuple[str, ...] = ()
    initial_memory: str = "learned"

    def __post_init__(self) -> None:
        check.boolean("momentum", self.momentum)
        check.choice("memory", self.memory, MEMORIES)
        check.choice("update", self.update, UPDATES)
        self.rule  # noqa: B018  (its checks)
        check.choice("feature_map", self.feature_map, {"identity", "taylor_exp", *FEATURE_MAPS})
        for name in ("expansion", "conv_width", "gate_rank", "degree"):
            check.at_least(name, getattr(self, name), 1)
        check.at_least("sketch_seed", self.sketch_seed, 0)
        if self.feature_map == "sketch":
            check.at_least("degree", self.degree, 2)
        if self.sketch_width is not None:
            check.at_least("sketch_width", self.sketch_width, 1)
        check.choice("initial_memory", self.initial_memory, ("learned", "zero"))
        if self.initial_memory == "zero" and not self.rule.structure.linear:
            check.fail("initial_memory", f'"learned" for memory={self.memory!r}', "'zero'")
        if not isinstance(self.fixed, tuple):
            check.fail("fixed", "a tuple of names", repr(self.fixed))
        for name in self.fixed:
            check.choice("fixed", name, FIXABLE)
        self._check_start("alpha", "retention_init", *self._retention_ends())
        if self.eta_init is not None:
            self._check_start("eta", "eta_init", self.eta_init)
        self._check_start("theta", "momentum_init", self.momentum_init, top=LARGEST_THETA)
        self._check_start("gamma", "own_init", self.own_init)
        self._check_start("gamma", "lag_init", self.lag_init)

    @property
    def rule(self) -> Rule:
        """What the layer's memory computes, None resolved."""
        fields = {name: getattr(self, name) for name in RULE_NAMES}
        if self.errors is None:
            fields["errors"] = "online" if UPDATES[self.update].direction is None else "chunk"
        if self.decay_to is None:
            fields["decay_to"] = "zero" if MEMORIES[self.memory].linear else "initial"
        return Rule(**fields)

    def _retention_ends(self) -> tuple[float, float]:
        ends = self.retention_init
        if not isinstance(ends, tuple):
            return ends, ends
        if len(ends) != 2:
            check.fail("retention_init", "a number or a pair of them", repr(ends))
        return ends

    def _check_start(self, gate: str, name: str, *starts: float, top: float = 1.0) -> None:
        # A sigmoid reaches neither end, a constant does.
        margin = 0.0 if gate in self.fixed else 1e-6
        for start in starts:
            check.between(name, start, margin, top - margin)

    def retentions(self, heads: int) -> list[float]:
        """alpha of every head at the start."""
        first, last = self._retention_ends()
        if first == last:
            return heads * [first]
        spread = [head / max(1, heads - 1) for head in range(heads)]
        return [1 - (1 - first) ** (1 - x) * (1 - last) ** x for x in spread]

    def build(self, dim: int, heads: int) -> AtlasMemory:
        return AtlasMemory(dim, heads, self)


class MemoryState(State):
    """conv: tails of the short convolution; rule: the memory itself."""

    conv: ConvState
    rule: OmegaState


class FixedMemory(State):
    """weights: of an OmegaState, which a layer given this as its state reads and never writes;
    None: M_0."""

    EXACT = ("weights",)

    weights: tuple[Tensor, ...] | None


class InitialMemory(nn.Module):
    """M_0, learned: () -> a list of [H, dout, din] for each of the memory's weights.

    1 / sqrt(din) entries before training. Parameters "0", "1", ...
    """

    def __init__(self, heads: int, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(str(i), nn.Parameter(torch.empty(heads, *shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self) -> list[Tensor]:
        # Copies: what shards or offloads this module takes its own away again.
        return [weight.clone() for weight in self.parameters()]


class FixedFeatureMap(nn.Module):
    """() -> a feature map of that name, whose tensors are buffers "0", "1", ..."""

    def __init__(self, name: str, phi: FeatureMap) -> None:
        super().__init__()
        self.name = name
        tensors, self.numbers = parts_of(phi, name)
        for i, tensor in enumerate(tensors):
            self.register_buffer(str(i), tensor)

    def forward(self) -> FeatureMap | None:
        return map_of(self.name, list(self.buffers()), self.numbers)


class AtlasMemory(Block):
    """A layer whose memory is optimised at test time over a window of tokens (ATLAS Fig. 3).

        q, k, v = silu(conv(W x)), q and k of unit length
        alpha, eta, theta, gamma = sigmoid(low-rank Linears of x), or constants
        M_t by the Omega rule; y = W_out (norm(M_t(phi(q_t))) * silu(W_gate x))

    x [B, T, dim] -> y [B, T, dim]; state MemoryState of a size that does not depend on T. With a
    FixedMemory in place of a state: see `recall`.
    heads must divide dim. Raises ValueError where it does not, and as `Block.forward` does.
    """

    state_type = MemoryState
    buckets: Tensor | None
    coefficients: Tensor
    signs: Tensor | None

    @takes(AtlasMemoryConfig)
    def __init__(
        self, dim: int, heads: int, config: AtlasMemoryConfig = AtlasMemoryConfig()
    ) -> None:
        super().__init__()
        check.at_least("dim", dim, 1)
        check.at_least("heads", heads, 1)
        if dim % heads:
            check.fail("heads", f"a divisor of dim = {dim}", heads)
        width = dim // heads
        self.dim, self.heads, self.width, self.config = dim, heads, width, config
        c = config

        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, c.conv_width)
        self.alpha = self._gate("alpha", c.retentions(heads))
        eta = UPDATES[c.update].eta_init if c.eta_init is None else c.eta_init
        self.eta = self._gate("eta", heads * [eta])
        self.theta = None
        if c.momentum:
            self.theta = self._gate("theta", heads * [c.momentum_init], LARGEST_THETA)
        self.gamma = self._gate("gamma", heads * [c.own_init, *(c.window - 1) * [c.lag_init]])

        self._make_feature_map(width)
        features = self.feature_width(width)
        self.shapes = weight_shapes(c.memory, features, width, c.expansion * width)
        self.memory = InitialMemory(heads, self.shapes if c.initial_memory == "learned" else ())
        self.norm = RMSNorm(width)
        self.gate = Linear(dim, dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        self.reset_parameters()

    def tensor_plan(self) -> dict[str, tuple[int, int]]:
        """Heads never meet but in `out`."""
        plan = {"qkv.weight": (0, 3), "conv.weight": (1, 3), "gate.weight": (0, 1)}
        for name in self._gates():
            plan |= {f"{name}.1.{part}": (0, 1) for part in ("weight", "bias")}
        plan |= {f"memory.{name}": (0, 1) for name, _ in self.memory.named_parameters()}
        return plan | {"out.weight": (1, 1)}

    def take_heads(self, rank: int, ranks: int) -> None:
        self.heads //= ranks
        self.conv.dim //= ranks
        for name in ("alpha", "eta", "theta", "gamma"):
            if isinstance(gate := getattr(self, name), FixedGate):
                size = len(gate.values) // ranks
                gate.values = gate.values[rank * size : (rank + 1) * size]
                gate.reset_parameters()

    def _gates(self) -> list[str]:
        """Those that are learned."""
        names = ("alpha", "eta", "theta", "gamma")
        return [name for name in names if isinstance(getattr(self, name), Gate)]

    def _gate(self, name: str, init: list[float], top: float = 1.0) -> Gate | FixedGate:
        if name in self.config.fixed:
            return FixedGate(init)
        return Gate(self.dim, self.config.gate_rank, init, top)

    def _learns_coefficients(self) -> bool:
        c = self.config
        return c.feature_map in ("polynomial", "sketch") and "coefficients" not in c.fixed

    def _make_feature_map(self, width: int) -> None:
        c = self.config
        if self._learns_coefficients():
            # a_n = exp(log a_n) stays positive.
            self.log_coefficients = nn.Parameter(torch.empty(c.degree + 1))
        elif c.feature_map in POLYNOMIAL:
            self.register_buffer("coefficients", torch.empty(c.degree + 1))
        if c.feature_map not in OWN_MAPS:
            made = FEATURE_MAPS[c.feature_map].cls.of(width, c.degree)
            is_module = isinstance(made, nn.Module)
            self.features = made if is_module else FixedFeatureMap(c.feature_map, made)
        # Tables that a checkpoint brought; None: those that follow from the config.
        self.register_buffer("buckets", None)
        self.register_buffer("signs", None)
        if c.feature_map == "sketch":
            self.sketch_width = 2 * width if c.sketch_width is None else c.sketch_width
            sketch_sizes(width, self.sketch_width, c.degree)  # or a ValueError

    def feature_width(self, width: int) -> int:
        """Dphi: the width of keys after the feature map."""
        c = self.config
        if c.feature_map not in OWN_MAPS:
            phi = self.feature_map()
            assert phi is not None
            return phi.width_of(width)
        if c.feature_map == "sketch":
            return self.sketch_width
        return width if c.feature_map == "identity" else polynomial_width(width, c.degree)

    def feature_map(self) -> FeatureMap | None:
        """phi with its present coefficients, as `omega_rule` takes it."""
        name = self.config.feature_map
        if name == "identity":
            return None
        if name not in OWN_MAPS:
            return self.features()
        learned = self._learns_coefficients()
        coefficients = self.log_coefficients.exp() if learned else self.coefficients
        if name != "sketch":
            return PolynomialMap(coefficients)
        if self.buckets is not None and self.signs is not None:
            return SketchMap(coefficients, self.buckets, self.signs, self.sketch_width)
        c, width = self.config, self.width
        tables = sketch_tables_for(coefficients, width, self.sketch_width, c.degree, c.sketch_seed)
        return SketchMap(coefficients, *tables, self.sketch_width)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Older checkpoints have tables of their own, drawn at random: they are kept."""
        coefficients = {prefix + name for name in ("coefficients", "log_coefficients")}
        if self.config.feature_map == "sketch" and not coefficients.isdisjoint(state_dict):
            self.use_own_tables(prefix + "buckets" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def use_own_tables(self, own: bool) -> None:
        """Room for tables that are part of the layer's data, or those of its config."""
        self.buckets = self.signs = None
        if own:
            c, width = self.config, self.width
            where = next(self.parameters()).device
            tables = sketch_tables(width, self.sketch_width, c.degree, c.sketch_seed, where)
            self.buckets, self.signs = tables

    def initial_weights(self, like: Tensor) -> list[Tensor]:
        """M_0, a list of [H, dout, din]; zeros have the device and dtype of `like`."""
        if self.config.initial_memory == "learned":
            return self.memory()
        return [like.new_zeros(self.heads, *shape) for shape in self.shapes]

    def reset_parameters(self) -> None:
        """a_n = 1/n!, and the sketch that follows from the config."""
        if self.config.feature_map not in POLYNOMIAL:
            return
        factorials = [math.factorial(n) for n in range(self.config.degree + 1)]
        if self._learns_coefficients():
            fill(self.log_coefficients, [-math.log(n) for n in factorials])
        else:
            fill(self.coefficients, [1 / n for n in factorials])
        if self.config.feature_map == "sketch":
            self.use_own_tables(False)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        cu_seqlens: Tensor | Documents | None = None,
        mask: Tensor | None = None,
        detach_state: bool = True,
        place: int | None = None,
        read: Reading | None = None,
    ) -> tuple[Tensor, Any]:
        """As `Block.forward`; x [B, T, dim], FixedMemory -> `recall`, what it has read.

        For blocks that a memory is a part of: place, see `omega_rule`; read(q, y, rule) takes the
        place of what was read, y [B, T, H, D], of a memory whose state after the call is `rule`.
        With either, x, the state and Documents are taken unchecked, and the state returned stays
        in the graph.
        """
        if isinstance(state, FixedMemory):
            weights = state.weights
            if weights is None:
                weights = self.initial_state(x).rule.weights
            return self.recall(x, weights), FixedMemory(weights)
        if place is not None or read is not None:
            assert cu_seqlens is None or isinstance(cu_seqlens, Documents)
            return self.mix(x, state, cu_seqlens, place=place, read=read)
        return super().forward(
            x, state, cu_seqlens=cu_seqlens, mask=mask, detach_state=detach_state
        )

    def mix(
        self,
        x: Tensor,
        state: MemoryState | None,
        documents: Documents | None = None,
        place: int | None = None,
        read: Reading | None = None,
    ) -> tuple[Tensor, MemoryState]:
        if state is None and documents is None and x.shape[1] == 0:
            return self.out(self.gate(x)), self.initial_state(x)
        conv, rule = (None, None) if state is None else (state.conv, state.rule)
        q, k, v, conv = self.project(x, conv, documents)
        y, rule = self.write(x, q, k, v, rule, documents, place)
        if read is not None:
            y = read(q, y, rule)
        return self.answer(x, y), MemoryState(conv, rule)

    mix_packed = mix

    def project(
        self, x: Tensor, conv: ConvState | None, documents: Documents | None = None
    ) -> tuple[Tensor, Tensor, Tensor, ConvState]:
        """q, k and v of x [B, T, dim], [B, T, H, D] each, and the convolution's state."""
        qkv, after = self.conv(
            check.whole("qkv", self.qkv(x), 3 * self.heads * self.width),
            conv,
            cu_seqlens=documents,
            detach_state=False,
        )
        q, k, v = F.silu(qkv).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return unit_length(q), unit_length(k), v, after

    def write(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rule: OmegaState | None,
        documents: Documents | None = None,
        place: int | None = None,
    ) -> tuple[Tensor, OmegaState]:
        """Write k and v with the gates of x, and read q: M_t(phi(q_t)) [B, T, H, D], the memory's
        state."""
        return omega_rule(
            q,
            k,
            v,
            alpha=self.alpha(x),
            eta=self.eta(x),
            theta=None if self.theta is None else self.theta(x),
            gamma=self.gamma(x).unflatten(-1, (self.heads, self.config.window)),
            weights=self.initial_weights(q),
            rule=self.config.rule,
            feature_map=self.feature_map(),
            state=rule,
            cu_seqlens=documents and documents.cu_seqlens,
            place=place,
        )

    def answer(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output for x [B, T, dim], of which y [B, T, H, D] was read."""
        return self.out(self.norm(y).flatten(-2) * F.silu(self.gate(x)))

    def initial_state(self, x: Tensor) -> MemoryState:
        """The state before the first token of x [B, T, dim]."""
        none = x.new_zeros(len(x), 0, self.heads, self.width)
        weights, past = self.initial_weights(none), self.config.conv_width - 1
        start = initial_state(none, none, weights, self.config.rule, self.theta is not None)
        return MemoryState(ConvState(x.new_zeros(len(x), past, self.conv.dim)), start)

    def check_weights(self, name: str, weights: Sequence[Tensor], *rows: int) -> None:
        """Raise ValueError where they are not of this layer's shapes, [*rows, H, dout, din]."""
        wanted = [(*rows, self.heads, *shape) for shape in self.shapes]
        if [tuple(w.shape) for w in weights] != wanted:
            check.fail(name, f"shapes {wanted}", [list(w.shape) for w in weights])

    def recall(self, queries: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Read a fixed memory: queries [B, T, dim], weights of an OmegaState -> [B, T, dim].

        `layer(queries, FixedMemory(weights))` is the same, and is seen by what hooks the layer's
        forward to bring its parameters (FSDP, offloading).
        """
        self.check_weights("state.weights", weights, len(queries))
        found = FixedMemory(weights).fitted(queries).weights
        assert found is not None
        q = unit_length(queries.unflatten(-1, (self.heads, -1)))
        return self.norm(self.read_fixed(q, found)).flatten(-2)

    def read_fixed(self, q: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """`read_memory` with this layer's memory and feature map: q [B, T, H, D]."""
        phi = as_node(self.feature_map()) if torch.compiler.is_compiling() else self.feature_map()
        return read_memory(q, weights, memory=self.config.memory, feature_map=phi)
