"""The Triton provider is the definition, forward and backward, with a matrix memory: under the
interpreter on a CPU with small shapes, on a GPU with real ones as well.
"""

from typing import Any

import pytest
import torch
from helpers import (
    ERRORS,
    OBJECTIVES,
    difference,
    omega_rule,
    omega_rule_op,
    omega_rule_reference,
    rule_inputs,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow_as_it_is
from torch import Tensor

from atlas_blocks import ops
from atlas_blocks.functional import OmegaState
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.op import flatten
from atlas_blocks.omega.rule import Rule

pytest.importorskip("triton")
from kernel_runs import (
    DEVICE,
    ROUNDING,
    assert_provider_is_definition,
    cast,
    errors_against_float64,
    triton_rule,
)

from atlas_blocks.kernels import coefficients, matrix, matrix_backward, online

MULTIPLYING = (coefficients, online, matrix, matrix_backward)


@pytest.fixture(autouse=True)
def _tf32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def strong(inputs: dict[str, Any], strength: float = 12.0) -> dict[str, Any]:
    """Keys with a common direction, written so strongly that steps are limited."""
    k = inputs["k"] + 0.5 * inputs["k"][:, :1]
    return inputs | {"k": k, "eta": strength * inputs["eta"]}


def of_all_lengths(inputs: dict[str, Any]) -> dict[str, Any]:
    """Keys of one length would tie for the largest kappa, of which every form takes another
    subgradient."""
    lengths = torch.linspace(0.8, 1.2, inputs["k"].shape[1], dtype=torch.float64)
    return inputs | {"k": inputs["k"] * lengths[:, None, None]}


# Of what every example is made. Calls end inside chunks and inside windows.
EXAMPLES = {
    "chunk": st.sampled_from((1, 7, 16)),
    "window": st.sampled_from((1, 2, 5, 20)),
    "pieces": st.sampled_from(((1,), (40,), (5, 18, 3), (7, 7), (16, 16, 1, 1), (3, 30))),
    "widths": st.sampled_from(((3, 3), (16, 16), (5, 20))),
    "objective": st.sampled_from(OBJECTIVES),
    "momentum": st.booleans(),
    "errors": st.sampled_from(ERRORS),
    "decay_to": st.sampled_from(("zero", "zero", "initial")),
    "features": st.sampled_from(("identity", "polynomial", "sketch")),
    "seed": st.integers(0, 9),
}


@settings(max_examples=2)
@given(**EXAMPLES)
def test_a_matrix_memory_equals_the_definition(**example: Any) -> None:
    assert_example_is_definition(**example)


@pytest.mark.slow
@settings(max_examples=7)
@given(**EXAMPLES)
def test_any_matrix_memory_equals_the_definition(**example: Any) -> None:
    assert_example_is_definition(**example)


def assert_example_is_definition(
    chunk: int,
    window: int,
    pieces: tuple[int, ...],
    widths: tuple[int, int],
    objective: str,
    momentum: bool,
    errors: str,
    decay_to: str,
    features: str,
    seed: int,
) -> None:
    """Gates are 0 and 1 at some tokens."""
    width, value_width = widths if features == "identity" else (4, 3)
    inputs = rule_inputs(
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
    if errors == "online":
        inputs = strong(of_all_lengths(inputs))
    options = {"objective": objective, "chunk_size": chunk, "errors": errors, "decay_to": decay_to}
    assert_provider_is_definition(inputs, pieces, **options)


def test_a_gradient_whose_terms_cancel() -> None:
    """eta's: -1.015 + 0.836 from y and the state. Which form of the rule loses more is chance:
    token by token it errs by 1e-5 here."""
    inputs = rule_inputs(batch=2, heads=1, length=1, window=5, key_width=5, value_width=20, seed=1)
    forms = (omega_rule, omega_rule_reference)
    assert_provider_is_definition(inputs, (1,), forms, chunk_size=7)


def test_a_limited_write_does_not_change_with_gamma() -> None:
    """One token: what its window weighs cancels with what limits it."""
    inputs = rule_inputs(
        batch=2, heads=1, length=1, window=1, key_width=16, value_width=16, momentum=False, seed=6
    )
    assert_provider_is_definition(
        strong(of_all_lengths(inputs)), (1,), chunk_size=1, errors="online"
    )


@pytest.mark.parametrize(("chunk", "window"), [(16, 1), (64, 16), slow_as_it_is(37, 16)])
def test_online_errors_of_large_chunks(chunk: int, window: int) -> None:
    """Several blocks of the system, and splits at any place."""
    inputs = strong(of_all_lengths(rule_inputs(length=80, heads=1, window=window, key_width=16)))
    pieces = (80,) if chunk == 64 else (chunk - 1, 2, 79 - chunk)
    assert_provider_is_definition(inputs, pieces, chunk_size=chunk, errors="online")


@pytest.mark.parametrize(
    ("widths", "errors", "pieces"),
    [
        slow_as_it_is((24, 80), "online", (9, 5)),
        *(
            pytest.param(widths, errors, (41, 29), marks=pytest.mark.slow)
            for widths in ((64, 64), (300, 24), (24, 80))
            for errors in ERRORS
        ),
    ],
)
def test_wide_states_are_tiled(
    widths: tuple[int, int], errors: str, pieces: tuple[int, int]
) -> None:
    """300 features do not stay in registers; 80 values are several blocks."""
    chunk = 32 if sum(pieces) > 32 else 4
    inputs = rule_inputs(
        length=sum(pieces), heads=1, window=3, key_width=widths[0], value_width=widths[1]
    )
    inputs = of_all_lengths(inputs)
    assert_provider_is_definition(inputs, pieces, chunk_size=chunk, errors=errors)


def test_one_key_again_and_again() -> None:
    """Its system is the hardest: ones times strengths below the diagonal."""
    inputs = rule_inputs(length=70, heads=1, window=1, key_width=16, exact_gates=False)
    lengths = 1 + 1e-3 * torch.arange(70, dtype=torch.float64)
    inputs["k"] = inputs["k"][:, :1] * lengths[:, None, None]
    inputs["alpha"], inputs["eta"] = 1 - 0.01 * inputs["alpha"], 20 * inputs["eta"]
    inputs["gamma"] = torch.ones_like(inputs["gamma"])
    assert_provider_is_definition(inputs, (70,), chunk_size=64, errors="online")


# Documents of one token, shorter than the window, than a chunk, of several chunks and one group of
# them; begun ones at different places of their chunks, and some that end where a chunk does.
PACKED = ([0, 1, 4, 25, 32, 40], [0, 20, 26, 27, 38, 40])


@pytest.mark.parametrize(
    ("window", "widths", "errors"),
    [
        (1, (5, 20), "online"),
        pytest.param(5, (16, 16), "online", marks=pytest.mark.slow),
        pytest.param(20, (3, 3), "online", marks=pytest.mark.slow),
        pytest.param(5, (3, 3), "chunk", marks=pytest.mark.slow),
        pytest.param(1, (3, 3), "chunk", marks=pytest.mark.slow),
    ],
)
def test_packed_documents(window: int, widths: tuple[int, int], errors: str) -> None:
    inputs = rule_inputs(
        length=80, heads=1, window=window, key_width=widths[0], value_width=widths[1]
    )
    if errors == "online":
        inputs = strong(of_all_lengths(inputs))
    pieces = tuple(bounds[-1] for bounds in PACKED)
    assert_provider_is_definition(inputs, pieces, packed=PACKED, chunk_size=7, errors=errors)


@pytest.mark.slow
def test_packed_documents_whose_states_are_tiled() -> None:
    inputs = of_all_lengths(rule_inputs(length=20, heads=1, window=3, key_width=136, value_width=3))
    packed = ([0, 1, 10], [0, 6, 10])
    assert_provider_is_definition(inputs, (10, 10), packed=packed, chunk_size=8, errors="online")


@pytest.mark.parametrize("errors", ERRORS)
def test_rows_at_different_positions(errors: str) -> None:
    """One batch whose rows stand at different places of their chunks."""
    inputs = cast(rule_inputs(batch=3, length=30, window=4), torch.float32, torch.float32)
    options = {"chunk_size": 8, "errors": errors}
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


@pytest.mark.parametrize(
    ("dtype", "errors", "window", "strength"),
    [
        (torch.bfloat16, "chunk", 4, 1.0),
        (torch.bfloat16, "online", 1, 8.0),
        (torch.bfloat16, "online", 16, 8.0),
        (torch.float16, "online", 4, 1.0),
    ],
)
def test_low_precision_is_as_good_as_the_definitions(
    dtype: torch.dtype,
    errors: str,
    window: int,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ratios = errors_against_float64(
        dtype, 200, MULTIPLYING, monkeypatch, window=window, strength=strength, errors=errors
    )
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.slow
@pytest.mark.parametrize("errors", ERRORS)
def test_low_precision_over_4k_tokens(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = errors_against_float64(torch.bfloat16, 4096, MULTIPLYING, monkeypatch, errors=errors)
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
            y, state = omega_rule_op(**tokens(x, 0, 13), chunk_size=8)
            return torch.cat(
                [y, omega_rule_op(**tokens(x, 13, 20), chunk_size=8, state=state)[0]], 1
            )

    y = torch.compile(twice, backend="aot_eager", fullgraph=True)(inputs)
    true, _ = omega_rule(**inputs, chunk_size=8)
    assert difference([y], [true]) < 10 * ROUNDING


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("errors", "window", "decay_to"),
    [("online", 3, "initial"), ("online", 1, "zero"), ("chunk", 3, "zero")],
)
def test_what_is_saved_is_what_the_definition_saves(
    errors: str, window: int, decay_to: str, packed: bool
) -> None:
    """So a compiler pass may change the provider of the backward alone."""
    chunk = 8
    inputs = cast(
        rule_inputs(batch=1 if packed else 2, length=21, window=window),
        torch.float32,
        torch.float32,
    )
    options = {"chunk_size": chunk, "errors": errors, "decay_to": decay_to}
    first, cu_seqlens = None, None
    if packed:
        first, cu_seqlens = (torch.tensor(b, device=DEVICE) for b in ([0, 4, 5], [0, 3, 16]))
    _, state = omega_rule(**tokens(inputs, 0, 5), **options, cu_seqlens=first)
    rule = Rule("matrix", "l2", "gd", 5, 1, chunk, errors, window, decay_to)
    now = tokens(inputs, 5, 21)
    a = Arguments(*(now[n] for n in ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights")),
                  None, rule, state.map(torch.clone).detach(), cu_seqlens)  # fmt: skip
    tensors, arguments = flatten(a)
    tensors = [t.detach() for t in tensors]
    ours, true = (
        torch.ops.atlas.omega_rule.default(tensors, *arguments.flat(), provider, True)
        for provider in ("triton", "definition")
    )
    assert difference([t.double() for t in ours], [t.double() for t in true]) < 20 * ROUNDING
