"""What several test files share: inputs of the rule, comparisons, runs in pieces, small blocks."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    Block,
    Config,
    DeepTransformerConfig,
    LSTMConfig,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsGateMixerConfig,
    MemoryAsLayerConfig,
    MemoryCachingConfig,
    ShortConv,
    SlidingWindowAttentionConfig,
    SquaredReLU,
    SwiGLU,
    TNTConfig,
    functional,
    ops,
)
from atlas_blocks.blocks.deep_transformer import Amount
from atlas_blocks.blocks.gates import Gate
from atlas_blocks.functional import (
    OmegaState,
    PolynomialMap,
    SketchMap,
    sketch_tables,
    taylor_coefficients,
)
from atlas_blocks.omega.memories import weight_shapes
from atlas_blocks.omega.rule import NAMES as RULE_NAMES
from atlas_blocks.omega.rule import Rule
from atlas_blocks.state import State

Form = TypeVar("Form", bound=Callable)


def with_loose_settings(function: Form) -> Form:
    """A form of the rule that takes the fields of `Rule` as arguments of their own, and the window
    from gamma."""

    @functools.wraps(function)
    def call(*arguments: Any, rule: Rule | None = None, **rest: Any) -> Any:
        if rule is None:
            fields = {name: rest.pop(name) for name in RULE_NAMES if name in rest}
            gamma = rest["gamma"]
            known = isinstance(gamma, Tensor) and gamma.ndim > 0
            window = operator.index(gamma.shape[-1]) if known else 1
            rule = Rule(**({"window": window} | fields))
        return function(*arguments, rule=rule, **rest)

    return call  # pyright: ignore


omega_rule = with_loose_settings(functional.omega_rule)
omega_rule_reference = with_loose_settings(functional.omega_rule_reference)
omega_rule_op = with_loose_settings(ops.omega_rule)
omega_rule_step = with_loose_settings(ops.omega_rule_step)

MEMORIES = ("matrix", "mlp", "gated_mlp")
OBJECTIVES = ("l2", "dot")
UPDATES = ("gd", "muon")
ERRORS = ("chunk", "online")
# Every update with the errors that it may have.
STEPS = (("gd", "chunk"), ("gd", "online"), ("muon", "chunk"))
GATES = ("alpha", "eta", "theta", "gamma")
STREAMS = ("q", "k", "v", *GATES)  # the arguments with a token axis
HIDDEN = 4


def feature_map(name: str, width: int) -> PolynomialMap | SketchMap | None:
    """The feature map called `name`, float64, its coefficients a leaf of the graph."""
    if name == "identity":
        return None
    coefficients = taylor_coefficients(2).double()
    if name == "polynomial":
        return PolynomialMap(coefficients)
    tables = sketch_tables(width, 7, 2, 5)
    return SketchMap(coefficients, *tables, 7)


def rule_inputs(
    memory: str = "matrix",
    *,
    batch: int = 1,
    length: int = 9,
    heads: int = 2,
    key_width: int = 3,
    value_width: int = 3,
    window: int = 2,
    features: str = "identity",
    momentum: bool = True,
    exact_gates: bool = True,
    update: str = "gd",
    hidden: int = HIDDEN,
    seed: int = 0,
) -> dict[str, Any]:
    """Tensor arguments of `omega_rule` in float64, with the feature map.

    exact_gates: every gate is 0 at some tokens and 1 at others (eta 0 only).
    update="muon" gives inputs for which that rule is well conditioned. Newton-Schulz multiplies a
    small singular value of S by up to 3.4445 a step, and where weights are no larger than eta the
    next gradients depend on every rounding error: the rule itself, not an implementation, is then
    chaotic. So values are large, eta is small, retention is high, and alpha = 0 comes late.
    """
    g = torch.Generator().manual_seed(seed)
    size = (batch, length, heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    muon = update == "muon"
    alpha = 1 - (0.02 if muon else 0.2) * uniform(*size)
    eta, theta = (0.02 if muon else 0.1) * uniform(*size), 0.9 * uniform(*size)
    gamma = uniform(*size, window) / window
    if exact_gates:
        for gate, one in ((alpha, 0.2), (eta, 0.0), (theta, 0.1), (gamma, 0.5 / window)):
            mark = uniform(*gate.shape)
            gate[mark < 0.1] = 0.0
            gate[mark > 1 - one] = 1.0
        if muon:
            early = alpha[:, : max(0, length - 4)]
            early[early == 0] = 1.0
    phi = feature_map(features, key_width)
    width = key_width if phi is None else phi.width_of(key_width)
    shapes = weight_shapes(memory, width, value_width, hidden)
    return {
        "q": F.normalize(normal(*size, key_width), dim=-1),
        "k": F.normalize(normal(*size, key_width), dim=-1),
        "v": 3 * normal(*size, value_width),
        "alpha": alpha,
        "eta": eta,
        "theta": theta if momentum else None,
        "gamma": gamma,
        "weights": [normal(heads, *shape) / shape[-1] ** 0.5 for shape in shapes],
        "feature_map": phi,
    }


def errors_for(update: str) -> str:
    """Online errors where there are such."""
    return "online" if update == "gd" else "chunk"


def tokens(inputs: dict[str, Any], first: int, stop: int) -> dict[str, Any]:
    """The same arguments for tokens first..stop-1 alone."""
    return {
        name: x[:, first:stop] if name in STREAMS and x is not None else x
        for name, x in inputs.items()
    }


def rows(inputs: dict[str, Any], index: Sequence[int]) -> dict[str, Any]:
    """The same arguments for some rows of the batch."""
    return {
        name: x[list(index)] if name in STREAMS and x is not None else x
        for name, x in inputs.items()
    }


def rule_in_pieces(
    inputs: dict[str, Any], pieces: Sequence[int], state: OmegaState | None = None, **options: Any
) -> tuple[Tensor, OmegaState]:
    """`omega_rule` over a sequence handed in pieces of these lengths."""
    outputs, first = [], 0
    for length in pieces:
        y, state = omega_rule(**tokens(inputs, first, first + length), **options, state=state)
        outputs.append(y)
        first += length
    assert state is not None
    return torch.cat(outputs, 1), state


def difference(ours: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """The largest difference of corresponding tensors, each relative to the largest true entry."""
    assert [tuple(t.shape) for t in ours] == [tuple(t.shape) for t in true]
    worst = 0.0
    for a, b in zip(ours, true, strict=True):
        if b.numel():
            gap = ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
            worst = gap if not gap <= worst else worst  # a NaN stays
    return worst


def everything(result: tuple[Tensor, State | None]) -> list[Tensor]:
    """The output and every tensor of the state, in float64."""
    y, state = result
    return [t.double() for t in (y, *([] if state is None else state.tensors()))]


def assert_close(
    ours: tuple[Tensor, State | None], true: tuple[Tensor, State | None], tolerance: float = 1e-10
) -> None:
    """Same output and same state, every tensor within `tolerance` of its largest entry.

    States that grow may have been padded in front to the length of another row: they are padded
    alike here.
    """
    a, b = ours[1], true[1]
    if a is not None and b is not None and a.nbytes != b.nbytes:
        both, rows = State.cat([a, b]), len(ours[0])
        ours, true = (ours[0], both[:rows]), (true[0], both[rows:])
    gap = difference(everything(ours), everything(true))
    assert gap <= tolerance, f"relative difference {gap:.3g} > {tolerance:.3g}"


def leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with fresh leaves, coefficients included, for a gradient."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    fresh = {name: leaf(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    fresh["weights"] = [leaf(w) for w in inputs["weights"]]
    phi = inputs["feature_map"]
    if isinstance(phi, PolynomialMap):
        fresh["feature_map"] = PolynomialMap(leaf(phi.coefficients))
    elif isinstance(phi, SketchMap):
        fresh["feature_map"] = SketchMap(leaf(phi.coefficients), phi.buckets, phi.signs, phi.width)
    return fresh


def named_leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every differentiable tensor among the arguments by name."""
    found = {name: inputs[name] for name in STREAMS if inputs[name] is not None}
    found |= {f"weights[{i}]": w for i, w in enumerate(inputs["weights"])}
    if inputs["feature_map"] is not None:
        found["coefficients"] = inputs["feature_map"].coefficients
    return found


