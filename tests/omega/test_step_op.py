"""One token with its state updated in place is `omega_rule` for T = 1."""

import dataclasses

import pytest
import torch
from helpers import (
    MEMORIES,
    STEPS,
    STREAMS,
    UPDATES,
    HostData,
    assert_close,
    errors_for,
    omega_rule,
    omega_rule_step,
    rows,
    rule_inputs,
    tokens,
)

from atlas_blocks.functional import OmegaState, PolynomialMap
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import initial_state

OPS = torch.ops.atlas


def token(inputs, t):
    """The step's arguments for one token: no axis of tokens, no M_0."""
    chosen = {
        name: x[:, t] if name in STREAMS and x is not None else x for name, x in inputs.items()
    }
    del chosen["weights"]
    return chosen


def before(inputs, options):
    """The state before the first token, with memory of its own."""
    rule = Rule(
        options.get("memory", "matrix"),
        "l2",
        options.get("update", "gd"),
        5,
        1,
        options["chunk_size"],
        options.get("errors", "chunk"),
        inputs["gamma"].shape[-1],
    )
    q, v, weights = inputs["q"], inputs["v"], inputs["weights"]
    first = initial_state(q, v, weights, rule, inputs["theta"] is not None)
    return first.map(torch.clone)


def stepped(inputs, state, options, first=0):
    """y of every token from `first` on, one step at a time."""
    outputs = [
        omega_rule_step(**token(inputs, t), **options, state=state)
        for t in range(first, inputs["q"].shape[1])
    ]
    return torch.stack(outputs, 1)


class Recorded:
    """An op that notes its arguments."""

    def __init__(self, op, calls):
        self.op, self.calls = op, calls

    def default(self, *arguments):
        self.calls.append(arguments)
        return self.op(*arguments)


@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_step_is_the_rule_for_one_token(memory, update, errors, features):
    """Bit for bit, at every place of a chunk; rows at different positions; M_0 is left alone."""
    for momentum, objective, decay_to in (
        (True, "l2", "zero"),
        (False, "dot", "zero"),
        (True, "l2", "initial"),
    ):
        inputs = rule_inputs(
            memory, batch=2, length=10, window=3, features=features, momentum=momentum,
            update=update,
        )  # fmt: skip
        options = {
            "memory": memory,
            "objective": objective,
            "update": update,
            "chunk_size": 4,
            "errors": errors,
            "decay_to": decay_to,
        }
        # The step looks at M_0 only where the memory decays to it.
        first = {"weights": inputs["weights"]} if decay_to == "initial" else {}
        past = [omega_rule(**tokens(rows(inputs, [i]), 0, n), **options)[1]
                for i, n in enumerate((0, 2))]  # fmt: skip
        state = OmegaState.cat(past).map(torch.clone)
        true = state.map(torch.clone)
        kept = [w.clone() for w in inputs["weights"]]
        for t in range(2, 10):
            y = omega_rule_step(**token(inputs, t), **first, **options, state=state)
            z, true = omega_rule(**tokens(inputs, t, t + 1), **options, state=true)
            assert_close((y, state), (z[:, 0], true), 0.0)
        assert all(map(torch.equal, kept, inputs["weights"]))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_forty_steps_are_one_call(memory, update):
    inputs = rule_inputs(memory, batch=2, length=40, window=5, update=update)
    options = {"memory": memory, "update": update, "chunk_size": 8, "errors": errors_for(update)}
    state = before(inputs, options)
    y = stepped(inputs, state, options)
    assert_close((y, state), omega_rule(**inputs, **options), 1e-9)


def test_low_precision_tokens_and_a_batch_of_none():
    inputs = rule_inputs(batch=2, length=6)
    inputs = {n: x.bfloat16() if n in STREAMS else x for n, x in inputs.items()}
    inputs["weights"] = [w.float() for w in inputs["weights"]]
    options = {"chunk_size": 4}
    state = before(inputs, options)
    y = stepped(inputs, state, options)
    assert (y.dtype, state.weights[0].dtype) == (torch.bfloat16, torch.float32)
    none = rows(inputs, [])
    assert stepped(none, before(none, options), options).shape == (0, 6, 2, 3)


@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_opcheck_passes(memory, update, errors, features, monkeypatch):
    """On what the door hands to the op, with and without momentum."""
    calls = []
    for momentum in (True, False):
        inputs = rule_inputs(memory, length=2, features=features, update=update, momentum=momentum)
        options = {"memory": memory, "update": update, "chunk_size": 4, "errors": errors}
        state = before(inputs, options)
        door = OPS.omega_rule_step
        with monkeypatch.context() as patched:
            patched.setattr(OPS, "omega_rule_step", Recorded(door.default, calls))
            stepped(inputs, state, options)
    for arguments in calls:
        torch.library.opcheck(
            OPS.omega_rule_step.default,
            arguments,
            {},
            test_utils=("test_schema", "test_faketensor"),
        )
    assert len(calls) == 4


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph_it_updates_the_same_state():
    torch._dynamo.reset()
    inputs = rule_inputs("mlp", batch=2, length=6, window=3, features="polynomial")
    options = {"memory": "mlp", "chunk_size": 4, "errors": "online"}

    @torch.compile(backend="aot_eager", fullgraph=True)
    def two(a, b, coefficients, state):
        phi = {"feature_map": PolynomialMap(coefficients)}
        y = omega_rule_step(**(a | phi), **options, state=state)
        return y, omega_rule_step(**(b | phi), **options, state=state)

    state = before(inputs, options)
    outputs = []
    coefficients = inputs["feature_map"].coefficients
    plain = inputs | {"feature_map": None}
    for t in (0, 2, 4):
        outputs += two(token(plain, t), token(plain, t + 1), coefficients, state)
    assert_close((torch.stack(outputs, 1), state), omega_rule(**inputs, **options), 1e-10)


