"""A compiled MemoryAsContext computes what the block does with all that was put into it."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from helpers import DIM, Recorder, difference, draw, make_block
from marks import slow_as_it_is
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from atlas_blocks import MemoryAsContext
from atlas_blocks.blocks.as_built import identity_of
from atlas_blocks.blocks.memory_as_context_op import PARTS, _deviation

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's own, and those of its breaks


class Scaled(nn.Linear):
    """As quantised and low-precision Linears are: of another class, with the same tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class Adapted(nn.Module):
    """A Linear and a low-rank update of it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Mine(MemoryAsContext):
    def _attention(self, *arguments: Tensor) -> Tensor:
        return 2 * super()._attention(*arguments)


def hooked(block: MemoryAsContext) -> None:
    block.qkv.register_forward_hook(lambda module, arguments, y: 1.5 * y)


def hooked_before(block: MemoryAsContext) -> None:
    block.memory.qkv.register_forward_pre_hook(lambda module, arguments: (1.5 * arguments[0],))


def hooked_backward(block: MemoryAsContext) -> None:
    block.attention_out.register_full_backward_hook(lambda module, into, out: (2 * into[0],))


def parametrised(block: MemoryAsContext) -> None:
    parametrize.register_parametrization(block.qkv, "weight", Doubled())


def parametrised_itself(block: MemoryAsContext) -> None:
    parametrize.register_parametrization(block, "persistent", Doubled())


def pruned(block: MemoryAsContext) -> None:
    prune.random_unstructured(block.memory.out, "weight", 0.5)


def subclassed_part(block: MemoryAsContext) -> None:
    old = block.qkv
    block.qkv = Scaled(DIM, 3 * DIM, bias=False).double()
    block.qkv.weight = old.weight


def adapted(block: MemoryAsContext) -> None:
    block.recall_query = Adapted(block.recall_query).double()


def biased(block: MemoryAsContext) -> None:
    block.qkv = nn.Linear(DIM, 3 * DIM).double()


class Coded(Tensor):
    """As quantised weights are: numbers that stand for others."""


def quantised(block: MemoryAsContext) -> None:
    weight = block.qkv.weight.detach().as_subclass(Coded)
    block.qkv.weight = nn.Parameter(weight, requires_grad=False)


def another_forward(block: MemoryAsContext) -> None:
    block.attention_out.forward = lambda x: x * 0.5


def another_method(block: MemoryAsContext) -> None:
    before = block._attention
    block._attention = lambda *arguments: 2 * before(*arguments)


def another_number(block: MemoryAsContext) -> None:
    block.memory_norm.eps = 1.0


def another_config(block: MemoryAsContext) -> None:
    block.memory.config = dataclasses.replace(block.memory.config, objective="dot")


def another_segment(block: MemoryAsContext) -> None:
    block.config = dataclasses.replace(block.config, segment=3)


def another_class(block: MemoryAsContext) -> None:
    block.__class__ = Mine


PUT_IN = {
    hooked: "qkv has hooks",
    hooked_before: "memory.qkv has hooks",
    hooked_backward: "attention_out has hooks",
    parametrised: r"qkv is a .*\.ParametrizedLinear",
    parametrised_itself: r"it is a .*\.ParametrizedMemoryAsContext",
    pruned: "memory.out has hooks",
    subclassed_part: r"qkv is a .*\.Scaled, not a .*\.Linear",
    adapted: r"recall_query is a .*\.Adapted",
    biased: "qkv is a|qkv has the tensors weight, bias, not weight",
    quantised: "weight of qkv is a Coded",
    another_forward: "attention_out has a forward of its own",
    another_method: "it has a _attention of its own",
    another_number: "memory_norm has another eps",
    another_config: "memory has another config",
    another_segment: "it has another config",
    another_class: r"it is a .*\.Mine",
}


def results(run: Callable[..., tuple], block: nn.Module, x: Tensor) -> list[Tensor]:
    """y, and the gradients of its tokens and of every parameter."""
    leaf = x.clone().requires_grad_()
    y, _ = run(leaf)
    wanted = [leaf, *block.parameters()]
    found = torch.autograd.grad((y * draw(*y.shape, seed=5)).sum(), wanted, allow_unused=True)
    return [
        y,
        *(torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)),
    ]


@pytest.mark.parametrize("put_in", PUT_IN, ids=lambda f: f.__name__)
def test_what_was_put_in_is_named(put_in: Callable[[MemoryAsContext], None]) -> None:
    block = make_block("as-context", segment=4)
    assert _deviation(block.description, identity_of(block, PARTS)) is None
    put_in(block)
    reason = _deviation(block.description, identity_of(block, PARTS))
    assert reason is not None
    assert re.match(PUT_IN[put_in], reason)


# What other parts would not tell: a hook's, a parametrisation's, a subclass's and a method's ways.
@pytest.mark.parametrize(
    "put_in",
    [
        parametrised,
        *map(
            slow_as_it_is, (hooked, adapted, biased, another_class, another_method, another_config)
        ),
    ],
)
def test_compiled_it_is_the_block_as_it_is(put_in: Callable[[MemoryAsContext], None]) -> None:
    block, plain = make_block("as-context", segment=4), make_block("as-context", segment=4)
    put_in(block)
    x = draw(2, 11, DIM)
    compiled = torch.compile(block, backend="eager")
    assert difference(results(compiled, block, x), results(block, block, x)) < 1e-10
    # The test can tell: it is another function now.
    with torch.no_grad():
        assert difference([block(x)[0]], [plain(x)[0]]) > 1e-3


def test_in_one_graph_it_is_refused_by_name() -> None:
    block, x = make_block("as-context", segment=4), draw(1, 9, DIM)
    hooked(block)
    with pytest.raises(RuntimeError, match="MemoryAsContext runs uncompiled: qkv has hooks"):
        torch.compile(block, backend="eager", fullgraph=True)(x)


@pytest.mark.slow(compile_nodes=False)
def test_what_is_put_in_after_the_first_call_is_seen() -> None:
    block, x = make_block("as-context", segment=4), draw(1, 9, DIM)
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        compiled(x)
        adapted(block)
        assert difference([compiled(x)[0]], [block(x)[0]]) < 1e-10


def test_equal_blocks_share_one_graph() -> None:
    """Hooks of the blocks themselves run around the graph, and change nothing of that."""
    recorder, x = Recorder(), draw(1, 9, DIM)
    for _ in range(4):
        block = make_block("as-context", segment=4)
        block.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))
        true = block(x)[0]
        block.compile(backend=recorder, fullgraph=True)
        with torch.no_grad():
            assert difference([block(x)[0]], [true]) < 1e-10
    assert sum(recorder.count("atlas.memory_as_context.default")) == 1


@pytest.mark.slow(compile_nodes=False)
def test_one_graph_serves_every_length() -> None:
    block, recorder = make_block("as-context", segment=4), Recorder()
    compiled = torch.compile(block, backend=recorder, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (9, 17, 5):
            x = draw(2, length, DIM)
            assert difference([compiled(x)[0]], [block(x)[0]]) < 1e-10
    assert recorder.count("atlas.memory_as_context.default") == [1]


def test_one_that_is_exported_is_refused_by_name() -> None:
    block = make_block("as-context", segment=4)
    torch.export.export(block, (draw(1, 9, DIM),), strict=False)
    hooked(block)
    with pytest.raises(ValueError, match=r"block: expected a MemoryAsContext as .* qkv has hooks"):
        torch.export.export(block, (draw(1, 9, DIM),), strict=False)