def small_memory(**changes: Any) -> AtlasMemoryConfig:
    """A memory layer's config with chunks and windows that a few dozen tokens cross.

    Steps are small because Newton-Schulz magnifies rounding (see `rule_inputs`).
    """
    small = AtlasMemoryConfig(
        expansion=1, window=5, chunk_size=8, gate_rank=4, eta_init=0.02, retention_init=0.98
    )
    return small.replace(**changes)


class Average(torch.nn.Module):
    """A mixer of somebody's, no block: y_t = W s_t, s_t = rate s_{t-1} + (1 - rate) x_t.

    forward(x [B, T, dim], state [B, dim] or None) -> y, s_T.
    """

    def __init__(self, dim: int, rate: float) -> None:
        super().__init__()
        self.rate, self.out = rate, torch.nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x.to(self.out.weight.dtype)
        before = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state.to(x.dtype)
        i = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
        powers = ((1 - self.rate) * self.rate ** (i[:, None] - i).clamp(min=0)).tril()
        faded = (self.rate ** (i + 1)).to(x.dtype)[:, None] * before[:, None]
        after = powers.to(x.dtype) @ x + faded
        return self.out(after), torch.cat([before[:, None], after], 1)[:, -1]


@dataclasses.dataclass(frozen=True)
class AverageConfig(Config):
    rate: float = 0.9

    def build(self, dim: int, heads: int) -> Average:
        return Average(dim, self.rate)


