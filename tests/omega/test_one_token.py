"""The rule for one token as plain tensor operations: equal to the definition at every position."""

import pytest
import torch
from helpers import MEMORIES, assert_close, omega_rule, rule_inputs, tokens

from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.one_token import one_token
from atlas_blocks.omega.rule import Rule
from atlas_blocks.state import State


@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    ("update", "objective", "momentum", "errors", "window", "every"),
    [
        ("gd", "l2", True, "online", 2, 1),
        ("gd", "l2", False, "online", 1, 1),
        ("gd", "l2", False, "online", 5, 1),
        ("gd", "dot", True, "online", 1, 1),
        ("gd", "dot", False, "online", 5, 1),
        ("gd", "l2", True, "chunk", 5, 1),
        ("muon", "l2", True, "chunk", 3, 1),
        ("muon", "l2", False, "chunk", 2, 3),
    ],
)
def test_token_by_token_it_is_the_rule(
    memory, features, update, objective, momentum, errors, window, every
):
    """Over two chunks and a half, in rows of which one is three tokens ahead."""
    inputs = rule_inputs(
        memory,
        batch=2,
        length=13,
        window=window,
        features=features,
        momentum=momentum,
        update=update,
    )
    options = {"memory": memory, "objective": objective, "update": update, "ns_every": every}
    decay_to = "initial" if momentum else "zero"
    options |= {"chunk_size": 4, "errors": errors, "decay_to": decay_to}
    none = omega_rule(**tokens(inputs, 0, 0), **options)[1]
    ahead = omega_rule(**tokens(inputs, 0, 3), **options)[1]
    state = State.cat([none[:1], ahead[1:]])
    rule = Rule(memory, objective, update, 5, every, 4, errors, window, decay_to)
    with torch.no_grad():
        for t in range(3, 13):
            one = tokens(inputs, t, t + 1)
            true = omega_rule(**one, **options, state=state)
            ours = one_token(Arguments(**one, rule=rule, state=state))
            assert_close(ours, true, 1e-9)
            state = true[1]
