"""Any split of a sequence is the sequence; rows of a batch do not know of each other."""

import itertools

import pytest
import torch
from helpers import (
    MEMORIES,
    OBJECTIVES,
    STEPS,
    UPDATES,
    assert_close,
    errors_for,
    omega_rule,
    rows,
    rule_in_pieces,
    rule_inputs,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas_blocks.functional import OmegaState

# Rounding alone separates a split from the whole; Newton-Schulz magnifies it (see rule_inputs).
TOLERANCE = {"gd": 1e-12, "muon": 1e-10}


@settings(max_examples=120)
@given(
    pieces=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    window=st.sampled_from([1, 2, 5, 16, 100]),
    chunk=st.sampled_from([1, 2, 7, 16, 64]),
    kind=st.sampled_from(list(itertools.product(MEMORIES, OBJECTIVES, STEPS))),
    features=st.sampled_from(["identity", "polynomial", "sketch"]),
    momentum=st.booleans(),
    ns_every=st.sampled_from([1, 3, 7]),
    decay_to=st.sampled_from(["zero", "initial"]),
)
def test_any_split_equals_the_whole(
    pieces, window, chunk, kind, features, momentum, ns_every, decay_to
) -> None:
    memory, objective, (update, errors) = kind
    x = rule_inputs(
        memory,
        batch=2,
        length=sum(pieces),
        window=window,
        features=features,
        momentum=momentum,
        update=update,
        seed=sum(pieces),
    )
    options = {
        "memory": memory,
        "objective": objective,
        "update": update,
        "chunk_size": chunk,
        "errors": errors,
        "ns_every": ns_every,
        "decay_to": decay_to,
    }
    whole = omega_rule(**x, **options)
    assert_close(rule_in_pieces(x, pieces, **options), whole, TOLERANCE[update])
    assert whole[1].position.tolist() == 2 * [sum(pieces)]


@settings(max_examples=40)
@given(data=st.data(), memory=st.sampled_from(MEMORIES), window=st.integers(1, 9))
def test_gates_drawn_from_0_and_1_alone_split_exactly(data, memory, window) -> None:
    length = data.draw(st.integers(1, 20))
    x = rule_inputs(memory, length=length, heads=1, window=window)
    for gate in ("alpha", "theta", "gamma"):
        bits = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        drawn = torch.tensor(bits, dtype=torch.float64).reshape(1, length, 1)
        x[gate] = drawn if gate != "gamma" else drawn.unsqueeze(-1).expand_as(x[gate])
    options = {"memory": memory, "chunk_size": 6, "errors": "online"}
    whole = omega_rule(**x, **options)
    assert all(t.isfinite().all() for t in whole[1].tensors())
    cut = data.draw(st.integers(0, length))
    assert_close(rule_in_pieces(x, [cut, length - cut], **options), whole, 1e-11)


@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_token_by_token_equals_the_whole(memory: str, update: str, errors: str) -> None:
    x = rule_inputs(memory, batch=2, length=25, window=5, update=update)
    options = {"memory": memory, "update": update, "chunk_size": 7, "errors": errors}
    options["decay_to"] = "initial" if memory == "mlp" else "zero"
    assert_close(
        rule_in_pieces(x, 25 * [1], **options), omega_rule(**x, **options), TOLERANCE[update]
    )


@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_at_different_positions_equal_each_alone(
    memory: str, update: str, errors: str
) -> None:
    options = {"memory": memory, "update": update, "chunk_size": 7, "errors": errors}
    lengths = (0, 3, 12, 7, 3)  # two rows at one position, one at a chunk's end
    x = rule_inputs(memory, batch=len(lengths), length=40, window=5, update=update)
    states = []
    for i, length in enumerate(lengths):
        row = rows(x, [i])
        states.append(omega_rule(**tokens(row, 0, length), **options)[1])
    after = tokens(x, 12, 31)
    y, end = omega_rule(**after, **options, state=OmegaState.cat(states))
    assert end.position.tolist() == [length + 19 for length in lengths]
    for i, state in enumerate(states):
        alone = omega_rule(**rows(after, [i]), **options, state=state)
        assert_close((y[[i]], end[[i]]), alone, TOLERANCE[update])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_row_does_not_depend_on_its_batch(memory: str, update: str) -> None:
    x = rule_inputs(memory, batch=4, length=30, window=5, features="sketch", update=update)
    options = {"memory": memory, "update": update, "chunk_size": 7}
    y, end = omega_rule(**x, **options)
    for i in range(4):
        alone = omega_rule(**rows(x, [i]), **options)
        assert_close((y[[i]], end[[i]]), alone, TOLERANCE[update])
    order = [2, 0, 3, 1]
    assert_close((y[order], end[order]), omega_rule(**rows(x, order), **options), TOLERANCE[update])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_token_never_changes_what_came_before_it(memory: str, update: str) -> None:
    """Chunks look ahead in nothing: outputs before t are the same to the last bit."""
    x = rule_inputs(memory, length=30, window=5, update=update)
    options = {"memory": memory, "update": update, "chunk_size": 7, "errors": errors_for(update)}
    y, _ = omega_rule(**x, **options)
    for t in (1, 6, 7, 20, 29):
        changed = dict(x)
        for name in ("q", "k", "v", "alpha", "eta", "theta", "gamma"):
            changed[name] = x[name].clone()
            changed[name][:, t:] = x[name][:, t:].flip(1) * 0.5
        z, _ = omega_rule(**changed, **options)
        torch.testing.assert_close(z[:, :t], y[:, :t], rtol=1e-12, atol=1e-12)
        assert (z[:, t] - y[:, t]).abs().max() > 1e-6


def test_the_state_of_a_call_is_not_changed_by_the_next() -> None:
    x = rule_inputs("mlp", batch=2, length=20, window=5)
    options = {"memory": "mlp", "chunk_size": 7, "errors": "online"}
    _, state = omega_rule(**tokens(x, 0, 9), **options)
    copy = state.map(torch.Tensor.clone)
    omega_rule(**tokens(x, 9, 20), **options, state=state)
    for a, b in zip(state.tensors(), copy.tensors(), strict=True):
        assert torch.equal(a, b)
