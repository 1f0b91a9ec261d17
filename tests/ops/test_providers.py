"""Who serves an op: what is asked for, what is chosen, what is refused, and who says so."""

import dataclasses
import threading

import pytest
import torch
from helpers import (
    MEMORIES,
    STREAMS,
    UPDATES,
    assert_close,
    difference,
    errors_for,
    leaves,
    named_leaves,
    rule_inputs,
    tokens,
)
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from atlas_blocks import ProviderWarning, ops, use_provider
from atlas_blocks.functional.rule import Arguments, Rule
from atlas_blocks.ops import providers
from atlas_blocks.ops.contract import untraced
from atlas_blocks.ops.omega_rule import describe

DEFINITION = providers.find("omega_rule", "definition")
WIDE = "it takes windows up to 2"


class Spy:
    """A provider that computes as the definition does and counts its calls."""

    def __init__(self, name="spy"):
        self.forwards = self.backwards = 0
        self.provider = ops.Provider(name, self.supports, self.forward, self.backward)

    def supports(self, call):
        return None if call.rule.window <= 2 else WIDE

    def forward(self, *arguments):
        self.forwards += 1
        return DEFINITION.forward(*arguments)

    def backward(self, *arguments):
        self.backwards += 1
        return DEFINITION.backward(*arguments)


@pytest.fixture
def register(monkeypatch):
    """Register a spy for the length of a test; nothing has been warned of yet."""
    table = {op: dict(entries) for op, entries in providers._PROVIDERS.items()}
    monkeypatch.setattr(providers, "_PROVIDERS", table)
    providers._warn_once.cache_clear()
    torch._dynamo.reset()

    def register(name="spy", automatic_on=()):
        spy = Spy(name)
        ops.register_provider("omega_rule", spy.provider, automatic_on=automatic_on)
        return spy

    yield register
    torch._dynamo.reset()


def call_of(**changes):
    x = rule_inputs("mlp", features="sketch", **changes)
    rule = Rule("mlp", "l2", "gd", 5, 1, 64, "online", x["gamma"].shape[-1])
    streams = (x[name] for name in ("q", "k", "v", "alpha", "eta", "theta", "gamma"))
    return describe(Arguments(*streams, x["weights"], x["feature_map"], rule, None), True)


def test_a_call_says_what_a_provider_may_ask():
    call = call_of(window=3)
    assert dataclasses.asdict(call) == {
        "device": "cpu",
        "dtype": torch.float64,
        "dtypes": frozenset([torch.float64]),
        "state_dtype": torch.float64,
        "heads": 2,
        "key_width": 3,
        "value_width": 3,
        "feature_width": 7,
        "weight_shapes": ((3, 4), (4, 7)),
        "rule": dataclasses.asdict(call.rule),
        "feature_map": "sketch",
        "degree": 2,
        "momentum": True,
        "chunks": "whole",
        "needs_grad": True,
        "packed": False,
        "traced": False,
    }


def test_by_itself_a_cpu_takes_the_definition_and_says_nothing(register):
    spy = register(automatic_on=("cuda",))
    ops.omega_rule(**rule_inputs())
    assert spy.forwards == 0


def test_the_fastest_of_the_device_serves_forward_and_backward(register):
    register("slow", automatic_on=("cpu",))
    spy = register("fast", automatic_on=("cpu",))
    inputs, true = leaves(rule_inputs()), leaves(rule_inputs())
    y, state = ops.omega_rule(**inputs)
    assert (spy.forwards, spy.backwards) == (1, 0)
    z, true_state = ops.omega_rule(**true, provider="definition")
    assert_close((y, state), (z, true_state), 0.0)
    y.sum().backward()
    z.sum().backward()
    assert (spy.forwards, spy.backwards) == (1, 1)
    for name, leaf in named_leaves(true).items():
        torch.testing.assert_close(named_leaves(inputs)[name].grad, leaf.grad)


