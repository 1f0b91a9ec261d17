"""Who takes part in a benchmark: a name and a function that makes it ready for one shape.

B batch, T tokens, H heads, D width of keys and values, c window, b chunk.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import ops
from atlas_blocks.graph.providers import DEFINITION, explain_choice, refusal
from atlas_blocks.newton_schulz.definition import backward_flops, forward_flops
from atlas_blocks.newton_schulz.op import NewtonSchulzCall
from atlas_blocks.omega import flops as formulas
from atlas_blocks.omega import inline as omega_inline
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.memories import weight_shapes
from atlas_blocks.omega.op import describe, flatten
from atlas_blocks.omega.rule import Rule

WINDOW, CHUNK, EXPANSION, NS_STEPS = 16, 64, 4, 5
COMPILED = "inline, compiled"
# What an implementation of the rule gives: y, then M and, with momentum, S, each [B, H, dout, din].
Implementation = Callable[[Arguments], tuple[Tensor, list[Tensor]]]


class Shape(NamedTuple):
    """One problem size."""

    batch: int
    tokens: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"B {self.batch}, T {self.tokens}, H {self.heads}, D {self.dim}"


class Unavailable(Exception):
    """A contender cannot take part; the message says why."""


def first_line(error: Exception) -> str:
    """Of its message."""
    return (str(error).strip().splitlines() or [""])[0]


class Subject(NamedTuple):
    """A contender made ready for one shape.

    leaves: what the backward differentiates; none for a contender without one.
    flops(backward): of the forward, or of forward and backward; None where nobody counts them.
    """

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    flops: Callable[[bool], int | None]


@dataclass(frozen=True)
class Contender:
    """One line of the table. extra: only with --all. sweep: also at every length. tokens: what is
    timed goes over the shape's tokens, which tokens/s are counted of."""

    name: str
    what: str
    build: Callable[[Shape, torch.device], Subject]  # raises Unavailable
    extra: bool = False
    sweep: bool = False
    tokens: bool = True


@dataclass(frozen=True)
class Variant:
    """A rule that is timed."""

    memory: str = "matrix"
    update: str = "gd"
    momentum: bool = True
    errors: str = "online"
    window: int = WINDOW
    ns_every: int = 1

    def __str__(self) -> str:
        name = f"{self.memory} x{EXPANSION}" if self.memory != "matrix" else self.memory
        window = "" if self.window == WINDOW else f", window {self.window}"
        momentum = "" if self.momentum else ", no momentum"
        errors = (
            ", errors at the chunk's start"
            if self.update == "gd" and self.errors == "chunk"
            else ""
        )
        window += "" if self.ns_every == 1 else f" every {self.ns_every} tokens"
        return f"{name}, {self.update}{window}{momentum}{errors}"

    def arguments(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, gates: torch.dtype
    ) -> Arguments:
        """Random arguments of the rule; q, k, v in `dtype`, everything else in `gates`.

        Muon with large writes is chaotic: any two roundings part. Hence its smaller ones.
        """
        generator = torch.Generator(device).manual_seed(0)
        scalars = shape[:3]
        muon = self.update == "muon"

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=gates)

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator, device=device, dtype=gates)

        wide = weight_shapes(self.memory, shape.dim, shape.dim, EXPANSION * shape.dim)
        return Arguments(
            q=F.normalize(normal(*scalars, shape.dim), dim=-1).to(dtype),
            k=F.normalize(normal(*scalars, shape.dim), dim=-1).to(dtype),
            v=normal(*scalars, shape.dim).to(dtype),
            alpha=1 - (0.02 if muon else 0.2) * uniform(*scalars),
            eta=(0.02 if muon else 0.1) * uniform(*scalars),
            theta=0.9 * uniform(*scalars) if self.momentum else None,
            gamma=uniform(*scalars, self.window) / self.window,
            weights=[normal(shape.heads, *size) / size[-1] ** 0.5 for size in wide],
            feature_map=None,
            rule=Rule(
                memory=self.memory,
                objective="l2",
                update=self.update,
                ns_steps=NS_STEPS,
                ns_every=self.ns_every,
                chunk_size=CHUNK,
                errors=self.errors if self.update == "gd" else "chunk",
                window=self.window,
            ),
            state=None,
        )


def leaves_of(a: Arguments) -> tuple[Arguments, dict[str, Tensor]]:
    """The arguments as leaves of a graph, and the leaves by name."""
    named = {n: getattr(a, n) for n in ("q", "k", "v", "alpha", "eta", "theta", "gamma")}
    found = {n: t.detach().requires_grad_() for n, t in named.items() if t is not None}
    weights = [w.detach().requires_grad_() for w in a.weights]
    return (
        a._replace(**found, weights=weights),
        found | {f"weights[{i}]": w for i, w in enumerate(weights)},
    )


