"""The rule taken into a graph: the definition, whatever the length leaves of the last chunk."""

import itertools

import pytest
import torch
from helpers import (
    ERRORS,
    MEMORIES,
    OBJECTIVES,
    STEPS,
    difference,
    draw,
    omega_rule,
    omega_rule_op,
    rule_inputs,
    tokens,
)
from marks import slow_as_it_is
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from atlas_blocks import ops, use_provider
from atlas_blocks.graph import saved_graphs
from atlas_blocks.omega import inline, walk
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.op import describe
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState

CHUNK = 4
VARIANTS = list(itertools.product((True, False), ERRORS, (1, 3, 7), (1, 4, 10, 12)))


@pytest.fixture(autouse=True)
def _plain_step(monkeypatch):
    """The step as it is, not compiled: tests of compiled graphs are in compile_passes. And a
    backward of two chunks at a time, whole pieces and the beginning of one."""
    monkeypatch.setattr(inline, "_compiled_step", lambda *key: walk.chunk_end)
    monkeypatch.setattr(inline, "TOKENS", 2 * CHUNK)


def make(memory: str, momentum: bool, errors: str, window: int, length: int, **options):
    objective = OBJECTIVES[length % 2]
    inputs = rule_inputs(
        memory, batch=2, length=length, window=window, momentum=momentum, update="gd", **options
    )
    settings = {"memory": memory, "objective": objective, "chunk_size": CHUNK}
    settings["decay_to"] = "initial" if window == 3 else "zero"
    return inputs, settings | {"errors": errors}


def arguments(inputs: dict, settings: dict, state: OmegaState | None = None) -> Arguments:
    rule = Rule(
        **{"update": "gd", **settings}, ns_steps=5, ns_every=1, window=inputs["gamma"].shape[-1]
    )
    names = ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights", "feature_map")
    return Arguments(*(inputs[n] for n in names), rule=rule, state=state)


def with_gradients(call, inputs: dict) -> tuple[list, list]:
    """Outputs and state, and the gradients of every input for weights that differ by entry."""
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
    weights = [w.clone().requires_grad_() for w in inputs["weights"]]
    y, state = call(inputs | leaves | {"weights": weights})
    outputs = [y, *state.tensors()]
    some = [t for t in outputs if t.requires_grad]
    seeds = [draw(*t.shape, seed=5, dtype=t.dtype) for t in some]
    wanted = [*leaves.values(), *weights]
    gradients = torch.autograd.grad(some, wanted, seeds, materialize_grads=True)
    return [t.double() for t in outputs], list(gradients)


@pytest.mark.parametrize("largest", [saved_graphs.LARGEST, 0], ids=["kept", "again"])
@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_it_is_the_definition(memory, features, largest, monkeypatch):
    monkeypatch.setattr(saved_graphs, "LARGEST", largest)
    # Features are lifted before the chunks are cut: a few lengths will do for them.
    for momentum, errors, window, length in VARIANTS if features == "identity" else VARIANTS[::5]:
        inputs, settings = make(memory, momentum, errors, window, length, features=features)
        (ours, our_gradients), (true, true_gradients) = (
            with_gradients(call, inputs)
            for call in (
                lambda x, s=settings: inline.trace(arguments(x, s)),
                lambda x, s=settings: omega_rule(**x, **s),
            )
        )
        assert difference(ours, true) < 1e-12
        assert difference(our_gradients, true_gradients) < 1e-10


def from_state(run, inputs: dict, settings: dict, state: OmegaState) -> tuple[list, list]:
    """`with_gradients` of a call with a state, those of the state's tensors and not of M_0."""
    floating = [t.detach() for t in state.tensors() if t.is_floating_point()]

    def call(x: dict):
        leaves = iter(x["weights"])
        before = state.map(lambda t: next(leaves) if t.is_floating_point() else t)
        return run(x | {"weights": inputs["weights"]}, settings, before)

    return with_gradients(call, inputs | {"weights": floating})