@pytest.mark.parametrize(("batch", "length"), [(2, 7), (2, 0), (0, 3)])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_gradients_flow_through_states_in_and_out(register, memory, update, batch, length):
    """By a provider and by plain autograd, to every tensor of a state handed in."""
    register()
    options = {"memory": memory, "update": update, "chunk_size": 4, "errors": errors_for(update)}
    inputs = rule_inputs(memory, batch=batch, length=6 + length, update=update)
    _, begun = ops.omega_rule(**tokens(inputs, 0, 6), **options)
    found = []
    for provider in ("definition", "spy"):
        x = leaves(tokens(inputs, 6, 6 + length))
        state = begun.map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))
        y, after = ops.omega_rule(**x, **options, state=state, provider=provider)
        results = [y, *(t for t in after.tensors() if t.is_floating_point())]
        total = sum((t * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in results)
        wanted = [*named_leaves(x).values(), *(t for t in state.tensors() if t.requires_grad)]
        grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        found.append([t.detach() for t in (*results, *grads)])
    assert difference(found[1], found[0]) < 1e-10


def test_a_second_derivative_is_refused_rather_than_wrong(register):
    register()
    inputs = leaves(rule_inputs())
    y, _ = ops.omega_rule(**inputs, provider="spy")
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_chunk_starts_are_made_only_where_a_gradient_is_needed(register, monkeypatch, grad):
    spy, made = register(), []
    forward = DEFINITION.forward

    def recorded(tensors, settings, save):
        made.append(save)
        return forward(tensors, settings, save)

    monkeypatch.setattr(spy, "forward", recorded)
    provider = dataclasses.replace(spy.provider, forward=recorded)
    providers._PROVIDERS["omega_rule"].pop("spy")
    ops.register_provider("omega_rule", provider)
    with torch.set_grad_enabled(grad):
        ops.omega_rule(**leaves(rule_inputs()), provider="spy")
    ops.omega_rule(**rule_inputs(), provider="spy")
    assert made == [grad, False]


def test_contexts_nest_and_an_argument_beats_them(register):
    a, b = register("a"), register("b")
    inputs = rule_inputs()
    with use_provider("a"):
        ops.omega_rule(**inputs)
        with use_provider("b"):
            ops.omega_rule(**inputs)
            ops.omega_rule(**inputs, provider="a")
        ops.omega_rule(**inputs)
        with use_provider("auto"):
            ops.omega_rule(**inputs)
    ops.omega_rule(**inputs)
    assert (a.forwards, b.forwards) == (3, 1)


def test_a_context_ends_with_an_error_and_is_its_thread_s_own(register):
    register()
    seen = []

    def fail():
        with use_provider("spy"):
            other = threading.Thread(target=lambda: seen.append(providers.context()))
            other.start()
            other.join()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (seen, providers.context()) == (["auto"], "auto")


def test_one_that_cannot_serve_is_refused_with_its_reason(register):
    register(automatic_on=("cpu",))
    inputs = rule_inputs(window=3)
    message = f"provider: 'spy' cannot serve this call of omega_rule: {WIDE}"
    with pytest.raises(ValueError, match=message):
        ops.omega_rule(**inputs, provider="spy")
    with use_provider("spy"), pytest.raises(ValueError, match=message):
        ops.omega_rule(**inputs)


def test_a_name_that_is_not_there_is_named():
    known = "provider: expected one of auto, definition, fla, inline, triton, got 'cuda'"
    with pytest.raises(ValueError, match=known):
        ops.omega_rule(**rule_inputs(), provider="cuda")
    with pytest.raises(ValueError, match=known):
        use_provider("cuda")
    with pytest.raises(ValueError, match=r"provider\.name: expected a name that omega_rule"):
        ops.register_provider("omega_rule", Spy("triton").provider)


def test_a_slower_choice_is_warned_of_once_for_each_reason(register):
    register(automatic_on=("cpu",))
    inputs = rule_inputs(window=3)
    message = f"omega_rule is served by 'definition', not by the preferred 'spy': {WIDE}"
    with pytest.warns(ProviderWarning, match=message):
        ops.omega_rule(**inputs)
    ops.omega_rule(**inputs)  # a second warning would be an error
    with use_provider("definition"):
        providers._warn_once.cache_clear()
        ops.omega_rule(**inputs)


def test_a_choice_can_be_explained(register):
    register("fast", automatic_on=("cpu",))
    call = call_of(window=3)
    choice = ops.explain_choice("omega_rule", call)
    assert (choice.provider, choice.refusals["fast"]) == ("definition", WIDE)
    choice = ops.explain_choice("omega_rule", call_of())
    assert choice.provider == "fast"
    assert set(choice.refusals) == {"triton", "fla", "inline"}
    register("faster", automatic_on=("cpu",))
    choice = ops.explain_choice("omega_rule", call_of())
    assert choice.refusals["fast"] == "'faster' is preferred"
    register("elsewhere", automatic_on=("cuda",))
    choice = ops.explain_choice("omega_rule", call_of())
    assert choice.refusals["elsewhere"] == "on cpu it serves only where it is asked for"


def test_one_that_cannot_be_imported_says_so(register):
    missing = providers._Entry((), lambda: providers._imported("atlas_blocks.nothing"))
    providers._PROVIDERS["omega_rule"]["missing"] = missing
    with pytest.raises(ValueError, match=r"it cannot be imported: No module named"):
        ops.omega_rule(**rule_inputs(), provider="missing")


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_a_graph_carries_the_name_and_another_context_compiles_anew(register, inside):
    register()
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def model(inputs, name):
        if not inside:
            return ops.omega_rule(**inputs)[0]
        with use_provider(name):
            return ops.omega_rule(**inputs)[0]

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=record), fullgraph=True)

    def run(name):
        inputs = leaves(rule_inputs())
        with use_provider("auto" if inside else name):
            compiled(inputs, name).sum().backward()
        assert all(inputs[n].grad is not None for n in STREAMS)

    def named(op, *places):
        """Some arguments of every node of this op, in the order they were compiled."""
        target = getattr(torch.ops.atlas, op).default
        nodes = [n for g in graphs for n in g.graph.nodes if n.target is target]
        return [tuple(n.args[i] for i in places) for n in nodes]

    for name in ("spy", "definition", "spy"):
        run(name)
    # The third call finds the first one's graphs.
    assert named("omega_rule", -2, -1) == [("spy", True), ("definition", True)]
    assert named("omega_rule_backward", -1) == [("spy",), ("definition",)]


def test_a_refusal_while_compiling_gives_the_reason(register):
    register()
    compiled = torch.compile(lambda x: ops.omega_rule(**x)[0], backend="eager", fullgraph=True)
    with use_provider("spy"), pytest.raises(RuntimeError, match=WIDE):
        compiled(rule_inputs(window=3))


def test_one_graph_serves_every_length(register):
    spy, counter = register(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: ops.omega_rule(**x, provider="spy")[0], backend=counter, dynamic=True
    )
    for length in (9, 64, 130):
        x = rule_inputs(length=length)
        torch.testing.assert_close(compiled(x), ops.omega_rule(**x)[0])
    assert (spy.forwards, counter.frame_count) == (3, 1)


def test_untraced_is_torch_s_own_mark():
    ours, true = untraced(lambda: None), torch.compiler.assume_constant_result(lambda: None)
    assert vars(ours) == vars(true)
