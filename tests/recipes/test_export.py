"""Ahead of time: ops stay single nodes, and one token's step becomes plain tensor operations."""

import collections
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import BLOCKS, DIM, difference, draw, make_block
from torch.jit._pickle import build_tensorlist

from atlas_blocks import LSTM, AtlasMemory, Block, DeepTransformerLayer, MemoryAsContext
from atlas_blocks.recipes import build, export
from atlas_blocks.recipes.command_line import main as cli

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
QUICK = (
    "memory-matrix-gd-polynomial",
    "memory-mlp-muon-sketch",
    "block-attention",
    "as-layer",
    "dot",
    "lstm",
)
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BLOCKS]
# Their nodes are as many as there are kinds of segments, and they refuse a state: see below.
SEGMENTED = ("caching", "tnt")


def nodes(program: torch.export.ExportedProgram) -> collections.Counter:
    """How many nodes there are of every op of this library."""
    targets = (str(n.target) for n in program.graph.nodes if n.op == "call_function")
    return collections.Counter(t for t in targets if t.startswith("atlas"))


def one_each(block: Block, begun: bool) -> collections.Counter:
    """The nodes that a block should become, from a state or at the start of a sequence."""
    found = collections.Counter()
    for module in block.modules():
        if isinstance(module, MemoryAsContext):
            found["atlas.memory_as_context.default"] += 1
            found["atlas.omega_rule.default"] -= 1  # the memory inside is part of that node
        elif isinstance(module, AtlasMemory):
            found["atlas.omega_rule.default"] += 1
        elif isinstance(module, LSTM):
            found["atlas.lstm.default"] += 1
        elif isinstance(module, DeepTransformerLayer):
            # A fresh sequence without gates is SDPA's.
            found["atlas.kernel_attention.default"] += begun or module.gates is not None
    return +found


@pytest.mark.parametrize("name", NAMES)
def test_every_op_is_one_node_for_every_length(name):
    if name.startswith(SEGMENTED):
        pytest.skip("its segments are nodes of their own")
    block = make_block(name)
    program = export.export_step(block, draw(2, 20, DIM), None)
    assert nodes(program) == one_each(block, False)
    _, state = block(draw(2, 3, DIM))
    further = export.export_step(block, draw(2, 20, DIM), state)
    assert nodes(further) == one_each(block, state is not None)
    tensors = [] if state is None else state.tensors()
    with torch.no_grad():
        # An attention's graph is that of texts longer than its window.
        for length in (9, 33):
            x = draw(2, length, DIM)
            for exported, before in ((program, None), (further, state)):
                y, after = block(x, before)
                true = [y, *([] if after is None else after.tensors())]
                ours = exported.module()(x, *(tensors if exported is further else ()))
                assert difference([t.double() for t in ours], [t.double() for t in true]) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_step_is_the_block_token_by_token(name):
    block, x = make_block(name), draw(2, 20, DIM)
    if BLOCKS[name](DIM, 2).state_type is None:
        pytest.skip("it has no state")
    with torch.no_grad():
        _, state = block(x[:, :3])
        if name.startswith("caching"):
            with pytest.raises(ValueError, match="state: expected none where MemoryCaching is exp"):
                export.export_plain_step(block, x[:, :1], state)
            return
        if any(isinstance(m, DeepTransformerLayer) for m in block.modules()):
            with pytest.raises(ValueError, match="model: expected blocks whose step reads nothing"):
                export.export_plain_step(block, x[:, :1], state)
            return
        program = export.export_plain_step(block, x[:, :1], state)
        assert not nodes(program)
        step, tensors = program.module(), state.tensors()
        for t in range(3, 20):
            y, *tensors = step(x[:, t : t + 1], *tensors)
            true, state = block(x[:, t : t + 1], state)
            ours = [y, *(s.double() for s in tensors)]
            assert difference(ours, [true, *(s.double() for s in state.tensors())]) < 1e-8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_a_package_of_segments_is_the_block_token_by_token(tmp_path):
    block, x = make_block("as-context"), draw(2, 30, DIM)
    with torch.no_grad():
        _, state = block(x[:, :0])
        file = export.package(block, x[:, :1], state, tmp_path / "step.pt2")
        step, parts = torch._inductor.aoti_load_package(str(file)), []
        tensors = [t.contiguous() for t in state.tensors()]
        for one in x.split(1, 1):
            y, *tensors = step(one.contiguous(), *tensors)
            parts.append(y)
        true, after = block(x)
    assert difference([torch.cat(parts, 1), *tensors], [true, *after.tensors()]) < 1e-8


