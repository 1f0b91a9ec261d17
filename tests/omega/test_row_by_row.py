"""The provider "one_token": rows at different places in one batch, as the definition has them."""

import pytest
import torch
from helpers import assert_close, errors_for, leaves, rows, rule_inputs, tokens
from helpers import omega_rule_op as omega_rule

from atlas_blocks import State, use_provider

CHUNK = 5
# Rows stand at the start, inside, at the end of a chunk of 5, and two at one place.
PAST = (0, 1, 4, 5, 8, 4)


def at_places(inputs, past, **options):
    """The states of rows after so many tokens, joined."""
    states = []
    for row, length in enumerate(past):
        state = omega_rule(**tokens(rows(inputs, [row]), 0, length), **options)[1]
        states.append(state)
    return State.cat(states)


@pytest.mark.parametrize(
    ("memory", "objective", "update"),
    [
        ("matrix", "l2", "gd"),
        ("matrix", "dot", "gd"),
        ("mlp", "l2", "gd"),
        ("gated_mlp", "l2", "muon"),
        ("matrix", "l2", "muon"),
    ],
)
@pytest.mark.parametrize("window", [1, 3])
def test_a_token_of_rows_at_different_places_is_the_definitions(memory, objective, update, window):
    inputs = rule_inputs(memory, batch=len(PAST), length=20, window=window, update=update)
    options = {
        "memory": memory,
        "objective": objective,
        "update": update,
        "chunk_size": CHUNK,
        "errors": errors_for(update),
    }
    true = ours = at_places(inputs, PAST, **options)
    for i in range(9, 9 + CHUNK + 2):
        one = tokens(inputs, i, i + 1)
        expected, true = omega_rule(**one, **options, state=true)
        found, ours = omega_rule(**one, **options, state=ours, provider="one_token")
        assert_close((found, ours), (expected, true), 1e-7 if update == "muon" else 1e-10)


def test_nothing_that_it_returns_shares_memory():
    inputs = rule_inputs(batch=2, length=3)
    state = omega_rule(**tokens(inputs, 0, 2), chunk_size=1)[1]
    y, after = omega_rule(**tokens(inputs, 2, 3), chunk_size=1, state=state, provider="one_token")
    storages = [t.untyped_storage()._cdata for t in (y, *after.tensors(), *state.tensors())]
    assert len(set(storages)) == len(storages)


def test_more_tokens_are_the_definitions():
    inputs = rule_inputs(batch=2, length=7)
    with use_provider("one_token"):
        ours = omega_rule(**inputs, chunk_size=CHUNK)
    assert_close(ours, omega_rule(**inputs, chunk_size=CHUNK), 0.0)
    bounds = torch.tensor([0, 3, 7])
    packed = {**rows(inputs, [0]), "chunk_size": CHUNK, "cu_seqlens": bounds}
    assert_close(omega_rule(**packed, provider="one_token"), omega_rule(**packed), 0.0)


def test_a_gradient_is_refused():
    inputs = leaves(rule_inputs(length=1))
    with pytest.raises(ValueError, match=r"'one_token' cannot serve .* it has no backward"):
        omega_rule(**inputs, provider="one_token")
    with torch.no_grad():
        omega_rule(**inputs, provider="one_token")