@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_one_token_is_the_definition_at_every_place(memory, update, errors, features):
    for before, momentum in ((3, True), (4, True), (6, False)):
        inputs, settings = make(memory, momentum, errors, 3, before + 1, features=features)
        settings["update"] = update
        _, state = omega_rule(**tokens(inputs, 0, before), **settings)
        (ours, our_gradients), (true, true_gradients) = (
            from_state(run, tokens(inputs, before, before + 1), settings, state)
            for run in (
                lambda x, options, state: inline.trace(arguments(x, options, state)),
                lambda x, options, state: omega_rule(**x, **options, state=state),
            )
        )
        assert difference(ours, true) < 1e-9
        assert difference(our_gradients, true_gradients) < 1e-7


def walk_calls(memory: str, momentum: bool, errors: str, length: int, monkeypatch):
    """The op's arguments in a call of the rule, tensors that require gradients."""
    seen, run = [], inline._walk
    monkeypatch.setattr(inline, "_walk", lambda *a: seen.append(a) or run(*a))
    inline.trace(arguments(*make(memory, momentum, errors, 3, length)))
    monkeypatch.setattr(inline, "_walk", run)
    ((tensors, *settings),) = seen
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors], settings


@pytest.mark.parametrize("memory", [slow_as_it_is(m) for m in MEMORIES])
def test_the_walk_is_an_op(memory, monkeypatch):
    for momentum, errors in itertools.product((True, False), ERRORS):
        tensors, settings = walk_calls(memory, momentum, errors, 6, monkeypatch)
        plain = [t.detach() for t in tensors]
        every = [t.is_floating_point() for t in plain]
        for wanted in ([], every):
            opcheck(torch.ops.atlas.omega_walk.default, (plain, *settings, wanted))
        *results, key = torch.ops.atlas.omega_walk.default(plain, *settings, every)
        grads = [torch.ones_like(t) for t in results]
        backward = torch.ops.atlas.omega_walk_backward.default
        opcheck(backward, (grads, plain, results, key, *settings, every))


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_formulas_count_what_the_walk_computes(memory, monkeypatch):
    ops.register_flop_formulas()
    for momentum, errors, length in itertools.product((True, False), ERRORS, (8, 11)):
        tensors, settings = walk_calls(memory, momentum, errors, length, monkeypatch)

        def counted(call):
            with FlopCounterMode(display=False) as counter:
                result = call()
            return counter.get_total_flops(), result

        plain = [t.detach() for t in tensors]
        true, _ = counted(lambda p=plain, s=settings: inline._run(p, *s))
        op = torch.ops.atlas.omega_walk
        ours, results = counted(lambda p=plain, s=settings, op=op: op.default(p, *s, []))
        assert ours == true > 0
        grads = [torch.ones_like(t) for t in results]
        rest = (grads, plain, results, *settings)
        true, _ = counted(lambda r=rest: inline._differentiate(*r))
        of_op = (
            *rest[:3],
            saved_graphs.no_key(plain[0]),
            *settings,
            [t.requires_grad for t in tensors],
        )
        ours, _ = counted(lambda r=of_op: torch.ops.atlas.omega_walk_backward.default(*r))
        assert ours == true > 0


def test_where_it_cannot_serve_it_says_why():
    inputs, settings = make("mlp", True, "online", 3, 9)
    with pytest.raises(ValueError, match=r"provider: 'inline' cannot serve .* traces the rule"):
        omega_rule_op(**inputs, **settings, provider="inline")
    with use_provider("inline"):
        for changes, reason in (
            ({"update": "muon", "errors": "chunk"}, "update='muon'"),
            ({}, "chunks are taken whole"),
        ):
            state = None if changes else omega_rule(**inputs, **settings)[1]
            options = settings | changes | {"state": state}
            call = torch.compile(
                lambda o=options: omega_rule_op(**inputs, **o), backend="eager", fullgraph=True
            )
            with pytest.raises(Exception, match=reason):
                call()
    assert describe(arguments(inputs, settings), needs_grad=True).traced is False