@pytest.mark.parametrize("name", ["caching-reset", "tnt"])
def test_what_a_block_reads_on_the_host_is_refused(name):
    block = make_block(name)
    _, state = block(draw(2, 3, DIM))
    with pytest.raises(ValueError, match=r"(state|x): expected .* exported"):
        export.export_step(block, draw(2, 20, DIM), state)


def test_more_than_one_token_is_refused():
    block = make_block("memory-plain")
    _, state = block(draw(1, 3, DIM))
    with pytest.raises(ValueError, match="x: expected one token, got T = 2"):
        export.export_plain_step(block, draw(1, 2, DIM), state)
    with pytest.raises(ValueError, match=r"out: expected a file name that ends in \.pt2"):
        export.package(block, draw(1, 1, DIM), state, Path("step.so"))


def test_a_package_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    def fail(program, package_path):
        Path(package_path).write_bytes(b"half")
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    out = tmp_path / "step.pt2"
    out.write_bytes(b"old")
    block = make_block("memory-plain")
    with torch.no_grad():
        _, state = block(draw(1, 0, DIM))
    with pytest.raises(RuntimeError, match="no compiler"):
        export.package(block, draw(1, 1, DIM), state, out)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_names_bad_input(capsys, tmp_path):
    for arguments in (["atlas-huge"], ["omeganet-tiny", "--batch", "0"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["export", *arguments, "--out", str(tmp_path / "step.pt2")])
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith("atlas-blocks: ")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_a_package_runs_without_python(tmp_path):
    """recipes/run_step.cpp, linked with libtorch alone, gives eager's logits and state, for rows
    that differ after a state that is one for both."""
    file = tmp_path / "step.pt2"
    with pytest.raises(SystemExit) as left:
        cli.main(["export", "omeganet-tiny", "--batch", "2", "--out", str(file)])
    assert left.value.code == 0
    torch.manual_seed(0)
    model = build("omeganet-tiny")
    tokens = torch.randint(256, (2, 80))
    with torch.no_grad():
        before = model(tokens[:, :0]).state
        logits, after = model(tokens, before)
    true = [logits, *after.tensors()]

    step, parts = torch._inductor.aoti_load_package(str(file)), []
    tensors = [t.contiguous() for t in before.tensors()]
    for one in tokens.split(1, 1):
        y, *tensors = step(one.contiguous(), *tensors)
        parts.append(y)
    ours = [torch.cat(parts, 1), *tensors]
    assert difference([t.double() for t in ours], [t.double() for t in true]) < 1e-3

    folder = Path(torch.__file__).parent
    runner = tmp_path / "run_step"
    source = Path(export.__file__).with_name("run_step.cpp")
    headers = [folder / "include", folder / "include/torch/csrc/api/include"]
    command = ["g++", "-std=c++20", source, "-o", runner, *(f"-I{h}" for h in headers)]
    command += [f"-L{folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, f"-Wl,-rpath,{folder / 'lib'}"], check=True)
    linked = subprocess.run(["ldd", runner], check=True, capture_output=True, text=True).stdout
    assert "libtorch_cpu" in linked
    assert "libpython" not in linked
    torch.save([tokens, *before.tensors()], tmp_path / "input")
    places = [file, tmp_path / "input", tmp_path / "output"]
    # No interpreter could be found, were one looked for.
    nowhere = {"PATH": "", "HOME": str(tmp_path), "PYTHONHOME": "/nonexistent"}
    subprocess.run([runner, *places], check=True, env=nowhere)
    # What C++ calls a list of tensors.
    with torch.serialization.safe_globals([build_tensorlist]):
        found = torch.load(tmp_path / "output", weights_only=True)
    assert difference([t.double() for t in found], [t.double() for t in ours]) < 1e-5