_MEMORY, _ATTENTION = small_memory(), SlidingWindowAttentionConfig(window=7, sink_tokens=2)
_PHI_STAR = DeepTransformerConfig(gate_rank=4, chunk_size=8)
_DESCENT = small_memory(update="gd", feature_map="polynomial")
SEGMENT = 7  # after so many tokens the state of "caching" grows
_PLAIN = small_memory(update="gd", feature_map="identity", window=1, chunk_size=4)
BLOCKS: dict[str, Callable[[int, int], Block]] = {
    **{
        f"memory-{memory}-{update}-{features}": small_memory(
            memory=memory, update=update, feature_map=features, objective=objective
        ).build
        for memory, update, features, objective in (
            ("matrix", "gd", "polynomial", "l2"),
            ("matrix", "gd", "identity", "dot"),
            ("matrix", "muon", "taylor_exp", "l2"),
            ("mlp", "gd", "sketch", "l2"),
            ("mlp", "gd", "taylor_exp", "dot"),
            ("mlp", "muon", "sketch", "l2"),
            ("mlp", "muon", "identity", "dot"),
            ("gated_mlp", "gd", "identity", "l2"),
            ("gated_mlp", "muon", "polynomial", "l2"),
            ("gated_mlp", "muon", "sketch", "dot"),
        )
    },
    "memory-plain": small_memory(
        update="gd", momentum=False, window=1, errors="chunk", conv_width=1
    ).build,
    "memory-fixed-gates": small_memory(
        memory="matrix",
        update="gd",
        objective="dot",
        momentum=False,
        errors="chunk",
        feature_map="sketch",
        retention_init=(0.9, 1.0),
        eta_init=1.0,
        lag_init=0.5,
        fixed=("alpha", "eta", "gamma", "coefficients"),
        initial_memory="zero",
    ).build,
    "memory-sparse-muon": small_memory(ns_every=4).build,
    "deep-transformer": _PHI_STAR.build,
    "swdt": _PHI_STAR.replace(window=3, normalise=False, rope_base=100.0, kv_heads=1).build,
    "dot": _PHI_STAR.replace(objective="l2", window=3).build,
    "dot-each-token": _PHI_STAR.replace(objective="l2", chunk_size=1, normalise=False).build,
    "attention-neutral": _PHI_STAR.replace(
        window=2,
        gates="neutral",
        qk_norm="rms",
        qkv_bias=True,
        out_bias=True,
        head_width=4,
        conv_width=None,
        output_gate=False,
    ).build,
    "attention-plain": _PHI_STAR.replace(gates="none", qk_norm="none", rope_base=100.0).build,
    "block-phi-star": AtlasBlockConfig(_PHI_STAR, mlp_width=10).build,
    "block-memory": AtlasBlockConfig(_MEMORY).build,
    "block-attention": AtlasBlockConfig(_ATTENTION, mlp_width=10).build,
    "block-attention-grouped": AtlasBlockConfig(_ATTENTION.replace(kv_heads=1), 10).build,
    "block-lstm": AtlasBlockConfig(LSTMConfig(), mlp="relu2").build,
    "block-foreign": AtlasBlockConfig(AverageConfig(), mlp_width=10).build,
    "as-layer": MemoryAsLayerConfig(_MEMORY, _ATTENTION).build,
    "as-gate-sum": MemoryAsGateConfig(_MEMORY, _ATTENTION).build,
    "gate-mixer": MemoryAsGateMixerConfig(_DESCENT, _ATTENTION, "product").build,
    "as-context": MemoryAsContextConfig(_DESCENT, segment=12).build,
    "as-context-muon": MemoryAsContextConfig(
        _MEMORY, segment=4, persistent_tokens=0, kv_heads=1
    ).build,
    "caching-checkpoints": MemoryCachingConfig(_MEMORY, segment=SEGMENT).build,
    "caching-reset": MemoryCachingConfig(_PLAIN, segment=SEGMENT, reset=True, top_k=2).build,
    "tnt": TNTConfig(_DESCENT.replace(chunk_size=16), (_PLAIN, _MEMORY), span=12).build,
    "tnt-unprojected": TNTConfig(_MEMORY, (_PLAIN,), 12, project_queries=False).build,
    "lstm": LSTMConfig().build,
    "conv": lambda dim, heads: ShortConv(dim),
    "swiglu": lambda dim, heads: SwiGLU(dim),
    "squared-relu": lambda dim, heads: SquaredReLU(dim),
}
# Their states hold every key, or the memory of every segment.
GROWING = (
    "deep-transformer",
    "swdt",
    "dot",
    "dot-each-token",
    "attention",
    "block-phi-star",
    "caching",
)
DIM, HEADS = 12, 2