def test_what_has_no_memory_of_its_own_is_refused():
    inputs, options = rule_inputs(batch=2, length=5), {"chunk_size": 4}
    whole = omega_rule(**tokens(inputs, 0, 4), **options)[1]  # where M^(0) is M
    shared = whole.replace(chunk_start=whole.weights)
    expanded = before(inputs, options).replace(
        chunk_start=(inputs["weights"][0].expand(2, -1, -1, -1),)
    )
    for state, message in (
        (shared, r"state\.\w+\[0\]: .*state\.clone\(\).*, got that of state\.\w+\[0\]"),
        (expanded, r"state\.chunk_start\[0\]: expected a contiguous tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            omega_rule_step(**token(inputs, 4), **options, state=state)
        y = omega_rule_step(**token(inputs, 4), **options, state=state.clone())
        assert y.shape == (2, 2, 3)


def test_parts_of_one_buffer_are_memory_of_their_own():
    inputs, options = rule_inputs(batch=2, length=9), {"chunk_size": 4}
    state = before(inputs, options)
    buffer = torch.zeros(sum(t.numel() for t in state.tensors()), dtype=torch.float64)
    place = 0

    def within(t):
        nonlocal place
        if t.dtype == torch.int64:
            return t
        part = buffer[place : place + t.numel()].view(t.shape)
        place += t.numel()
        return part.copy_(t)

    state = state.map(within)
    y = stepped(inputs, state, options)
    assert_close((y, state), omega_rule(**inputs, **options), 1e-10)


def test_gradients_are_refused_and_no_grad_is_not():
    inputs, options = rule_inputs(length=1, features="polynomial"), {"chunk_size": 4}
    state, x = before(inputs, options), token(inputs, 0)
    phi = PolynomialMap(inputs["feature_map"].coefficients.clone().requires_grad_())
    for name, change in (
        ("v", {"v": inputs["v"].clone().requires_grad_()}),
        ("theta", {"theta": inputs["theta"].clone().requires_grad_()}),
        (r"feature_map\.coefficients", {"feature_map": phi}),
    ):
        bad = token(inputs | change, 0)
        with pytest.raises(ValueError, match=f"^{name}: expected no gradient"):
            omega_rule_step(**bad, **options, state=state)
        with torch.no_grad():
            omega_rule_step(**bad, **options, state=state)
    wanted = state.map(lambda t: t.requires_grad_() if t.is_floating_point() else t)
    with pytest.raises(ValueError, match=r"^state\.weights\[0\]: expected no gradient"):
        omega_rule_step(**x, **options, state=wanted)


def test_autograd_sees_that_the_state_changed():
    inputs, options = rule_inputs(length=1), {"chunk_size": 4}
    state = before(inputs, options)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = state.weights[0] @ x
    omega_rule_step(**token(inputs, 0), **options, state=state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 1, 2, 3)}, r"q: expected shape \[B, H, Dk\]"),
        ({"k": torch.zeros(1, 2, 4)}, r"k: expected shape \[B, H, Dk\]"),
        ({"alpha": torch.zeros(1, 1, 2)}, r"alpha: expected shape \[B, H\]"),
        ({"gamma": torch.zeros(1, 2)}, r"gamma: expected shape \[B, H, rule.window\]"),
        ({"gamma": torch.zeros(1, 2, 3)}, r"state\.keys: expected shape"),
        ({"memory": "mlp"}, r"state\.weights: expected 2 tensors for memory='mlp', got 1"),
        ({"state": None}, "state: expected an OmegaState, got NoneType"),
        ({"theta": None}, r"state\.momentum: expected shapes \[\]"),
        ({"decay_to": "initial"}, 'weights: expected M_0, with decay_to="initial", got None'),
        ({"provider": "fast"}, "provider: expected one of auto, definition, inline, triton"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    inputs, options = rule_inputs(length=1), {"chunk_size": 4}
    arguments = token(inputs, 0) | {"state": before(inputs, options)} | change
    with pytest.raises(ValueError, match=message):
        omega_rule_step(**arguments, **options)


def test_a_state_of_another_dtype_is_refused():
    """It could not hold what `omega_rule` would return."""
    inputs, options = rule_inputs(length=1), {"chunk_size": 4}
    state = before(inputs, options)
    single = state.map(lambda t: t.float() if t.is_floating_point() else t)
    with pytest.raises(ValueError, match=r"state\.weights\[0\]: expected torch\.float64 on cpu"):
        omega_rule_step(**token(inputs, 0), **options, state=single)


@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_where_the_position_is_on_a_device_nothing_is_asked_of_the_host(
    memory, update, errors, features
):
    """Then a CUDA graph can hold the step. On tensors without storage, which cannot be read."""
    inputs = rule_inputs(memory, length=2, window=3, features=features, update=update)
    options = {"memory": memory, "update": update, "chunk_size": 4, "errors": errors}
    state = before(inputs, options).map(lambda t: t.to("meta"))
    phi = inputs["feature_map"]
    if phi is not None:
        moved = {n: t.to("meta") for n, t in vars(phi).items() if isinstance(t, torch.Tensor)}
        phi = dataclasses.replace(phi, **moved)
    x = {n: t.to("meta") for n, t in token(inputs, 0).items() if isinstance(t, torch.Tensor)}
    for _ in range(2):  # the first call fills what is kept
        with HostData() as host:
            y = omega_rule_step(**x, **options, feature_map=phi, state=state)
    assert host.found == []
    assert y.shape == (1, 2, 3)


def test_host_data_is_noticed():
    with HostData() as host:
        torch.tensor([1.0])
    assert len(host.found) == 1
