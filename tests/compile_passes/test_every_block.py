"""torch.compile of every block and every tiny recipe: one graph, any length, equal to eager."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DIM, Recorder, difference, draw, everything, make_block
from marks import slow_as_it_is
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from atlas_blocks import AtlasMemoryConfig, State, checkpoint_policy
from atlas_blocks.recipes import build, config, names

# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")


# Their graphs break where a state goes in; of "tnt" they take one token.
BREAKING = ("caching", "tnt")
# Memory, update, objective and features are arguments of one op: those of the blocks left out make
# the graph of another, and tests/omega compiles the op with each. Stacks of recipes are compiled
# below, "caching-checkpoints" and "tnt-unprojected" in test_memory_caching.py and test_tnt.py.
KINDS = (
    "memory-matrix-muon-taylor_exp",
    "memory-mlp-gd-sketch",
    "memory-mlp-muon-sketch",
    "memory-gated_mlp-muon-polynomial",
    "memory-plain",
    "memory-fixed-gates",
    "deep-transformer",
    "swdt",
    "dot",
    "attention-neutral",
    "attention-plain",
    "block-attention-grouped",
    "block-foreign",
    "gate-mixer",
    "as-context",
    "as-context-muon",
    "caching-reset",
    "tnt",
    "lstm",
    "conv",
    "swiglu",
)


def every_kind(*quick: str, but: tuple[str, ...] = ()):
    """A block of each kind of graph, `but` those; those not named here only with the slow tests.
    What nodes compile for themselves is tested by node."""
    names = [n for n in KINDS if not but or not n.startswith(but)]
    marked = [n if n in quick else slow_as_it_is(n) for n in names]
    return pytest.mark.parametrize("name", marked)


# Windowed attention takes blocks of 64 queries: one and two of them are graphs of their own.
LENGTHS = (130, 150, 200)


def gradients(y: Tensor, state: State | None, leaves: list[Tensor]) -> list[Tensor]:
    """Of all leaves, for weights of the output and of the state that differ by entry."""
    outputs = [y, *([] if state is None else state.tensors())]
    outputs = [t for t in outputs if t.requires_grad]
    weights = [draw(*t.shape, seed=9, dtype=t.dtype) for t in outputs]
    return list(torch.autograd.grad(outputs, leaves, weights, materialize_grads=True))


@every_kind("conv", "swiglu", but=BREAKING)
def test_one_graph_serves_any_length_forward_and_backward(name: str) -> None:
    """Outputs, the state, and gradients of input, state and parameters; then on from a state."""
    block, backend = make_block(name), Recorder()
    compiled = torch.compile(block, backend=backend, fullgraph=True)

    def run(function, x: Tensor, state: State | None) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.clone().requires_grad_(), *block.parameters()]
        if state is not None:
            state = state.map(lambda t: t.clone().requires_grad_(t.is_floating_point()))
            leaves += [t for t in state.tensors() if t.requires_grad]
        y, after = function(leaves[0], state, detach_state=False)
        return everything((y, after)), gradients(y, after, leaves)

    _, begun = block(draw(2, 13, DIM, seed=3))
    for state in (None,) if begun is None else (None, begun.detach()):
        before = backend.compiles
        for length in LENGTHS:
            x = draw(2, length, DIM, seed=length)
            (ours, our_gradients), (true, true_gradients) = (
                run(f, x, state) for f in (compiled, block)
            )
            gaps = difference(ours, true), difference(our_gradients, true_gradients)
            if gaps[0] >= 1e-10 or gaps[1] >= 1e-8:
                # Newton-Schulz magnifies rounding: the measure is what one rounding of x does.
                near, near_gradients = run(block, x * (1 + 2**-52), state)
                assert gaps[0] < max(1e-10, 100 * difference(near, true))
                assert gaps[1] < max(1e-8, 100 * difference(near_gradients, true_gradients))
        assert backend.compiles - before <= 2, "more than one recompile"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
@pytest.mark.parametrize("heads", [1, 2])
def test_inductors_graph_serves_any_batch_and_length(heads: int) -> None:
    """With one head what is cut into chunks was a view, whose strides became numbers."""
    config = AtlasMemoryConfig(memory="matrix", update="gd", window=1, chunk_size=16)
    block = config.build(DIM, heads).double()
    compiled = torch.compile(block, fullgraph=True)
    for batch, length in ((4, 104), (8, 52), (2, 208), (4, 75)):
        leaves = [draw(batch, length, DIM).requires_grad_()]
        leaves += block.parameters()
        ours, true = (gradients(run(leaves[0])[0], None, leaves) for run in (compiled, block))
        whole = [torch.cat([g.flatten() for g in grads]) for grads in (ours, true)]
        assert difference(whole[:1], whole[1:]) < 1e-12


@every_kind("memory-mlp-muon-sketch", but=("caching",))
def test_one_graph_decodes_a_token_wherever_it_stands(name: str) -> None:
    block, backend = make_block(name), Recorder()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    prefix, *more = draw(2, 30, DIM, seed=3).split([12, *18 * [1]], 1)
    _, true = block(prefix)
    if true is not None:
        true = State.cat([true[:1], block(prefix[1:, :7])[1]])  # rows at different places
    state = true
    for x in more:
        (y, state), (z, true) = compiled(x, state), block(x, true)
        assert difference(everything((y, state)), everything((z, true))) < 1e-9
    assert backend.compiles <= 2, "more than one recompile"


@pytest.mark.slow
def test_a_backward_compiled_for_two_threads_is_eager_s() -> None:
    """It corrupted memory where chunks were cut by `unfold`, at these sizes."""
    model = build("omeganet-tiny")
    tokens = torch.randint(0, 256, (1, 512))
    parameters = list(model.parameters())

    def run(function) -> tuple[Tensor, list[Tensor]]:
        loss = F.cross_entropy(function(tokens).logits[0, :-1], tokens[0, 1:])
        return loss, list(torch.autograd.grad(loss, parameters))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch._inductor.config.patch({"cpp.threads": 2}):
            compiled = torch.compile(model, fullgraph=True)
            _, true = run(model)
            for _ in range(3):
                _, ours = run(compiled)
                assert difference(ours, true) < 1e-3
    finally:
        torch.set_num_threads(before)


TINY = [name for name in names() if name.endswith("-tiny")]


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.parametrize("name", TINY)
def test_every_tiny_recipe_is_one_graph(name: str) -> None:
    """Its layers once each: that equal ones are compiled once is test_backend.py's."""
    layers = tuple(dict.fromkeys(config(name).layers))
    model, backend = build(name, layers=layers).double(), Recorder()
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def run(function, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        logits, state = function(tokens)
        return everything((logits, state)), gradients(logits, None, list(model.parameters()))

    for length in LENGTHS:
        tokens = torch.randint(0, 256, (2, length))
        (ours, our_gradients), (true, true_gradients) = (run(f, tokens) for f in (compiled, model))
        # Two layers of Newton-Schulz magnify rounding.
        assert difference(ours, true) < 1e-7
        # With a zero memory and "dot", the bias of eta only scales what is normed afterwards: its
        # gradient is zero in truth, and rounding of the others' size in fact.
        largest = max(g.abs().max() for g in true_gradients)
        for g, h in zip(our_gradients, true_gradients, strict=True):
            assert (g - h).abs().max() <= 1e-6 * h.abs().max() + 1e-13 * largest
    # Of TNT the rest of a span has a graph of its own where it is one chunk, of either memory.
    assert backend.compiles <= 2 + (name == "tnt-tiny"), "more than one recompile"


@every_kind("conv", but=("tnt",))
def test_autocast_gives_the_types_and_values_of_eager(name: str) -> None:
    block, x = make_block(name, torch.float32), draw(2, 70, DIM, dtype=torch.float32)
    compiled = torch.compile(block, backend=Recorder(), fullgraph=True)
    results = []
    for function in (compiled, block):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, state = function(leaf)
        found = [y, *([] if state is None else state.tensors())]
        gradient = torch.autograd.grad(y.float().square().sum(), leaf)[0]
        results.append((found, gradient))
    (ours, our_gradient), (true, true_gradient) = results
    assert [t.dtype for t in ours] == [t.dtype for t in true]
    # Roundings of 2^-8 in another order; Newton-Schulz magnifies some.
    assert (ours[0] - true[0]).norm() <= 0.05 * true[0].norm()
    assert (our_gradient - true_gradient).norm() <= 0.1 * true_gradient.norm()


# A tensor of inference mode is one to every block alike: one of each kind of state.
INFERENCE = ("memory-mlp-gd-sketch", "block-attention", "dot", "as-context", "lstm")


@every_kind("conv", but=BREAKING)
def test_without_autograd(name: str) -> None:
    compiled_is_eager(name, torch.no_grad)


@pytest.mark.parametrize("name", [slow_as_it_is(name) for name in INFERENCE])
def test_in_inference_mode(name: str) -> None:
    compiled_is_eager(name, torch.inference_mode)


def compiled_is_eager(name: str, mode: Callable[[], Any]) -> None:
    """A call, and another from its state."""
    block, x = make_block(name), draw(2, 70, DIM)
    compiled = torch.compile(block, backend=Recorder(), fullgraph=True)
    with mode():
        y, state = compiled(x)
        more = compiled(x, state)
        assert difference(everything((y, state)), everything(block(x))) < 1e-10
        assert difference(everything(more), everything(block(x, block(x)[1]))) < 1e-10


@pytest.mark.parametrize(
    ("name", "op"),
    [
        slow_as_it_is("memory-mlp-gd-sketch", "omega_walk"),
        slow_as_it_is("as-gate-sum", "omega_rule"),
        slow_as_it_is("as-context", "memory_as_context"),
    ],
)
def test_the_checkpoint_policy_keeps_the_memory_and_nothing_else(name: str, op: str) -> None:
    """Plain checkpointing walks the memory again in the backward graph, with the policy it does
    not, and other products are computed again with both."""
    block, x = make_block(name), draw(2, 70, DIM)
    leaves = list(block.parameters())
    true = gradients(block(x)[0], None, leaves)
    contexts = functools.partial(create_selective_checkpoint_contexts, checkpoint_policy)
    products = {}
    for policy in (None, contexts):
        options = {} if policy is None else {"context_fn": policy}

        def run(x, options=options):
            return checkpoint(lambda x: block(x)[0], x, use_reentrant=False, **options)

        torch._dynamo.reset()
        backend = Recorder()
        y = torch.compile(run, backend=backend, fullgraph=True)(x)
        assert difference(gradients(y, None, leaves), true) < 1e-8
        assert backend.count(f"atlas.{op}.default") == [1, 0 if policy else 1]
        assert backend.count(f"atlas.{op}_backward.default") == [0, 1]
        products[policy is None] = backend.count("aten.mm.default")[1]
    assert 0 < products[False] <= products[True]
