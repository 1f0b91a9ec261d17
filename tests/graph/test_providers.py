"""Who serves an op: what is asked for, what is chosen, what is refused, and who says so."""

import contextlib
import copy
import dataclasses
import pickle
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
    omega_rule_op,
    rule_inputs,
    tokens,
)
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

from atlas_blocks import (
    AtlasMemory,
    AtlasMemoryConfig,
    ProviderWarning,
    keep_provider,
    ops,
    use_provider,
)
from atlas_blocks.functional import PolynomialMap
from atlas_blocks.graph import providers
from atlas_blocks.graph.contract import untraced
from atlas_blocks.newton_schulz.op import NewtonSchulzCall
from atlas_blocks.omega import memories as functional_memories
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.op import describe
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.step_op import StepCall

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
        "index": None,
    }


@pytest.mark.parametrize("op", ["omega_rule", "newton_schulz"])
def test_a_provider_is_asked_with_the_gpu_of_the_tensors_as_the_current_one(op, monkeypatch):
    """Which is not the one that would be asked about its capability otherwise."""
    entered, asked = [], []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", device)
    provider = ops.Provider("asks", lambda call: asked.append([*entered]) or "never", None, None)
    table = {name: dict(entries) for name, entries in providers._PROVIDERS.items()}
    monkeypatch.setattr(providers, "_PROVIDERS", table)
    ops.register_provider(op, provider)
    if op == "omega_rule":
        second = dataclasses.replace(call_of(), device="cuda", index=1)
    else:
        second = NewtonSchulzCall("cuda", torch.float32, 4, 4, True, 1)
    providers.explain_choice(op, second)
    providers.refusal(op, "asks", second)
    providers.refusal(op, "asks", dataclasses.replace(second, device="cpu"))
    assert asked[-3:] == [[1], [1], []]


def test_a_call_knows_which_gpu_its_tensors_are_on():
    class OnSecond(torch.Tensor):
        device = torch.device("cuda:1")

    x = rule_inputs("mlp")
    streams = [x[name] for name in ("q", "k", "v", "alpha", "eta", "theta", "gamma")]
    streams[0] = streams[0].as_subclass(OnSecond)
    rule = Rule("mlp", "l2", "gd", 5, 1, 64, "online", x["gamma"].shape[-1])
    call = describe(Arguments(*streams, x["weights"], None, rule, None), True)
    assert (call.device, call.index) == ("cuda", 1)


def test_by_itself_a_cpu_takes_the_definition_and_says_nothing(register):
    spy = register(automatic_on=("cuda",))
    omega_rule_op(**rule_inputs())
    assert spy.forwards == 0


