"""What nodes compile for themselves is what they would do without."""

from contextlib import nullcontext

import pytest
import torch
from helpers import (
    DIM,
    HEADS,
    MEMORIES,
    Recorder,
    difference,
    draw,
    leaves,
    omega_rule,
    omega_rule_op,
    rule_inputs,
)
from marks import slow_as_it_is
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from atlas_blocks import AtlasMemoryConfig, MemoryAsContextConfig
from atlas_blocks.blocks.memory_as_context_op import _compiled_piece
from atlas_blocks.graph import compiled_steps, contract, saved_graphs
from atlas_blocks.omega import compiled_chunk, inline
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.op import definition_backward, definition_forward, flatten
from atlas_blocks.omega.rule import Rule

SETTINGS = {"update": "muon", "chunk_size": 8}


@pytest.mark.usefixtures("nodes_compile")
@pytest.mark.parametrize(
    "memory",
    [
        slow_as_it_is(m) if m == "matrix" else pytest.param(m, marks=pytest.mark.slow)
        for m in MEMORIES
    ],
)
def test_muon_chunks(memory, monkeypatch):
    """Whole ones, of any batch and length, from one compiled in each direction, where a backward
    computes them again."""
    monkeypatch.setattr(saved_graphs, "LARGEST", 0)
    made, once = [], compiled_steps.once
    monkeypatch.setattr(compiled_steps, "once", lambda fn: made.append(fn) or once(fn))
    compiled_chunk._whole_chunk.cache_clear()
    for batch, length in ((1, 19), (2, 24), (3, 8)):
        inputs = rule_inputs(memory, batch=batch, length=length, window=3, update="muon")
        a = Arguments(**inputs, rule=Rule(memory, "l2", "muon", 5, 1, 8, "chunk", 3), state=None)
        tensors, settings = flatten(a)
        for t in tensors:
            t.requires_grad_()
        y, state = omega_rule(**inputs, memory=memory, **SETTINGS)
        outputs = [y, *state.tensors()]
        results = definition_forward(tensors, settings, True)
        assert difference(results[: len(outputs)], outputs) < 1e-9
        grads = [draw(*t.shape, seed=5) for t in outputs[:-1]]
        found = definition_backward(grads, tensors, results[len(outputs) :], settings)
        pairs = [(t, g) for t, g in zip(outputs, grads, strict=False) if t.requires_grad]
        ends, of_ends = zip(*pairs, strict=True)
        true = torch.autograd.grad(ends, tensors, of_ends, materialize_grads=True)
        assert difference(found, true) < 1e-6
    assert len(made) == 2


MUON = AtlasMemoryConfig(
    memory="matrix", feature_map="identity", chunk_size=4, window=2, ns_steps=1
)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (MUON, 1),
        slow_as_it_is(MUON.replace(memory="mlp", update="gd"), 1),  # the walk's step
        slow_as_it_is(MemoryAsContextConfig(MUON, segment=4, persistent_tokens=0), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_one_sequence_compiles_nothing_again(config, count, monkeypatch):
    """Not for axes of size 1, the parameters at the start, or a backward's dispatch keys."""
    inner = Recorder()
    monkeypatch.setattr(compiled_steps, "BACKEND", inner)
    torch._dynamo.reset()
    for cached in (compiled_chunk._whole_chunk, inline._compiled_step, _compiled_piece):
        cached.cache_clear()
    block, x = config.build(DIM, HEADS), draw(1, 12, DIM, dtype=torch.float32)
    y, _ = torch.compile(block, backend="aot_eager", fullgraph=True)(x.requires_grad_())
    torch.autograd.grad(y.sum(), [x, *block.parameters()], allow_unused=True)
    assert inner.compiles == count


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_chunk_s_step_is_compiled_once_for_all_lengths(monkeypatch):
    """And once more where chunks begin elsewhere in memory, forward and backward: no length is
    taken for the offset of a view that happens to be as large."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiled_steps, "BACKEND", counter)

    def rule(x):
        return omega_rule_op(**x, memory="mlp", chunk_size=4, errors="online")[0]

    recorder = Recorder()
    run = torch.compile(rule, backend=recorder, fullgraph=True, dynamic=True)
    for length in (20, 33):
        inputs = leaves(rule_inputs("mlp", length=length, window=3))
        y, true = run(inputs), rule(inputs)
        assert difference([y], [true]) < 1e-10
        y.sum().backward()
    assert recorder.count("atlas.omega_walk.default")[0] == 1
    assert 1 <= counter.frame_count <= 2


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_inductor_compiles_a_node_by_default(nodes_compile, monkeypatch):
    """As it does for users: the one such test of the default run."""
    monkeypatch.setattr(compiled_steps, "BACKEND", "inductor")
    compiled_chunk._whole_chunk.cache_clear()
    inputs = leaves(rule_inputs("matrix", length=17, window=2, update="muon"))
    settings = SETTINGS | {"ns_steps": 1}
    made, once = [], compiled_steps.once
    monkeypatch.setattr(compiled_steps, "once", lambda fn: made.append(fn) or once(fn))
    run = torch.compile(lambda x: omega_rule_op(**x, **settings)[0], backend="aot_eager")
    found = [run(inputs), omega_rule(**inputs, **settings)[0]]
    assert made
    assert difference(found[:1], found[1:]) < 1e-9
    grads = [torch.autograd.grad(y.square().sum(), inputs["v"])[0] for y in found]
    assert difference(grads[:1], grads[1:]) < 1e-6
    compiled_chunk._whole_chunk.cache_clear()


def test_without_a_cpp_compiler_nodes_run_uncompiled(monkeypatch):
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    monkeypatch.setattr(compiled_steps, "BACKEND", "inductor")
    compiled_steps._has_cpp_compiler.cache_clear()
    compiled_chunk._whole_chunk.cache_clear()
    inputs = rule_inputs("mlp", window=3, update="muon")
    run = torch.compile(
        lambda x: omega_rule_op(**x, memory="mlp", **SETTINGS)[0], backend="aot_eager"
    )
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler is found"):
        y = run(inputs)
    assert difference([y], [omega_rule(**inputs, memory="mlp", **SETTINGS)[0]]) < 1e-9
    run(inputs)  # a second warning would be an error
    compiled_steps._has_cpp_compiler.cache_clear()


def test_a_node_runs_on_the_gpu_of_its_tensors(monkeypatch):
    """Kernels are launched on the current one, whatever tensors they are given."""

    class OnSecond(torch.Tensor):
        device = torch.device("cuda:1")

    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d) or nullcontext())
    here, there = torch.ones(2), torch.ones(2).as_subclass(OnSecond)
    for arguments in ((1, there), ("name", [there, here]), ([], there)):
        contract._device_of(arguments)
    assert entered == 3 * [torch.device("cuda:1")]
    contract._device_of((here, [here]))
    contract._device_of((1, []))
    assert len(entered) == 3