# --- the rule -------------------------------------------------------------------------------


def served_by(provider: str) -> Implementation:
    """The rule by one provider."""

    def call(a: Arguments) -> tuple[Tensor, list[Tensor]]:
        y, state = ops.omega_rule(
            a.q,
            a.k,
            a.v,
            alpha=a.alpha,
            eta=a.eta,
            theta=a.theta,
            gamma=a.gamma,
            weights=a.weights,
            rule=a.rule,
            feature_map=a.feature_map,
            provider=provider,
        )
        return y, [*state.weights, *state.momentum]

    return call


def provider_names(device: torch.device) -> list[str]:
    """Every provider of the rule that serves it eagerly, but for the definition, and for fla, one
    of OTHERS: no variant has a chunk of one token."""
    a = Variant().arguments(Shape(1, 1, 1, 1), device, torch.bfloat16, torch.float32)
    choice = explain_choice("omega_rule", describe(a, needs_grad=True))
    return [
        n
        for n in dict.fromkeys([choice.provider, *choice.refusals])
        if n not in (DEFINITION, "fla", omega_inline.NAME)
    ]


def why_not(provider: str, a: Arguments) -> str | None:
    """Why a provider does not serve a call with gradients; None where it does."""
    if provider in (DEFINITION, COMPILED):
        return None
    return refusal("omega_rule", provider, describe(a, needs_grad=True))


def interpreted(provider: str, device: torch.device) -> bool:
    """Whether a provider's kernels run in Triton's interpreter, whose time says nothing."""
    if provider != "triton" or device.type == "cuda":
        return False
    from atlas_blocks.kernels.tiles import INTERPRETED

    return bool(INTERPRETED)


class Candidate(NamedTuple):
    """One implementation of one variant: what the gate checks before it is timed."""

    name: str
    variant: Variant
    run: Implementation
    extra: bool

    def contender(self) -> Contender:
        """Its row of the table; the default variant's is also timed at every length."""

        def build(shape: Shape, device: torch.device) -> Subject:
            a = self.variant.arguments(shape, device, torch.bfloat16, torch.float32)
            reason = why_not(self.name, a)
            if reason is None and interpreted(self.name, device):
                reason = "under Triton's interpreter it is checked, not timed"
            if reason is not None:
                raise Unavailable(reason)
            a, leaves = leaves_of(a)
            return Subject(
                lambda: self.run(a)[0], list(leaves.values()), lambda both: rule_flops(a, both)
            )

        # Compiling anew for every length would take longer than all the rest.
        sweep = self.variant == Variant() and self.name != COMPILED
        return Contender(self.name, str(self.variant), build, self.extra, sweep)


def rule_flops(a: Arguments, both: bool) -> int:
    """What torch's FlopCounterMode counts for the rule's op, whoever serves it.

    The arithmetic of the dual form: what a provider computes twice to save memory is not work done.
    """
    tensors, settings = flatten(a)
    shapes = tuple(tuple(t.shape) for t in tensors)
    total = formulas.rule_flops(shapes, settings)
    return total + formulas.rule_backward_flops(shapes, settings) if both else total


# Variants of the table and whether they take --all. Rows of a provider that is yet to come need no
# line here: every provider is asked for every variant.
VARIANTS: tuple[tuple[Variant, bool], ...] = (
    (Variant(), False),
    (Variant(errors="chunk"), True),
    (Variant(momentum=False), True),
    (Variant(momentum=False, errors="chunk"), False),
    (Variant(window=1, momentum=False, errors="chunk"), True),
    (Variant(memory="mlp"), False),
    (Variant(update="muon"), False),
    (Variant(memory="mlp", update="muon"), False),
    # One step a chunk, as LaCT takes it (arXiv 2505.23884).
    (Variant(update="muon", ns_every=CHUNK), False),
    (Variant(memory="mlp", update="muon", ns_every=CHUNK), False),
)
COMPILED_VARIANT = Variant()


def candidates(device: torch.device, *, compiled: bool) -> list[Candidate]:
    """Every implementation of every variant."""
    found = []
    for variant, extra in VARIANTS:
        found.append(Candidate(DEFINITION, variant, served_by(DEFINITION), extra))
        if compiled and variant == COMPILED_VARIANT:
            # fullgraph: one that fell back to eager would be timed under a false name.
            inline = torch.compile(served_by(omega_inline.NAME), fullgraph=True, dynamic=False)
            found.append(Candidate(COMPILED, variant, inline, extra))
        for name in provider_names(device):
            found.append(Candidate(name, variant, served_by(name), extra))
    return found


# --- others -----------------------------------------------------------------------------------