def test_the_fastest_of_the_device_serves_forward_and_backward(register):
    register("slow", automatic_on=("cpu",))
    spy = register("fast", automatic_on=("cpu",))
    inputs, true = leaves(rule_inputs()), leaves(rule_inputs())
    y, state = omega_rule_op(**inputs)
    assert (spy.forwards, spy.backwards) == (1, 0)
    z, true_state = omega_rule_op(**true, provider="definition")
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
    _, begun = omega_rule_op(**tokens(inputs, 0, 6), **options)
    found = []
    for provider in ("definition", "spy"):
        x = leaves(tokens(inputs, 6, 6 + length))
        state = begun.map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))
        y, after = omega_rule_op(**x, **options, state=state, provider=provider)
        results = [y, *(t for t in after.tensors() if t.is_floating_point())]
        total = sum((t * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in results)
        wanted = [*named_leaves(x).values(), *(t for t in state.tensors() if t.requires_grad)]
        grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        found.append([t.detach() for t in (*results, *grads)])
    assert difference(found[1], found[0]) < 1e-10


def test_a_second_derivative_is_refused_rather_than_wrong(register):
    register()
    inputs = leaves(rule_inputs())
    y, _ = omega_rule_op(**inputs, provider="spy")
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
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
        omega_rule_op(**leaves(rule_inputs()), provider="spy")
    omega_rule_op(**rule_inputs(), provider="spy")
    assert made == [grad, False]


def test_contexts_nest_and_an_argument_beats_them(register):
    a, b = register("a"), register("b")
    inputs = rule_inputs()
    with use_provider("a"):
        omega_rule_op(**inputs)
        with use_provider("b"):
            omega_rule_op(**inputs)
            omega_rule_op(**inputs, provider="a")
        omega_rule_op(**inputs)
        with use_provider("auto"):
            omega_rule_op(**inputs)
    omega_rule_op(**inputs)
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
        omega_rule_op(**inputs, provider="spy")
    with use_provider("spy"), pytest.raises(ValueError, match=message):
        omega_rule_op(**inputs)


def test_a_name_that_is_not_there_is_named():
    known = "provider: expected one of auto, definition, fla, inline, one_token, triton, got 'cuda'"
    with pytest.raises(ValueError, match=known):
        omega_rule_op(**rule_inputs(), provider="cuda")
    with pytest.raises(ValueError, match=known):
        use_provider("cuda")
    with pytest.raises(ValueError, match=r"provider\.name: expected a name that omega_rule"):
        ops.register_provider("omega_rule", Spy("triton").provider)


def test_a_slower_choice_is_warned_of_once_for_each_reason(register):
    register(automatic_on=("cpu",))
    inputs = rule_inputs(window=3)
    message = f"omega_rule is served by 'definition', not by the preferred 'spy': {WIDE}"
    with pytest.warns(ProviderWarning, match=message):
        omega_rule_op(**inputs)
    omega_rule_op(**inputs)  # a second warning would be an error
    with use_provider("definition"):
        providers._warn_once.cache_clear()
        omega_rule_op(**inputs)


def test_a_choice_can_be_explained(register):
    register("fast", automatic_on=("cpu",))
    call = call_of(window=3)
    choice = ops.explain_choice("omega_rule", call)
    assert (choice.provider, choice.refusals["fast"]) == ("definition", WIDE)
    choice = ops.explain_choice("omega_rule", call_of())
    assert choice.provider == "fast"
    assert set(choice.refusals) == {"triton", "fla", "inline", "one_token"}
    register("faster", automatic_on=("cpu",))
    choice = ops.explain_choice("omega_rule", call_of())
    assert choice.refusals["fast"] == "'faster' is preferred"
    register("elsewhere", automatic_on=("cuda",))
    choice = ops.explain_choice("omega_rule", call_of())
    assert choice.refusals["elsewhere"] == "on cpu it serves only where it is asked for"


def test_one_that_cannot_be_imported_says_so(register):
    providers._PROVIDERS["omega_rule"]["missing"] = providers.lazily("atlas_blocks.nothing")
    with pytest.raises(ValueError, match=r"it cannot be imported: No module named"):
        omega_rule_op(**rule_inputs(), provider="missing")


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
            return omega_rule_op(**inputs)[0]
        with use_provider(name):
            return omega_rule_op(**inputs)[0]

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
    compiled = torch.compile(lambda x: omega_rule_op(**x)[0], backend="eager", fullgraph=True)
    with use_provider("spy"), pytest.raises(RuntimeError, match=WIDE):
        compiled(rule_inputs(window=3))


def test_one_graph_serves_every_length(register):
    spy, counter = register(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: omega_rule_op(**x, provider="spy")[0], backend=counter, dynamic=True
    )
    for length in (9, 64, 130):
        x = rule_inputs(length=length)
        torch.testing.assert_close(compiled(x), omega_rule_op(**x)[0])
    assert (spy.forwards, counter.frame_count) == (3, 1)


def test_untraced_is_torch_s_own_mark():
    ours, true = untraced(lambda: None), torch.compiler.assume_constant_result(lambda: None)
    assert vars(ours) == vars(true)


def test_one_context_shared_by_threads_gives_each_its_own_back() -> None:
    """A first thread enters and leaves while a second is inside: neither is left with the other's
    provider."""
    shared, first_is_in, second_is_in = use_provider("definition"), *make_events()
    seen = []

    def second() -> None:
        with use_provider("triton"):
            first_is_in.wait(10)
            with shared:
                second_is_in.set()
                first.join(10)
                seen.append(providers.context())
            seen.append(providers.context())
        seen.append(providers.context())

    left = []

    def begin() -> None:
        with shared:
            first_is_in.set()
            second_is_in.wait(10)
            left.append(providers.context())
        left.append(providers.context())

    first, other = threading.Thread(target=begin), threading.Thread(target=second)
    first.start()
    other.start()
    for thread in (first, other):
        thread.join(10)
    assert seen == ["definition", "triton", "auto"]
    assert left == ["definition", "auto"]


def make_events() -> tuple[threading.Event, threading.Event]:
    return threading.Event(), threading.Event()


SMALL = AtlasMemoryConfig(update="gd", window=2, chunk_size=4, feature_map="identity")


def in_another_thread(fn) -> None:
    """As autograd runs the backward of what is on a GPU."""
    failed = []

    def run() -> None:
        try:
            fn()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def test_a_module_keeps_its_provider_when_a_checkpoint_computes_it_again(register) -> None:
    spy, x = register(), torch.randn(1, 9, 16)
    module = AtlasMemory(16, 2, SMALL)
    kept = keep_provider(copy.deepcopy(module), "spy")
    found = []
    for one in (module, kept):
        leaf = x.clone().requires_grad_()
        y, _ = checkpoint(one, leaf, use_reentrant=False)
        in_another_thread(y.square().sum().backward)
        found.append([leaf.grad, *(p.grad for p in one.parameters())])
    assert difference(*found) < 1e-6
    assert (spy.forwards, spy.backwards) == (2, 1)  # once more, by the same


def test_what_a_module_keeps_is_copied_pickled_replaced_and_inside_of_contexts(register) -> None:
    spy, other = register(), register("other")
    x = torch.randn(1, 9, 16)
    kept = keep_provider(nn.Sequential(AtlasMemory(16, 2, SMALL)), "spy")
    copies = [copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))]
    for module in (kept, *copies):
        with torch.no_grad(), use_provider("other"):
            module(x)
            assert providers.context() == "other"
    assert (spy.forwards, other.forwards) == (3, 0)
    for name, counts in (("other", (3, 1)), ("auto", (3, 1)), ("definition", (3, 1))):
        assert keep_provider(kept, name) is kept
        assert len(kept._forward_hooks) == len(kept._forward_pre_hooks) == 1
        with torch.no_grad(), use_provider("spy"):
            kept(x)
        assert (spy.forwards, other.forwards) == counts
    with pytest.raises(ValueError, match="provider: expected one of"):
        keep_provider(kept, "nobody")


