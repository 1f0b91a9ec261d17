"""The dual form is the rule: outputs, states and gradients equal the token-by-token reference."""

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    ERRORS,
    MEMORIES,
    OBJECTIVES,
    STEPS,
    STREAMS,
    UPDATES,
    assert_close,
    difference,
    errors_for,
    everything,
    feature_map,
    leaves,
    named_leaves,
    omega_rule,
    omega_rule_reference,
    rule_inputs,
)
from torch import Tensor

WINDOWS = (1, 2, 5, 16, 100)
CHUNKS = (1, 7, 64)
LENGTHS = (0, 1, 5, 64, 130)
KINDS = tuple(itertools.product(MEMORIES, OBJECTIVES, UPDATES))
SHAPES = tuple(itertools.product(WINDOWS, CHUNKS, LENGTHS))

# With online errors the reference takes the square of what a chunk sees for every token.
ONLINE_KINDS = tuple(itertools.product(MEMORIES, OBJECTIVES))
ONLINE_SHAPES = tuple(itertools.product((1, 5, 16), ((1, 5), (7, 11), (64, 96))))
FEATURES = ("identity", "polynomial", "sketch")
DECAYS = ("zero", "initial")


def options(i: int) -> dict[str, Any]:
    """The remaining settings of the i-th case: each is on and off, in every combination."""
    return {
        "momentum": i % 2 == 0,
        "ns_every": (1, 3, 1)[i % 3],
        "features": ("identity", "polynomial", "sketch", "identity")[i // 4 % 4],
        "value_width": 3 if i % 5 else 2,  # with and without the memory's residual
        "decay_to": ("zero", "initial", "zero")[i // 5 % 3],
    }


def assert_equals_reference(inputs: dict[str, Any], **settings: Any) -> None:
    with torch.no_grad():
        ours = omega_rule(**inputs, **settings)
        assert_close(ours, omega_rule_reference(**inputs, **settings), 1e-10)


def check(
    memory: str, objective: str, update: str, window: int, chunk: int, length: int, case: int
) -> None:
    o = options(case)
    inputs = rule_inputs(
        memory,
        length=length,
        window=window,
        update=update,
        batch=1 if length * window > 400 else 2,
        features=o["features"],
        momentum=o["momentum"],
        value_width=o["value_width"],
        seed=case,
    )
    assert_equals_reference(
        inputs,
        memory=memory,
        objective=objective,
        update=update,
        chunk_size=chunk,
        ns_every=o["ns_every"],
        decay_to=o["decay_to"],
    )


def default_cases() -> list[tuple]:
    """Every kind with a twelfth of the shapes; over the kinds every shape comes once."""
    return [
        (*kind, *shape, i + 7 * n)
        for n, kind in enumerate(KINDS)
        for i, shape in enumerate(SHAPES)
        if i % len(KINDS) == n
    ]


def test_the_default_cases_cover_every_shape_and_every_value_for_every_kind() -> None:
    cases = default_cases()
    assert {c[3:6] for c in cases} == set(SHAPES)
    for kind in KINDS:
        shapes = [c[3:6] for c in cases if c[:3] == kind]
        assert [{s[i] for s in shapes} for i in range(3)] == [
            set(WINDOWS),
            set(CHUNKS),
            set(LENGTHS),
        ]


@pytest.mark.parametrize("case", default_cases(), ids=lambda c: "-".join(map(str, c)))
def test_chunked_equals_token_by_token(case: tuple) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("window", WINDOWS)
def test_chunked_equals_token_by_token_on_the_full_grid(
    kind: tuple[str, str, str], window: int
) -> None:
    """A third of it for each kind and window, another third for the next."""
    n = KINDS.index(kind) + WINDOWS.index(window)
    for i, (chunk, length) in enumerate(itertools.product(CHUNKS, LENGTHS)):
        if i % 3 != n % 3:
            continue
        # With momentum and without; long sequences take one of the two in turn.
        chosen = (i % 2,) if length >= 64 else (0, 1, 2, 3)
        for j in chosen:
            check(*kind, window, chunk, length, j + 4 * i)


def check_online(
    kind: tuple[str, str],
    shape: tuple[int, tuple[int, int]],
    momentum: bool,
    features: str,
    value_width: int,
    decay_to: str,
) -> None:
    """Strengths such that own steps are limited at some tokens and not at others."""
    (memory, objective), (window, (chunk, length)) = kind, shape
    inputs = rule_inputs(
        memory,
        batch=1 if chunk > 7 else 2,
        length=length,
        heads=1 if chunk > 7 else 2,
        window=window,
        features=features,
        momentum=momentum,
        value_width=value_width,
    )
    inputs["eta"] = 8 * inputs["eta"]
    settings = {"memory": memory, "objective": objective, "chunk_size": chunk}
    assert_equals_reference(inputs, **settings, errors="online", decay_to=decay_to)


@pytest.mark.parametrize("kind", ONLINE_KINDS, ids="-".join)
def test_online_errors_by_chunks_are_those_token_by_token(kind: tuple[str, str]) -> None:
    """Every shape for every kind; pairs of the rest in turn."""
    for i, shape in enumerate(ONLINE_SHAPES, start=ONLINE_KINDS.index(kind)):
        check_online(
            kind, shape, i % 2 == 0, FEATURES[i // 2 % 3], 2 + (i % 3 > 0), DECAYS[i // 3 % 2]
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE_KINDS, ids="-".join)
@pytest.mark.parametrize("shape", ONLINE_SHAPES, ids=str)
def test_online_errors_by_chunks_are_those_token_by_token_on_the_full_grid(
    kind: tuple[str, str], shape: tuple[int, tuple[int, int]]
) -> None:
    """Every sixth value of the rest, another sixth for the next shape."""
    rest = itertools.product((True, False), FEATURES, (2, 3), DECAYS)
    n = ONLINE_SHAPES.index(shape) + ONLINE_KINDS.index(kind)
    for momentum, features, width, decay_to in itertools.islice(rest, n % 6, None, 6):
        check_online(kind, shape, momentum, features, width, decay_to)


def test_online_errors_are_for_gradient_descent_alone() -> None:
    for rule in (omega_rule, omega_rule_reference):
        with pytest.raises(ValueError, match="errors: expected \"chunk\" with update='muon'"):
            rule(**rule_inputs(update="muon"), update="muon", errors="online")


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("gate", ["alpha", "eta", "theta", "gamma"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("errors", ERRORS)
def test_a_gate_that_is_0_or_1_everywhere_is_exact(
    memory: str, gate: str, value: float, errors: str
) -> None:
    inputs = rule_inputs(memory, batch=2, length=16, window=3)
    inputs[gate] = torch.full_like(inputs[gate], value)
    settings = {"memory": memory, "chunk_size": 7, "errors": errors}
    assert_equals_reference(inputs, **settings)


def gradients(rule: Any, inputs: dict[str, Any], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a random functional of the second half's output and state."""
    inputs = leaves(inputs)
    wanted = named_leaves(inputs)
    # The first call gives a state whose tensors become leaves of their own.
    _, state = rule(**inputs, **settings)
    state = state.map(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
    y, after = rule(**inputs, **settings, state=state)
    g = torch.Generator().manual_seed(1)
    results = [t for t in (y, *after.tensors()) if t.is_floating_point()]
    total = sum(
        (t.double() * torch.randn(t.shape, generator=g, dtype=torch.float64)).sum() for t in results
    )
    wanted |= {f"state {i}": t for i, t in enumerate(state.tensors()) if t.is_floating_point()}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(wanted.items(), found, strict=True)
    }


@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("update", "errors"), STEPS)
def test_gradients_equal_those_through_the_reference(
    memory: str, objective: str, update: str, errors: str, features: str
) -> None:
    number = KINDS.index((memory, objective, update))
    number += ("identity", "polynomial", "sketch").index(features)
    inputs = rule_inputs(
        memory,
        batch=2,
        length=11,
        window=3,
        features=features,
        momentum=number % 4 != 3,
        update=update,
        seed=number,
    )
    if errors == "online":
        untie(inputs)
    settings = {
        "memory": memory,
        "objective": objective,
        "update": update,
        "chunk_size": 4,
        "errors": errors,
        "ns_every": 1 + number % 2,
        "decay_to": DECAYS[number % 2],
    }
    ours = gradients(omega_rule, inputs, settings)
    true = gradients(omega_rule_reference, inputs, settings)
    for name, gradient in true.items():
        gap = difference([ours[name]], [gradient])
        assert gap <= 1e-9, f"{name}: {gap:.3g}"


def untie(inputs: dict[str, Any]) -> None:
    """Keys of different lengths and no momentum of 1: where several keys are the largest, what of
    the scale's gradient each gets is anybody's choice."""
    lengths = torch.rand(inputs["k"].shape[:-1], dtype=torch.float64)
    inputs["k"] = inputs["k"] * (0.5 + lengths)[..., None]
    if inputs["theta"] is not None:
        inputs["theta"] = inputs["theta"].clamp(max=0.95)


def test_every_argument_gets_a_gradient() -> None:
    inputs = rule_inputs("mlp", batch=1, length=11, window=3, features="polynomial")
    found = gradients(omega_rule, inputs, {"memory": "mlp", "chunk_size": 4})
    without = {name for name, gradient in found.items() if gradient.numel() and not gradient.any()}
    # M_0 only serves the first call, and a begun chunk is done again from its start.
    assert without == {"weights[0]", "weights[1]", *(f"state {i}" for i in range(4))}
    assert set(STREAMS) | {"coefficients"} <= set(found) - without


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_gradcheck(memory: str, update: str) -> None:
    inputs = leaves(
        rule_inputs(
            memory,
            length=4,
            heads=1,
            key_width=2,
            value_width=2,
            window=2,
            features="polynomial",
            update=update,
            exact_gates=False,
        )
    )
    names = list(named_leaves(inputs))
    streams = [n for n in names if n in STREAMS]

    def rule(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        phi = type(inputs["feature_map"])(given["coefficients"])
        weights = [given[n] for n in names if n.startswith("weights")]
        y, state = omega_rule(
            **{n: given[n] for n in streams},
            weights=weights,
            feature_map=phi,
            memory=memory,
            update=update,
            chunk_size=3,
            errors=errors_for(update),
            # The check's own step of 1e-6 meets the gain of five Newton-Schulz steps otherwise.
            ns_steps=2,
        )
        return y, *state.weights, *state.momentum

    assert torch.autograd.gradcheck(rule, tuple(named_leaves(inputs).values()), atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_update_happens_without_autograd(memory: str, update: str, mode: Any) -> None:
    inputs = rule_inputs(memory, batch=2, length=23, window=3, update=update)
    settings = {"memory": memory, "update": update, "chunk_size": 7}
    true = omega_rule(**leaves(inputs), **settings)
    with mode():
        ours = omega_rule(**inputs, **settings)
        assert difference([ours[1].weights[0]], [inputs["weights"][0].expand(2, -1, -1, -1)]) > 0.01
        assert_close(ours, true, 1e-13)


def test_autocast_changes_nothing() -> None:
    inputs = rule_inputs("mlp", batch=2, length=23, window=3, features="polynomial")
    inputs = {n: x.float() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    inputs["weights"] = [w.float() for w in inputs["weights"]]
    for update in UPDATES:
        true = omega_rule(**inputs, memory="mlp", update=update, chunk_size=7)
        with torch.autocast("cpu", torch.bfloat16):
            ours = omega_rule(**inputs, memory="mlp", update=update, chunk_size=7)
        for a, b in zip(everything(ours), everything(true), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_state_and_arithmetic_are_never_below_float32(
    memory: str, update: str, dtype: torch.dtype
) -> None:
    # Rounded first, so that only the arithmetic differs; six heads, since a single head's
    # orthogonalised step may magnify float32's rounding.
    inputs = rule_inputs(memory, batch=2, length=30, heads=6, window=3, update=update)
    low = {n: x.to(dtype) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    low["weights"] = [w.to(dtype) for w in inputs["weights"]]
    high = {n: x.double() if isinstance(x, Tensor) else x for n, x in low.items()}
    high["weights"] = [w.double() for w in low["weights"]]
    settings = {"memory": memory, "update": update, "chunk_size": 7, "ns_steps": 3}
    y, state = omega_rule(**low, **settings)
    true_y, true_state = omega_rule(**high, **settings)
    assert y.dtype == dtype
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in state.tensors() if t.is_floating_point()} == {wanted}
    # The state is as good as float32, whatever the inputs' dtype; y is that, rounded once.
    for a, b in zip(state.tensors(), true_state.tensors(), strict=True):
        assert difference([a.double()], [b.double()]) < 2e-4
    rounding = torch.finfo(dtype).eps
    assert difference([y.double()], [true_y]) < rounding + 2e-4


def test_mixed_dtypes_take_the_widest_state() -> None:
    inputs = rule_inputs("matrix", length=5)
    inputs = {n: x.bfloat16() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    y, state = omega_rule(**inputs)  # float64 weights
    assert y.dtype == torch.bfloat16
    assert state.weights[0].dtype == torch.float64


def test_a_padded_feature_map_and_no_tokens_are_legal() -> None:
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        inputs = rule_inputs("mlp", batch=batch, length=length, features="sketch")
        y, state = omega_rule(**inputs, memory="mlp")
        assert y.shape == (batch, length, 2, 3)
        assert state.position.tolist() == [length if batch and length else 0] * batch
        assert feature_map("sketch", 3).width_of(3) == state.weights[1].shape[-1]