def _product(shape: Shape, device: torch.device) -> Subject:
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return Subject(lambda: a @ b, [], lambda both: 2 * size**3)


def _newton_schulz(provider: str, wide: int) -> Callable[[Shape, torch.device], Subject]:
    """One chunk's S_t, [D, wide D] each: the stage that a step of Muon mostly consists of."""

    def build(shape: Shape, device: torch.device) -> Subject:
        count, m, n = shape.batch * shape.heads * CHUNK, shape.dim, wide * shape.dim
        if provider != DEFINITION:
            call = NewtonSchulzCall(device.type, torch.float32, m, n, needs_grad=True)
            reason = refusal("newton_schulz", provider, call)
            if reason is None and interpreted(provider, device):
                reason = "under Triton's interpreter it is checked, not timed"
            if reason is not None:
                raise Unavailable(reason)
        s = torch.randn(count, m, n, device=device, requires_grad=True)

        def flops(both: bool) -> int:
            one = forward_flops(m, n, NS_STEPS)
            return count * (one + backward_flops(m, n, NS_STEPS) if both else one)

        return Subject(lambda: ops.newton_schulz(s, steps=NS_STEPS, provider=provider), [s], flops)

    return build


def _attention(shape: Shape, device: torch.device) -> Subject:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size = (shape.batch, shape.heads, shape.tokens, shape.dim)
    q, k, v = (
        torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def flops(both: bool) -> int:
        # Two products of half a square; five more in the backward. torch counts whole squares.
        square = 2 * shape.batch * shape.heads * shape.tokens**2 * shape.dim
        return square // 2 * (7 if both else 2)

    return Subject(call, [q, k, v], flops)


def _delta_rule(shape: Shape, device: torch.device) -> Subject:
    try:
        fla = importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        raise Unavailable(missing("flash-linear-attention", error)) from error
    if device.type != "cuda":
        raise Unavailable("its kernels need a CUDA device")
    a = Variant(momentum=False).arguments(shape, device, torch.bfloat16, torch.float32)
    inputs = (a.q, a.k, a.v, a.alpha.log(), a.eta.bfloat16())
    leaves = [t.detach().requires_grad_() for t in inputs]
    # Nobody counts its kernels' FLOPs.
    return Subject(lambda: fla.chunk_gated_delta_rule(*leaves)[0], leaves, lambda both: None)


def _titans(batch_size: int | None) -> Callable[[Shape, torch.device], Subject]:
    def build(shape: Shape, device: torch.device) -> Subject:
        try:
            titans = importlib.import_module("titans_pytorch")
        except ImportError as error:
            raise Unavailable(missing("titans-pytorch", error)) from error
        width = shape.heads * shape.dim
        layer = titans.NeuralMemory(
            dim=width,
            chunk_size=CHUNK,
            batch_size=batch_size,
            heads=shape.heads,
            dim_head=shape.dim,
            model=titans.MemoryMLP(dim=shape.dim, depth=2, expansion_factor=float(EXPANSION)),
        ).to(device, torch.bfloat16)
        x = torch.randn(
            shape.batch, shape.tokens, width, device=device, dtype=torch.bfloat16
        ).requires_grad_()

        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def call() -> Tensor:
            return layer(x)[0]

        def both() -> None:
            # Not autograd.grad, which the counter's hooks do not support.
            call().sum().backward()
            for leaf in leaves:
                leaf.grad = None

        return Subject(call, leaves, lambda backward: _counted(both if backward else call))

    return build


def _counted(call: Callable[[], object]) -> int:
    """FLOPs of what PyTorch computes by its own operators, all of it."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def missing(package: str, error: ImportError) -> str:
    """That a package of the extra `bench` cannot be imported, and what to do."""
    if isinstance(error, ModuleNotFoundError):
        return f"{package} is not installed (pip install 'atlas-blocks[bench]')"
    return f"{package} cannot be imported: {error}"


PRODUCT = Contender("matrix product", "bf16, large and square", _product, sweep=True, tokens=False)
OTHERS = (
    *(
        Contender(
            provider,
            f"newton_schulz of one chunk, [D, {wide if wide > 1 else ''}D]",
            _newton_schulz(provider, wide),
            tokens=False,
        )
        for wide in (1, EXPANSION)
        for provider in (DEFINITION, "triton")
    ),
    Contender("fla", "chunk_gated_delta_rule", _delta_rule, sweep=True),
    Contender("FlashAttention", "causal attention (sdpa)", _attention, sweep=True),
    Contender("titans-pytorch", f"whole layer, mlp x{EXPANSION}, gd", _titans(None), sweep=True),
    Contender(
        "titans-pytorch",
        f"whole layer, mlp x{EXPANSION}, batch_size={CHUNK}",
        _titans(CHUNK),
        extra=True,
    ),
)
