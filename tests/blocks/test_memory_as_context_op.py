"""The segments of MemoryAsContext as an op: torch's own checks of it, and equal to eager."""

from typing import Any

import pytest
import torch
from helpers import DIM, assert_close, difference, draw, everything, make_block
from marks import slow_as_it_is

from atlas_blocks import MemoryAsContext, State
from atlas_blocks.blocks.memory_as_context_op import memory_as_context, tensors_of
from atlas_blocks.graph import compiled_steps, saved_graphs

OPS = torch.ops.atlas
NAMES = ["as-context", "as-context-muon"]


def begun(block: MemoryAsContext, *lengths: int) -> State:
    """Rows that have seen this many tokens."""
    with torch.no_grad():
        return State.cat([block(draw(1, n, DIM, seed=n + 1))[1] for n in lengths])


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_passes_forward_and_backward(name: str) -> None:
    block = make_block(name)
    parameters, buffers = tensors_of(block)
    state = begun(block, 3, 14)
    tensors = [t.clone() for t in state.tensors()]
    common = (draw(2, 17, DIM), parameters, buffers, tensors)
    settings = (block.description, None, "auto")
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    inputs = [common[0], *parameters, *buffers, *tensors]
    every = [t.is_floating_point() for t in inputs]
    with torch.no_grad():
        for wanted in ([], every):
            torch.library.opcheck(
                OPS.memory_as_context.default, (*common, *settings, wanted), {}, **checks
            )
        y, *rest = OPS.memory_as_context.default(*common, *settings, every)
    after, saved = rest[: len(tensors)], rest[len(tensors) :]
    grads = [torch.ones_like(t) for t in (y, *after) if t.is_floating_point()]
    torch.library.opcheck(
        OPS.memory_as_context_backward.default,
        (grads, *common, saved, *settings, every),
        {},
        **checks,
    )


@pytest.mark.parametrize("largest", [saved_graphs.LARGEST, 0], ids=["kept", "again"])
@pytest.mark.parametrize(
    ("name", "segment"),
    [("as-context", n) for n in (4, 12, 16)] + [("as-context-muon", n) for n in (4, 5)],
)
@pytest.mark.parametrize("places", [(0, 0), (3, 3), (0, 14), (12, 5)], ids=str)
def test_it_is_the_eager_block_in_values_and_gradients(
    name: str,
    segment: int,
    places: tuple[int, ...],
    largest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows at one place of their segments and at different ones, through the state too; segments
    within a chunk of 8, across its end, and of whole ones."""
    monkeypatch.setattr(saved_graphs, "LARGEST", largest)
    block, x = make_block(name, segment=segment), draw(2, 29, DIM)
    start = begun(block, *places)
    results = []
    for run in (lambda h, state: memory_as_context(block, h, state), block._rows):
        h = x.clone().requires_grad_()
        state = start.map(lambda t: t.clone().requires_grad_(t.is_floating_point()))
        y, after = run(h, state)
        parameters, _ = tensors_of(block)
        leaves = [h, *parameters, *(t for t in state.tensors() if t.requires_grad)]
        outputs = [t for t in (y, *after.tensors()) if t.requires_grad]
        weights = [draw(*t.shape, seed=7) for t in outputs]
        gradients = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)
        results.append(((y, after), gradients))
    (ours, our_gradients), (true, true_gradients) = results
    assert_close(ours, true, 1e-10)
    assert difference(our_gradients, true_gradients) < 1e-8


@pytest.mark.parametrize(
    ("name", "segment"), [slow_as_it_is("as-context", 4), slow_as_it_is("as-context-muon", 5)]
)
@pytest.mark.usefixtures("nodes_compile")
def test_segments_are_compiled_once(
    name: str, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each place in a chunk of 8 that one begins at, if these are few; gradients or none."""
    made, once = [], compiled_steps.once

    def spy(fn: Any, **options: Any) -> Any:
        made.append(fn.__name__)
        return once(fn, **options)

    monkeypatch.setattr(compiled_steps, "once", spy)
    block, x = make_block(name, segment=segment), draw(1, 6 * segment, DIM)
    state = begun(block, 0)
    for _ in range(2):
        with torch.no_grad():
            assert_close(memory_as_context(block, x, state), block._rows(x, state), 1e-10)
    gradients = [
        torch.autograd.grad(run(x, state)[0].square().sum(), tensors_of(block)[0][:3])
        for run in (lambda *a: memory_as_context(block, *a), block._rows)
    ]
    assert difference(*gradients) < 1e-8
    assert made.count("piece") == 2 * (2 if 8 % segment == 0 else 1)


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.usefixtures("nodes_compile")
def test_any_number_of_batch_sizes() -> None:
    """Dynamo gives up on a function after a few: each size has its own."""
    block = make_block("as-context-muon", segment=5)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for rows in (2, 3, 4):
            x = draw(rows, 10, DIM)
            start = block.initial_state(x)
            assert_close(memory_as_context(block, x, start), block._rows(x, start), 1e-10)


@pytest.mark.parametrize("size", [(2, 0), (0, 9)], ids=str)
def test_no_tokens_and_no_rows(size: tuple[int, int]) -> None:
    block = make_block("as-context")
    state = begun(block, 5, 5)[: size[0]]
    h = draw(*size, DIM).requires_grad_()
    y, after = memory_as_context(block, h, state)
    assert y.shape == (*size, DIM)
    assert difference(everything((y, after)), everything((h, state))) == 0
    y.sum().backward()
    assert h.grad is not None
    assert not h.grad.any()


def test_a_provider_reaches_the_ops_inside() -> None:
    from atlas_blocks import use_provider

    block = make_block("as-context-muon")
    with use_provider("triton"), pytest.raises(ValueError, match="'triton' cannot serve this call"):
        memory_as_context(block, draw(1, 9, DIM), begun(block, 0))
