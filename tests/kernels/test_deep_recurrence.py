"""The Triton provider is the definition, forward and backward, with a deep memory: under the
interpreter on a CPU with small shapes, on a GPU with real ones as well.
"""

from typing import Any

import pytest
import torch
from helpers import ERRORS, MEMORIES, OBJECTIVES, difference, omega_rule, rule_inputs, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow_as_it_is

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

from atlas_blocks.kernels import coefficients
from atlas_blocks.kernels.deep import (
    keys,
    online,
    online_backward,
    reads,
    reads_backward,
    rooms,
    writes,
    writes_backward,
)

MULTIPLYING = (
    coefficients, keys, rooms, writes, reads, online, reads_backward, writes_backward,
    online_backward,
)  # fmt: skip
DEEP = MEMORIES[1:]


@pytest.fixture(autouse=True)
def _tf32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


EXAMPLES = {
    "memory": st.sampled_from(DEEP),
    "chunk": st.sampled_from((5, 16)),
    "window": st.sampled_from((1, 2, 5, 20)),
    "pieces": st.sampled_from(((1,), (18,), (5, 9, 3), (16, 1, 1))),
    "widths": st.sampled_from(((3, 3), (16, 16), (5, 20))),
    "objective": st.sampled_from(OBJECTIVES),
    "momentum": st.booleans(),
    "errors": st.sampled_from(ERRORS),
    "decay_to": st.sampled_from(("zero", "initial")),
    "features": st.sampled_from(("identity", "polynomial", "sketch")),
    "seed": st.integers(0, 9),
}


@settings(max_examples=2)
@given(**EXAMPLES)
def test_a_deep_memory_equals_the_definition(**example: Any) -> None:
    assert_example_is_definition(**example)


@pytest.mark.slow
@settings(max_examples=7)
@given(**EXAMPLES)
def test_deep_memories_equal_the_definition(**example: Any) -> None:
    assert_example_is_definition(**example)


def assert_example_is_definition(
    memory: str,
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
    options = {"memory": memory, "objective": objective, "chunk_size": chunk}
    options |= {"errors": errors, "decay_to": decay_to}
    assert_provider_is_definition(inputs, pieces, **options)


@pytest.mark.parametrize(
    ("memory", "chunk", "window", "errors", "momentum", "objective", "decay_to"),
    [
        slow_as_it_is("gated_mlp", 32, 3, "online", False, "l2", "initial"),
        pytest.param("mlp", 4, 3, "online", True, "l2", "zero", marks=pytest.mark.slow),
        pytest.param("gated_mlp", 16, 20, "online", True, "l2", "initial", marks=pytest.mark.slow),
        pytest.param("gated_mlp", 4, 1, "chunk", True, "dot", "initial", marks=pytest.mark.slow),
    ],
)
def test_deep_memories_are_tiled(
    memory: str,
    chunk: int,
    window: int,
    errors: str,
    momentum: bool,
    objective: str,
    decay_to: str,
) -> None:
    """Several blocks of hidden units and of D, several tiles of keys, and groups of chunks."""
    inputs = rule_inputs(
        memory, length=21, heads=1, window=window, key_width=70, value_width=20, hidden=40,
        momentum=momentum,
    )  # fmt: skip
    options = {"memory": memory, "chunk_size": chunk, "errors": errors}
    options |= {"objective": objective, "decay_to": decay_to}
    assert_provider_is_definition(inputs, (14, 7), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "momentum"), [("mlp", True), ("gated_mlp", False)])
def test_packed_documents(memory: str, momentum: bool) -> None:
    inputs = rule_inputs(memory, length=40, heads=1, window=4, momentum=momentum)
    packed = ([0, 1, 15, 18, 20], [0, 9, 10, 19, 20])
    options = {"memory": memory, "errors": "online", "decay_to": "initial"}
    assert_provider_is_definition(inputs, (20, 20), packed=packed, chunk_size=5, **options)


@pytest.mark.parametrize("memory", ["mlp", slow_as_it_is("gated_mlp")])
def test_rows_at_different_positions(memory: str) -> None:
    """One batch whose rows stand at different places of their chunks."""
    inputs = cast(rule_inputs(memory, batch=3, length=30, window=4), torch.float32, torch.float32)
    options = {"memory": memory, "chunk_size": 8, "errors": "online"}
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


@pytest.mark.parametrize("length", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("memory", ["mlp", slow_as_it_is("gated_mlp")])
def test_bfloat16_is_as_good_as_the_definitions(
    memory: str, errors: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = errors_against_float64(
        torch.bfloat16, length, MULTIPLYING, monkeypatch, memory, errors=errors
    )
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("packed", [slow_as_it_is(False), True])
def test_what_is_saved_is_what_the_definition_saves(packed: bool) -> None:
    """So a compiler pass may change the provider of the backward alone."""
    inputs = rule_inputs("mlp", batch=1 if packed else 2, length=21, window=3)
    inputs = cast(inputs, torch.float32, torch.float32)
    options = {"memory": "mlp", "chunk_size": 8, "errors": "online"}
    first, cu_seqlens = None, None
    if packed:
        first, cu_seqlens = (torch.tensor(b, device=DEVICE) for b in ([0, 4, 5], [0, 3, 16]))
    _, state = omega_rule(**tokens(inputs, 0, 5), **options, cu_seqlens=first)
    rule = Rule("mlp", "l2", "gd", 5, 1, 8, "online", 3)
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
