"""The ops' FLOP formulas count what the definitions compute."""

import pytest
import torch
from helpers import MEMORIES, OBJECTIVES, UPDATES, omega_rule, rule_inputs, small_memory
from marks import slow_as_it_is
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from atlas_blocks import ops
from atlas_blocks.functional import polynomial_features, taylor_coefficients
from atlas_blocks.newton_schulz.definition import backward_flops, forward_flops
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.backward import omega_rule_backward
from atlas_blocks.omega.op import flatten, unflatten
from atlas_blocks.omega.rule import Rule

OPS = torch.ops.atlas


@pytest.fixture(autouse=True)
def _formulas():
    ops.register_flop_formulas()


def counted(call):
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("features", ["identity", slow_as_it_is("polynomial"), "sketch"])
@pytest.mark.parametrize(
    ("update", "errors"), [("gd", "chunk"), ("gd", "online"), ("muon", "chunk")]
)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_formula_is_what_the_definition_computes(memory, update, errors, features):
    """Whole chunks and the beginning of one, square and wide weights."""
    variants = ((True, 1, 2, 11), (True, 3, 3, 11), (False, 3, 3, 8), (False, 1, 2, 8))
    turn = (MEMORIES.index(memory) + len(features)) % 2  # one of each pair, the other for the next
    for momentum, ns_every, value_width, length in variants[turn::2]:
        objective = OBJECTIVES[length % 2]
        inputs = rule_inputs(
            memory,
            batch=2,
            length=length,
            window=3,
            value_width=value_width,
            features=features,
            momentum=momentum,
            update=update,
        )
        options = {
            "memory": memory,
            "objective": objective,
            "update": update,
            "ns_steps": 7,
            "ns_every": ns_every,
            "chunk_size": 4,
            "errors": errors,
            "decay_to": "initial" if length == 11 else "zero",
        }
        with torch.no_grad():
            true, _ = counted(lambda x=inputs, s=options: omega_rule(**x, **s))
        names = ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights", "feature_map")
        rule = Rule(**options, window=3)
        tensors, settings = flatten(Arguments(*(inputs[n] for n in names), rule=rule, state=None))
        flat = (*settings.flat(), "definition")
        forward = OPS.omega_rule.default
        ours, outputs = counted(lambda t=tensors, f=flat, op=forward: op(t, *f, True))
        assert ours == true

        saved = (2 if momentum else 1) * len(inputs["weights"]) + 1
        grads, starts = [torch.ones_like(t) for t in outputs[: -saved - 1]], outputs[-saved:]
        leaf = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        wanted = [t for t in leaf if t.requires_grad]
        arguments = unflatten(leaf, settings)
        true, _ = counted(lambda a=(arguments, wanted, starts, grads): omega_rule_backward(*a))
        backward = OPS.omega_rule_backward.default
        ours, _ = counted(lambda a=(grads, tensors, starts), f=flat, op=backward: op(*a, *f))
        assert ours == true


def test_the_polynomial_features_are_no_matrix_products():
    tensors = [torch.randn(4, 5), taylor_coefficients(2)]
    forward, backward = OPS.polynomial_features.default, OPS.polynomial_features_backward.default
    flops, (y, key) = counted(lambda: forward(tensors, [True, True]))
    assert flops == counted(lambda: polynomial_features(*tensors))[0] == 0
    assert counted(lambda: backward([y], tensors, [], key, [True, True]))[0] == 0


@pytest.mark.parametrize("update", UPDATES)
def test_an_eager_model_is_counted(update):
    block, x = small_memory(update=update).build(12, 2), torch.randn(1, 16, 12)
    with torch.no_grad():
        forward, _ = counted(lambda: block(x))
        rule = Rule("mlp", "l2", update, 5, 1, 8, "online" if update == "gd" else "chunk", 5)
        inputs = rule_inputs("mlp", length=16, key_width=6, value_width=6, window=5)
        assert 0 < rule_flops(inputs, rule) < forward
    both, _ = counted(lambda: block(x)[0].sum().backward())
    if update == "gd":
        assert 2.5 * forward < both < 4 * forward
        return
    # Muon's chunks are computed once more. Newton-Schulz has a backward of its own, with another
    # count than twice the forward; all else takes one product or two for each of the forward's.
    shapes = [(m, n) for m, n in block.shapes for _ in range(16 * 2)]  # of every token and head
    through, back = (sum(f(m, n, 5) for m, n in shapes) for f in (forward_flops, backward_flops))
    least, most = (2 * forward + back + times * (forward - through) for times in (1, 2))
    assert least < both < most


def rule_flops(inputs, rule):
    """By the op's formula, on fake tensors."""
    names = ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights", "feature_map")
    with FakeTensorMode() as mode:
        tensors, settings = flatten(Arguments(*(inputs[n] for n in names), rule=rule, state=None))
        fake = [mode.from_tensor(t) for t in tensors]
        return counted(lambda: OPS.omega_rule.default(fake, *settings.flat(), "definition", False))[
            0
        ]