def make_block(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Block:
    """The small block called `name`, its gates dependent on the token as after training.

    changes: of its config.
    """
    torch.manual_seed(0)
    block = BLOCKS[name](DIM, HEADS)
    if changes:
        block = block.config.replace(**changes).build(DIM, HEADS)
    for module in block.modules():
        if isinstance(module, Gate):
            torch.nn.init.normal_(module[1].weight, std=0.5)
        if isinstance(module, Amount):
            torch.nn.init.uniform_(module.weight, 0.2, 0.8)
    return block.to(dtype)


class Layers(torch.nn.Module):
    """Blocks one after another: (x, a state each) -> (y, the states after)."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block(x, state)
            after.append(state)
        return x, after


def unit(x: Tensor) -> Tensor:
    """What layers make of queries and keys."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def draw(*size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)


def block_in_pieces(
    block: Block, x: Tensor, pieces: Sequence[int], state: State | None = None, **options: Any
) -> tuple[Tensor, State | None]:
    """The block over a sequence handed in pieces of these lengths."""
    outputs = []
    for part in x.split(list(pieces), dim=1):
        y, state = block(part, state, **options)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def cast(
    inputs: dict[str, Any],
    dtype: torch.dtype,
    streams: torch.dtype,
    *,
    device: str = "cpu",
    gradients: bool = True,
) -> dict[str, Any]:
    """q, k and v in one dtype, everything else in another, as fresh leaves on a device."""

    def to(x: Any, kind: torch.dtype) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().to(device, kind).requires_grad_(gradients)

    found = {n: to(x, streams if n in "qkv" else dtype) for n, x in inputs.items()}
    found["weights"] = [to(w, dtype) for w in inputs["weights"]]
    phi = inputs["feature_map"]
    if isinstance(phi, PolynomialMap):
        found["feature_map"] = PolynomialMap(to(phi.coefficients, dtype))
    elif isinstance(phi, SketchMap):
        tables = phi.buckets.to(device), phi.signs.to(device, dtype)
        found["feature_map"] = SketchMap(to(phi.coefficients, dtype), *tables, phi.width)
    return found


class HostData(TorchFunctionMode):
    """Notes calls that bring data from the host: `torch.tensor`, copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, result) if isinstance(t, Tensor) and t.dim()}
        if len(devices) > 1 or func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            self.found.append(str(func))
        return result


class Recorder:
    """A backend that keeps the graphs after autograd, forward and backward, and runs them plainly.

    passes: run on each graph first, as Inductor would.
    """

    def __init__(self, passes: Callable[[torch.fx.Graph], None] = lambda graph: None) -> None:
        self.passes, self.compiles, self.graphs = passes, 0, []

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # Imported here: it loads all of Dynamo.
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        self.compiles += 1
        return aot_autograd(
            fw_compiler=self._keep, partition_fn=min_cut_rematerialization_partition
        )(module, inputs)

    def _keep(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch.aot_autograd import make_boxed_func

        self.passes(module.graph)
        module.recompile()
        self.graphs.append(module.graph)
        return make_boxed_func(module.forward)

    def count(self, op: str) -> list[int]:
        """How many nodes each graph has of an op, such as "atlas.omega_rule.default"."""
        return [sum(str(n.target) == op for n in g.nodes) for g in self.graphs]


# Logits of a layer's alpha, eta, theta and gamma, a head each; None leaves what it starts with.
GATE_LOGITS = {
    "extreme": (
        (None, None, None, None),
        (30, 30, 30, 30),
        (30, 30, -30, 30),
        (30, 0, 3, 0),
        (-30, 30, 30, 30),
        (5, 30, 30, 30),
        (2, 30, 5, 3),
        (30, 30, 30, -30),
        (30, -30, 30, 30),
        (-30, -30, -30, -30),
    ),
    # What training may well reach.
    "moderate": ((5, 30, 0, 0), (5, 30, 3, 30), (4.6, 2, 2, 0), (7, 30, 30, 30)),
}