def test_a_module_that_fails_leaves_the_context_as_it_was(register) -> None:
    register()
    module = keep_provider(AtlasMemory(16, 2, SMALL), "spy")
    with use_provider("definition"):
        with pytest.raises(ValueError, match="x: expected"):
            module(torch.randn(1, 9, 15))
        assert providers.context() == "definition"

        def fail(module, arguments) -> None:
            raise KeyError

        # It comes before the module's own, whose leaving is called all the same.
        module.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(KeyError):
            module(torch.randn(1, 9, 16))
        assert providers.context() == "definition"
    assert providers.context() == "auto"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_module_keeps_its_provider_when_it_is_compiled(register) -> None:
    spy, x = register(), torch.randn(1, 9, 16)
    module = keep_provider(AtlasMemory(16, 2, SMALL), "spy")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(x)[0].sum().backward()
    assert (spy.forwards, spy.backwards) == (2, 2)
    assert providers.context() == "auto"


@pytest.mark.parametrize("op", ["omega_rule", "omega_rule_step"])
@pytest.mark.parametrize(
    "change",
    [
        {"memory": "two_weights"},
        {"objective": "huber"},
        {"update": "sign"},
        {"errors": "late"},
        {"decay_to": "mean"},
        {"feature_map": "Mine"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_no_kernel_claims_what_it_does_not_know(op: str, change: dict[str, str], monkeypatch):
    """Two weights do not make an mlp, nor what is not "l2" a dot product."""
    known = functional_memories.MEMORIES["mlp"]
    monkeypatch.setitem(functional_memories.MEMORIES, "two_weights", known)
    call = dataclasses.replace(call_of(), dtype=torch.float32, state_dtype=torch.float32)
    if op == "omega_rule_step":
        devices = {"position_device": "cpu", "state_device": "cpu"}
        fields = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
        call = StepCall(**fields, **devices)
    # Not through the rule's own checks: what they let through one day is no kernel's yet.
    rule = copy.copy(call.rule)
    for name, value in change.items():
        if name == "feature_map":
            call = dataclasses.replace(call, feature_map=value)
        else:
            object.__setattr__(rule, name, value)
    call = dataclasses.replace(call, rule=rule)
    for name in ("triton", "fla"):
        if name in providers.names(op):
            reason = providers.refusal(op, name, call)
            assert reason is not None
            (word, value), *_ = change.items()
            assert (value in reason) or name == "fla"
            assert word.replace("_", " ") in reason.replace("_", " ") or name == "fla"


class Squares(PolynomialMap):
    """Another map with a polynomial's tensors."""

    def __call__(self, x):
        return torch.cat([x, x * x], -1)

    def width_of(self, dim):
        return 2 * dim

    def kernel(self, x, y):
        return self(x) @ self(y).mT


@pytest.fixture
def squares():
    inputs = rule_inputs(features="polynomial")
    inputs["feature_map"] = Squares(inputs["feature_map"].coefficients)
    inputs["weights"] = [torch.zeros(2, 3, 6, dtype=torch.float64)]
    return inputs


def test_a_node_refuses_a_feature_map_that_it_could_not_compute(register, squares):
    """It is given the map's tensors, which are those of a polynomial."""
    register()
    omega_rule_op(**squares)
    message = "feature_map: expected one of identity, polynomial, sketch where .*, got .*Squares"
    with pytest.raises(ValueError, match=message):
        omega_rule_op(**squares, provider="spy")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_feature_map_that_is_traced_is_the_one_that_was_given(squares):
    compiled = torch.compile(lambda x: omega_rule_op(**x)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(squares), omega_rule_op(**squares)[0])
