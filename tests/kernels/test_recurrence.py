"""The Triton provider is the definition, forward and backward: under the interpreter on a CPU with
small shapes, on a GPU with real ones as well.
"""

import itertools
from functools import partial
from typing import Any

import helpers
import pytest
import torch
from helpers import (
    MEMORIES,
    OBJECTIVES,
    difference,
    named_leaves,
    rule_inputs,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atlas_blocks import ops
from atlas_blocks.functional import OmegaState, omega_rule, omega_rule_reference
from atlas_blocks.functional.rule import Arguments, Rule
from atlas_blocks.ops.omega_rule import flatten

triton = pytest.importorskip("triton")
tl = triton.language
from atlas_blocks.kernels import coefficients, matrix, matrix_backward  # noqa: E402
from atlas_blocks.kernels import discount as discounts  # noqa: E402
from atlas_blocks.kernels.deep import discount as deep_discount  # noqa: E402
from atlas_blocks.kernels.deep import forward as deep_forward  # noqa: E402
from atlas_blocks.kernels.deep import reads_backward, writes_backward  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of float32 under the interpreter, of tf32 on a GPU, each relative to a tensor's largest entry.
ROUNDING = 1e-2 if DEVICE == "cuda" else 2e-6
cast = partial(helpers.cast, device=DEVICE)
# The modules that multiply.
MULTIPLYING = (
    coefficients,
    discounts,
    matrix,
    matrix_backward,
    deep_forward,
    deep_discount,
    reads_backward,
    writes_backward,
)


@pytest.fixture(autouse=True)
def _tf32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


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
        if t.is_floating_point() and t.requires_grad:
            weight = torch.randn(t.shape, generator=g, dtype=torch.float64).to(y.device)
            loss = loss + (t.double() * weight).sum()
    loss.backward()
    return y, state, {n: t.grad for n, t in named_leaves(inputs).items() if t.grad is not None}


def triton_rule(**arguments: Any) -> tuple[Tensor, OmegaState]:
    return ops.omega_rule(**arguments, provider="triton")


def assert_provider_is_definition(
    inputs: dict[str, Any], pieces: tuple[int, ...], forms: Any = (omega_rule,), **options: Any
) -> None:
    """forms: of the definition. Their own error in float32 is the measure: a sum of gates near 1
    loses digits."""
    exact = cast(inputs, torch.float64, torch.float64)
    true = run_in_pieces(omega_rule, exact, pieces, **options)
    found = [
        run_in_pieces(rule, cast(inputs, torch.float32, torch.float32), pieces, **options)
        for rule in (*forms, triton_rule)
    ]
    errors = []
    for y, state, gradients in found:
        pairs = {"y": (y, true[0])}
        pairs |= {
            f"state {i}": p
            for i, p in enumerate(zip(state.tensors(), true[1].tensors(), strict=True))
        }
        pairs |= {f"gradient of {n}": (gradients[n], g) for n, g in true[2].items()}
        errors.append({n: difference([a.double()], [b.double()]) for n, (a, b) in pairs.items()})
    *definition, provider = errors
    for name, gap in provider.items():
        worst = max(form[name] for form in definition)
        assert gap <= 2 * worst + ROUNDING, f"{name}: {gap:.2g}"


# Of what every example is made. Calls end inside chunks and inside windows.
CHOICES = {
    "memory": st.sampled_from(MEMORIES),
    "chunk": st.sampled_from((1, 7, 16)),
    "window": st.sampled_from((1, 2, 5, 20)),
    "pieces": st.sampled_from(((1,), (40,), (5, 18, 3), (7, 7), (16, 16, 1, 1), (3, 30))),
    "widths": st.sampled_from(((3, 3), (16, 16), (5, 20))),
    "objective": st.sampled_from(OBJECTIVES),
    "momentum": st.booleans(),
    "discount": st.booleans(),
    "features": st.sampled_from(("identity", "polynomial", "sketch")),
    "seed": st.integers(0, 9),
}


# What the interpreter does in seconds.
QUICK = {
    **CHOICES,
    "memory": st.sampled_from(MEMORIES[1:]),
    "chunk": st.sampled_from((5, 16)),
    "pieces": st.sampled_from(((1,), (18,), (5, 9, 3), (16, 1, 1))),
}


@settings(max_examples=10)
@given(**{**CHOICES, "memory": st.just("matrix")})
def test_a_matrix_memory_equals_the_definition(**example: Any) -> None:
    assert_example_is_definition(**example)


@settings(max_examples=3)
@given(**QUICK)
def test_a_deep_memory_equals_the_definition(**example: Any) -> None:
    assert_example_is_definition(**example)


@pytest.mark.slow
@settings(max_examples=60)
@given(**QUICK)
def test_deep_memories_equal_the_definition(**example: Any) -> None:
    assert_example_is_definition(**example)


@pytest.mark.slow
@settings(max_examples=10)
@given(**CHOICES)
def test_any_memory_equals_the_definition(**example: Any) -> None:
    assert_example_is_definition(**example)


def assert_example_is_definition(
    memory: str,
    chunk: int,
    window: int,
    pieces: tuple[int, ...],
    widths: tuple[int, int],
    objective: str,
    momentum: bool,
    discount: bool,
    features: str,
    seed: int,
) -> None:
    """Gates are 0 and 1 at some tokens."""
    width, value_width = widths if features == "identity" else (4, 3)
    inputs = rule_inputs(
        memory,
        batch=2,
        heads=1,
        length=sum(pieces),
        window=window,
        key_width=width,
        value_width=value_width,
        features=features,
        momentum=momentum,
        seed=seed,
    )
    # alpha = 0 empties a deep memory. All of its hidden units are 0 then, and keys of one length
    # would tie for the largest kappa, of which every form takes another subgradient.
    lengths = torch.linspace(0.8, 1.2, sum(pieces), dtype=torch.float64)
    inputs["k"] = inputs["k"] * lengths[:, None, None]
    assert_provider_is_definition(
        inputs,
        pieces,
        memory=memory,
        objective=objective,
        chunk_size=chunk,
        write_discount=discount,
    )


def test_a_gradient_whose_terms_cancel() -> None:
    """eta's: -1.015 + 0.836 from y and the state. Which form of the rule loses more is chance:
    token by token it errs by 1e-5 here."""
    inputs = rule_inputs(batch=2, heads=1, length=1, window=5, key_width=5, value_width=20, seed=1)
    forms = (omega_rule, omega_rule_reference)
    assert_provider_is_definition(inputs, (1,), forms, chunk_size=7)


@pytest.mark.parametrize("discount", [False, True])
@pytest.mark.parametrize("widths", [(64, 64), (300, 24), (24, 80)])
def test_wide_states_are_tiled(widths: tuple[int, int], discount: bool) -> None:
    """300 features do not stay in registers; 80 values are several blocks."""
    inputs = rule_inputs(length=70, heads=1, window=3, key_width=widths[0], value_width=widths[1])
    assert_provider_is_definition(inputs, (70,), chunk_size=32, write_discount=discount)
    assert_provider_is_definition(inputs, (41, 29), chunk_size=32, write_discount=discount)


@pytest.mark.parametrize(
    ("memory", "chunk", "window", "discount", "momentum"),
    [
        ("mlp", 4, 3, True, True),
        ("gated_mlp", 32, 3, True, False),
        ("gated_mlp", 16, 20, True, True),
        ("gated_mlp", 4, 1, False, True),
    ],
)
def test_deep_memories_are_tiled(
    memory: str, chunk: int, window: int, discount: bool, momentum: bool
) -> None:
    """Several blocks of hidden units and of D, several tiles of keys, and groups of chunks."""
    inputs = rule_inputs(
        memory, length=21, heads=1, window=window, key_width=70, value_width=20, hidden=40,
        momentum=momentum,
    )  # fmt: skip
    options = {"memory": memory, "chunk_size": chunk, "write_discount": discount}
    assert_provider_is_definition(inputs, (14, 7), **options)


# Documents of one token, shorter than the window, than a chunk, of several chunks and one group of
# them; begun ones at different places of their chunks, and some that end where a chunk does.
PACKED = ([0, 1, 4, 25, 32, 40], [0, 20, 26, 27, 38, 40])


@pytest.mark.parametrize(
    ("window", "widths", "discount"),
    [(1, (5, 20), True), (5, (16, 16), True), (20, (3, 3), True), (5, (3, 3), False)],
)
def test_packed_documents(window: int, widths: tuple[int, int], discount: bool) -> None:
    inputs = rule_inputs(
        length=80, heads=1, window=window, key_width=widths[0], value_width=widths[1]
    )
    pieces = tuple(bounds[-1] for bounds in PACKED)
    assert_provider_is_definition(
        inputs, pieces, packed=PACKED, chunk_size=7, write_discount=discount
    )


def test_packed_documents_whose_states_are_tiled() -> None:
    inputs = rule_inputs(length=20, heads=1, window=3, key_width=136, value_width=3)
    packed = ([0, 1, 10], [0, 6, 10])
    assert_provider_is_definition(
        inputs, (10, 10), packed=packed, chunk_size=8, write_discount=True
    )


@pytest.mark.parametrize("momentum", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("memory", ["mlp", pytest.param("gated_mlp", marks=pytest.mark.slow)])
def test_packed_documents_of_a_deep_memory(memory: str, momentum: bool) -> None:
    inputs = rule_inputs(memory, length=40, heads=1, window=4, momentum=momentum)
    packed = ([0, 1, 15, 18, 20], [0, 9, 10, 19, 20])
    assert_provider_is_definition(
        inputs, (20, 20), packed=packed, memory=memory, chunk_size=3, write_discount=momentum
    )


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_at_different_positions(memory: str) -> None:
    """One batch whose rows stand at different places of their chunks."""
    inputs = cast(rule_inputs(memory, batch=3, length=30, window=4), torch.float32, torch.float32)
    options = {"memory": memory, "chunk_size": 8, "write_discount": True}
    with torch.no_grad():
        states = []
        for row, length in enumerate((3, 8, 17)):
            past = {n: x[[row]] if n in (*"qkv", "alpha", "eta", "theta", "gamma") else x
                    for n, x in tokens(inputs, 0, length).items()}  # fmt: skip
            states.append(omega_rule(**past, **options)[1])
        state, now = OmegaState.cat(states), tokens(inputs, 17, 30)
        true, ours = (rule(**now, **options, state=state) for rule in (omega_rule, triton_rule))
    gap = difference([ours[0], *ours[1].tensors()], [true[0], *true[1].tensors()])
    assert gap < 10 * ROUNDING


def test_no_tokens_at_all() -> None:
    inputs = cast(rule_inputs(length=5), torch.float32, torch.float32)
    y, state = triton_rule(**tokens(inputs, 0, 0))
    assert y.shape == (1, 0, 2, 3)
    z, state = triton_rule(**inputs, state=state)
    true, _ = omega_rule(**inputs)
    assert difference([z], [true]) < 10 * ROUNDING


@triton.jit
def tf32_dot(a, b):
    """`tiles.dot` with the rounding of a GPU, which the interpreter leaves out."""
    a, b = a.to(tl.float32).to(tl.int32, bitcast=True), b.to(tl.float32).to(tl.int32, bitcast=True)
    a, b = (a + 0x1000) & -0x2000, (b + 0x1000) & -0x2000
    return tl.dot(a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True))


def errors_against_float64(
    dtype: torch.dtype,
    length: int,
    discount: bool,
    monkeypatch: pytest.MonkeyPatch,
    memory: str = "matrix",
) -> dict[str, float]:
    """The provider's error as a multiple of the definition's, both given rounded q, k and v."""
    if DEVICE == "cpu":
        for module in MULTIPLYING:
            monkeypatch.setattr(module, "dot", tf32_dot)
    inputs = rule_inputs(
        memory,
        length=length,
        heads=1,
        window=4,
        key_width=16,
        value_width=16,
        hidden=16,
        exact_gates=False,
    )
    options = {"memory": memory, "chunk_size": 64, "write_discount": discount}
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("discount", [False, True])
def test_low_precision_is_as_good_as_the_definitions(
    dtype: torch.dtype, discount: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = errors_against_float64(dtype, 200, discount, monkeypatch)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("length", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("discount", [False, True])
@pytest.mark.parametrize("memory", MEMORIES[1:])
def test_bfloat16_of_a_deep_memory_is_as_good_as_the_definitions(
    memory: str, discount: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = errors_against_float64(torch.bfloat16, length, discount, monkeypatch, memory)
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.slow
@pytest.mark.parametrize("discount", [False, True])
def test_low_precision_over_64k_tokens(discount: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = errors_against_float64(torch.bfloat16, 65536, discount, monkeypatch)
    assert max(ratios.values()) <= 2, ratios


def test_what_it_cannot_serve_is_refused_with_the_reason() -> None:
    inputs = cast(rule_inputs(), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="chunk_size 65 is beyond"):
        triton_rule(**inputs, chunk_size=65)
    with pytest.raises(ValueError, match="float64"):
        triton_rule(**cast(rule_inputs(), torch.float64, torch.float64))


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_with_the_provider_in_one_graph() -> None:
    torch._dynamo.reset()
    inputs = cast(rule_inputs(length=20), torch.float32, torch.float32)

    def twice(x: dict[str, Any]) -> Tensor:
        with ops.use_provider("triton"):
            y, state = ops.omega_rule(**tokens(x, 0, 13), chunk_size=8)
            return torch.cat(
                [y, ops.omega_rule(**tokens(x, 13, 20), chunk_size=8, state=state)[0]], 1
            )

    y = torch.compile(twice, backend="aot_eager", fullgraph=True)(inputs)
    true, _ = omega_rule(**inputs, chunk_size=8)
    assert difference([y], [true]) < 10 * ROUNDING


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_what_is_saved_is_what_the_definition_saves(memory: str, packed: bool) -> None:
    """So a compiler pass may change the provider of the backward alone."""
    window, chunk = 3, 8
    inputs = cast(
        rule_inputs(memory, batch=1 if packed else 2, length=21, window=window),
        torch.float32,
        torch.float32,
    )
    options = {"memory": memory, "chunk_size": chunk, "write_discount": True}
    first, cu_seqlens = None, None
    if packed:
        first, cu_seqlens = (torch.tensor(b, device=DEVICE) for b in ([0, 4, 5], [0, 3, 16]))
    _, state = omega_rule(**tokens(inputs, 0, 5), **options, cu_seqlens=first)
    rule = Rule(memory, "l2", "gd", 5, 1, chunk, True, window)
    now = tokens(inputs, 5, 21)
    a = Arguments(*(now[n] for n in ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights")),
                  None, rule, state.map(torch.clone).detach(), cu_seqlens)  # fmt: skip
    tensors, arguments = flatten(a)
    tensors = [t.detach() for t in tensors]
    ours, true = (
        torch.ops.atlas.omega_rule.default(tensors, *arguments, provider, True)
        for provider in ("triton", "definition")
    )
    assert difference([t.double() for t in ours], [t.double() for t in true]) < 20 * ROUNDING
