"""Packed documents in a compiled graph: one graph, the same numbers, other bounds at no cost."""

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    DIM,
    Recorder,
    assert_close,
    difference,
    draw,
    everything,
    make_block,
    small_memory,
)
from torch import Tensor

from atlas_blocks import Block, MemoryAsGateConfig, SlidingWindowAttentionConfig
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig
from atlas_blocks.state import State

# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
LENGTH = 90  # several blocks of queries
# Uneven documents: of a single token, shorter than a window or a chunk, of one length.
BOUNDS = ([0, 5, 6, 23, 90], [0, 1, 11, 41, 90], [0, 30, 35, 60, 90])
WHOLE = ("memory-mlp-muon-sketch", "memory-plain", "block-attention", "as-gate-sum", "conv")


def results(
    block: Block, run: Any, x: Tensor, bounds: list[int], state: State | None = None
) -> list[Tensor]:
    """y, the state, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y, after = run(x, state, cu_seqlens=torch.tensor(bounds), detach_state=False)
    floats = [t for t in everything((y, after)) if t.requires_grad]
    weights = (torch.linspace(1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in floats)
    loss = sum(((t * w).sum() for t, w in zip(floats, weights, strict=True)), torch.zeros(()))
    found = torch.autograd.grad(loss, [x, *block.parameters()], materialize_grads=True)
    return [*everything((y, after)), *found]


@pytest.mark.parametrize("name", WHOLE)
def test_one_graph_serves_all_bounds(name: str) -> None:
    torch._dynamo.reset()
    block, x, backend = make_block(name), draw(1, LENGTH, DIM), Recorder()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for bounds in BOUNDS:
        true = results(block, block, x, bounds)
        assert difference(results(block, compiled, x, bounds), true) < 1e-8
    assert backend.compiles == 1


@pytest.mark.parametrize("name", ["memory-mlp-gd-sketch", "block-attention"])
def test_one_graph_goes_on_from_documents_at_different_places(name: str) -> None:
    torch._dynamo.reset()
    block, backend = make_block(name), Recorder()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for bounds, last in itertools.pairwise((*BOUNDS, BOUNDS[0])):
        _, state = block(draw(1, LENGTH, DIM), cu_seqlens=torch.tensor(last))
        x = draw(1, LENGTH, DIM, seed=2)
        true = results(block, block, x, bounds, state)
        assert difference(results(block, compiled, x, bounds, state), true) < 1e-8
    assert backend.compiles == 1


def language_model() -> LanguageModel:
    torch.manual_seed(0)
    memory = small_memory(update="gd", memory="matrix")
    gate = MemoryAsGateConfig(memory, SlidingWindowAttentionConfig(window=7), mlp_width=16)
    return LanguageModelConfig("tiny", 11, DIM, 2, 2, gate).build()


@pytest.mark.slow(compile_nodes=False)
def test_a_language_model_on_packed_documents_is_one_graph() -> None:
    torch._dynamo.reset()
    model, backend = language_model().double(), Recorder()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tokens = torch.randint(11, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    for bounds in BOUNDS:
        cu_seqlens, found = torch.tensor(bounds, dtype=torch.int32), []
        for run in (model, compiled):
            logits, state = run(tokens, cu_seqlens=cu_seqlens)
            grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            found.append([logits, *(t.double() for t in state.tensors()), *grads])
        assert difference(*found) < 1e-8
        for i, (a, b) in enumerate(itertools.pairwise(bounds)):
            alone = model(tokens[:, a:b])
            assert_close(
                (found[0][0][:, a:b], state.blocks[0][[i]]), (alone[0], alone[1].blocks[0])
            )
    assert backend.compiles == 1
    # The bounds are looked at once for all blocks.
    assert backend.count("atlas.document_bounds.default")[0] == 1


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles_a_language_model_on_packed_documents() -> None:
    torch._dynamo.reset()
    model = language_model()
    compiled = torch.compile(model, fullgraph=True)
    tokens = torch.randint(11, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    for bounds in BOUNDS:
        found = []
        for run in (model, compiled):
            logits, _ = run(tokens, cu_seqlens=torch.tensor(bounds))
            grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
            found.append([logits, *grads])
        assert difference(*found) < 1e-3


@pytest.mark.parametrize("name", ["memory-plain", "block-attention", "conv"])
def test_compiled_bounds_that_do_not_fit_are_refused(name: str) -> None:
    torch._dynamo.reset()
    block, x = make_block(name), draw(1, LENGTH, DIM)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    compiled(x, cu_seqlens=torch.tensor([0, 5, 90]))
    for bounds in ([0, 91, 90], [0, 5, 5], [1, 5, 90]):
        message = r"cu_seqlens: expected strictly rising bounds from 0 to T = 90, got \["
        with pytest.raises(ValueError, match=message):
            compiled(x, cu_seqlens=torch.tensor(bounds))
