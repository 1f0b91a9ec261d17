"""Runs of a provider of the Omega rule beside the definition, for the tests of kernels."""

import itertools
from functools import partial
from types import ModuleType
from typing import Any

import helpers
import pytest
import torch
import triton
from helpers import difference, named_leaves, omega_rule, omega_rule_op, rule_inputs, tokens
from torch import Tensor
from triton import language as tl

from atlas_blocks.functional import OmegaState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of float32 under the interpreter, of tf32 on a GPU, each relative to a tensor's largest entry.
ROUNDING = 1e-2 if DEVICE == "cuda" else 2e-6
cast = partial(helpers.cast, device=DEVICE)


def run_in_pieces(
    rule: Any,
    inputs: dict[str, Any],
    pieces: tuple[int, ...],
    packed: tuple[list[int], ...] = (),
    **options: Any,
) -> tuple[Tensor, OmegaState, dict[str, Tensor]]:
    """y, the state and the gradients of a loss that weighs all of them, the state's included.

    packed: the bounds of every piece's documents.
    """
    outputs, state, first = [], None, 0
    for length, bounds in itertools.zip_longest(pieces, packed):
        documents = {"cu_seqlens": torch.tensor(bounds, device=DEVICE)} if bounds else {}
        piece = tokens(inputs, first, first + length)
        y, state = rule(**piece, **options, **documents, state=state)
        outputs.append(y)
        first += length
    assert state is not None
    y = torch.cat(outputs, 1)
    g = torch.Generator().manual_seed(3)
    loss = torch.zeros((), dtype=torch.float64, device=y.device)
    for t in (y, *state.tensors()):
        # Drawn for every tensor: S^(0) of a first chunk requires a gradient of an op's alone.
        weight = torch.randn(t.shape, generator=g, dtype=torch.float64).to(y.device)
        if t.is_floating_point() and t.requires_grad:
            loss = loss + (t.double() * weight).sum()
    loss.backward()
    return y, state, {n: t.grad for n, t in named_leaves(inputs).items() if t.grad is not None}


def triton_rule(**arguments: Any) -> tuple[Tensor, OmegaState]:
    return omega_rule_op(**arguments, provider="triton")


def relative(ours: Tensor, true: Tensor, among: float) -> float:
    """`helpers.difference`; relative to a tenth of `among` where `true` is zero beside it."""
    if true.numel() and float(true.detach().abs().max()) < 1e-12 * among:
        return float((ours - true).detach().abs().max()) / (0.1 * among)
    return difference([ours], [true])


def assert_provider_is_definition(
    inputs: dict[str, Any], pieces: tuple[int, ...], forms: Any = (omega_rule,), **options: Any
) -> None:
    """forms: of the definition. Their own error in float32 is the measure: a sum of gates near 1
    loses digits. A gradient that is none, to float64's rounding, is as exact as a tenth of the
    largest: a limited write does not change with gamma, as limit and window cancel."""
    exact = cast(inputs, torch.float64, torch.float64)
    true = run_in_pieces(omega_rule, exact, pieces, **options)
    found = [
        run_in_pieces(rule, cast(inputs, torch.float32, torch.float32), pieces, **options)
        for rule in (*forms, triton_rule)
    ]
    errors = []
    largest = max(float(g.abs().max()) for g in true[2].values() if g.numel())
    for y, state, gradients in found:
        pairs = {"y": (y, true[0])}
        pairs |= {
            f"state {i}": p
            for i, p in enumerate(zip(state.tensors(), true[1].tensors(), strict=True))
        }
        pairs |= {f"gradient of {n}": (gradients[n], g) for n, g in true[2].items()}
        errors.append(
            {
                n: relative(a.double(), b.double(), largest if n.startswith("gradient") else 0.0)
                for n, (a, b) in pairs.items()
            }
        )
    *definition, provider = errors
    for name, gap in provider.items():
        worst = max(form[name] for form in definition)
        assert gap <= 2 * worst + ROUNDING, f"{name}: {gap:.2g}"


@triton.jit
def tf32_dot(a, b):
    """`tiles.dot` with the rounding of a GPU, which the interpreter leaves out."""
    a, b = a.to(tl.float32).to(tl.int32, bitcast=True), b.to(tl.float32).to(tl.int32, bitcast=True)
    a, b = (a + 0x1000) & -0x2000, (b + 0x1000) & -0x2000
    return tl.dot(a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True))


def errors_against_float64(
    dtype: torch.dtype,
    length: int,
    multiplying: tuple[ModuleType, ...],
    monkeypatch: pytest.MonkeyPatch,
    memory: str = "matrix",
    window: int = 4,
    strength: float = 1.0,
    **options: Any,
) -> dict[str, float]:
    """The provider's error as a multiple of the definition's, both given rounded q, k and v.

    multiplying: the modules that use `tiles.dot`; strength: times eta.
    """
    if DEVICE == "cpu":
        for module in multiplying:
            monkeypatch.setattr(module, "dot", tf32_dot)
    inputs = rule_inputs(
        memory,
        length=length,
        heads=1,
        window=window,
        key_width=16,
        value_width=16,
        hidden=16,
        exact_gates=False,
    )
    inputs["eta"] = strength * inputs["eta"]
    options = {"memory": memory, "chunk_size": 64} | options
    pieces = (length,)
    true = run_in_pieces(omega_rule, cast(inputs, torch.float64, torch.float64), pieces, **options)
    wanted = {"y": true[0], "M": true[1].weights[0], "S": true[1].momentum[0], **true[2]}
    errors = []
    for rule in (omega_rule, triton_rule):
        y, state, gradients = run_in_pieces(
            rule, cast(inputs, torch.float32, dtype), pieces, **options
        )
        found = {"y": y, "M": state.weights[0], "S": state.momentum[0], **gradients}
        errors.append({n: (x.double() - wanted[n]).norm().item() for n, x in found.items()})
    definition, provider = errors
    # A gated memory that a small alpha has emptied stays so, exactly: 0 of 0.
    return {n: provider[n] / definition[n] if definition[n] else provider[n] for n in definition}
