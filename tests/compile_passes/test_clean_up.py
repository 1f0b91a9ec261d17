"""clean_up: what it finds, the ops before and after, the numbers both ways, and what it leaves."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DIM, Layers, Recorder, difference, draw, everything, small_memory
from torch import Tensor

from atlas_blocks.compile_passes.clean_up import CleanUp
from atlas_blocks.compile_passes.graph_pass import Passes, PassRun

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")


def compile_with_pass(function) -> tuple:
    runs: list[PassRun] = []
    recorder = Recorder(Passes([CleanUp()], record=runs.append))
    return torch.compile(function, backend=recorder, fullgraph=True), runs


def twice(x: Tensor) -> Tensor:
    """Sines and places twice, where once is enough."""
    left, right = (x.sin() + torch.arange(x.shape[-1]) for _ in range(2))
    return left * right + x.cos()


def test_what_is_computed_twice_is_computed_once():
    function, runs = compile_with_pass(twice)
    x = draw(3, 5)
    assert difference([function(x)], [twice(x)]) == 0
    (run,) = runs
    assert run.matches == run.before - run.after == 3
    ops = ("aten.add.Tensor", "aten.arange.default", "aten.sin.default")
    assert run.changed == dict.fromkeys(ops, -1)


def test_with_gradients_torch_has_done_it():
    function, runs = compile_with_pass(twice)
    x = draw(3, 5).requires_grad_()
    ours, true = ([y, *torch.autograd.grad(y.square().sum(), x)] for y in (function(x), twice(x)))
    assert difference(ours, true) < 1e-14
    assert [(r.direction, r.matches) for r in runs] == [("forward", 0), ("backward", 0)]


@pytest.mark.slow(compile_nodes=False)
def test_a_decoded_token_of_two_layers():
    torch.manual_seed(0)
    decode = Layers(*(small_memory(memory="mlp").build(DIM, 2).double() for _ in range(2)))
    x = draw(2, 6, DIM)
    function, runs = compile_with_pass(decode)
    with torch.no_grad():
        states = [block(x[:, :5])[1] for block in decode.blocks]
        (y, after), (z, true) = (f(x[:, 5:], states) for f in (function, decode))
    for ours, right in zip(after, true, strict=True):
        assert difference(everything((y, ours)), everything((z, right))) < 1e-9
    assert runs[0].matches > 20


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1, x + 1),  # two results have memory of their own
        lambda x: ((x + 1)[0], (x + 1)[1:]),  # views of them too
        lambda x: F.dropout(x, 0.5) - F.dropout(x, 0.5),
        lambda x: torch.copysign(x, torch.full((), 0.0)) - torch.copysign(x, torch.full((), -0.0)),
    ],
    ids=["results", "views", "dropout", "signs of zero"],
)
def test_what_only_looks_alike_is_left(function):
    x = draw(40, 5)
    ours, runs = compile_with_pass(function)
    y = ours(x)
    assert runs[0].matches == 0
    if isinstance(y, tuple):
        assert y[0].untyped_storage().data_ptr() != y[1].untyped_storage().data_ptr()
    else:
        assert y.abs().max() > 0
