"""Graphs on a CPU go into one C++ program, others and those that are asked not to do not."""

from operator import attrgetter

import pytest
import torch
from helpers import omega_rule_op as omega_rule
from torch import Tensor, fx
from torch._inductor import compile_fx

import atlas_blocks
from atlas_blocks.blocks.memory_as_context_op import read, written
from atlas_blocks.graph import one_program
from atlas_blocks.graph.compiled_steps import once


def _added(x: Tensor, name: str, count: int) -> list[Tensor]:
    """x + 1, x + 2 and so on."""
    return [x + n + 1 for n in range(count)]


here = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < one_program.SINCE,
    reason="tried with later versions of torch alone",
)


@here
def test_it_is_for_tensors_on_a_cpu():
    cpu, other = torch.empty(2), torch.empty(2, device="meta")
    assert one_program.options([cpu, 3]) == {"cpp_wrapper": True}
    for inputs in ([other], [cpu, other], [3], []):
        assert one_program.options(inputs) == {}


def test_an_earlier_torch_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    assert one_program.options([torch.empty(2)]) == {}


@here
@pytest.mark.parametrize(
    ("options", "expected"),
    [(None, True), ({"cpp_wrapper": False}, False), ({"size_asserts": False}, True)],
)
def test_an_option_of_the_user_s_comes_first(monkeypatch, options, expected):
    seen = []

    def stand_in(graph, inputs, inner_compile, config_patches):
        seen.append(config_patches)
        return graph

    monkeypatch.setattr(compile_fx, "compile_fx", stand_in)
    compiled = atlas_blocks.compile(lambda x: x.sin() + 1, options=options)
    x = torch.randn(3)
    torch.testing.assert_close(compiled(x), x.sin() + 1)
    (found,) = seen
    assert found["cpp_wrapper"] == expected


ADDED = torch.library.custom_op("one_program_tests::added", mutates_args=())(_added)
ADDED.register_fake(lambda x, name, count: [torch.empty_like(x) for _ in range(count)])


@here
@pytest.mark.parametrize("name", ["plain", 'a "quoted" \\ name\n'])
@pytest.mark.parametrize("count", [1, 2])
def test_any_op_of_anybody_s_runs(name, count):
    """A C++ program would take a list of one tensor for a tensor, and the process would die."""
    x = torch.randn(3, dtype=torch.float64)

    def f(x):
        return [y.cos() for y in ADDED(x.sin(), name, count)]

    for compiled in (atlas_blocks.compile(f), once(f)):
        assert len(compiled(x)) == count
        for found, true in zip(compiled(x), f(x), strict=True):
            torch.testing.assert_close(found, true)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("op", ["atlas.omega_rule.default", "aten.split_with_sizes.default"])
def test_a_list_of_one_tensor_does_not_fit_wherever_it_is(op, count):
    """Unless Inductor writes it out itself, as it does parts of a tensor."""
    inner = fx.Graph()
    parts = inner.call_function(attrgetter(op)(torch.ops), (inner.placeholder("x"),))
    parts.meta["val"] = [torch.empty(2) for _ in range(count)]
    inner.output(parts)
    outer = fx.Graph()
    outer.output(outer.call_module("part", (outer.placeholder("x"),)))
    part = fx.GraphModule(torch.nn.Module(), inner)
    fits = count == 2 or op.startswith("aten")
    assert one_program.fits(part) == fits
    assert one_program.fits(fx.GraphModule({"part": part}, outer)) == fits


@here
@pytest.mark.slow
def test_one_part_of_a_tensor_is_computed_in_one_program(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where nothing is kept yet
    programs = []
    fits = one_program.fits
    monkeypatch.setattr(one_program, "fits", lambda graph: programs.append(fits(graph)) or True)

    def f(x):
        (part,) = x.sin().split_with_sizes([5], 1)
        return part.cos() + x

    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(atlas_blocks.compile(f)(x), f(x))
    assert programs == [True]


@here
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_gradient_of_one_tensor_alone():
    """A list of one tensor again: what the walk's backward gives is what is asked of it."""
    x, eta = torch.randn(1, 12, 2, 4, dtype=torch.float64), torch.rand(1, 12, 2).double()
    memory = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(memory):
        gates = {"alpha": eta, "eta": eta, "theta": None, "gamma": torch.ones(1, 12, 2, 3).double()}
        return omega_rule(x, x, x, **gates, weights=[memory], chunk_size=4)[0].square().sum()

    (true,) = torch.autograd.grad(f(memory), memory)
    for provider in ("auto", "inline"):
        compiled = atlas_blocks.compile(f, provider=provider)
        (found,) = torch.autograd.grad(compiled(memory), memory)
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("text", ["plain", 'a "quoted" \\ name', "50% ünd 'so'", "a\nb?"])
def test_what_describes_a_block_is_no_trouble_to_a_compiler(text):
    parts = {"config": {"type": text, "width": None, "sizes": [1, 2.5]}, "own_tables": True}
    description = written(parts)
    assert not set('"\\\n?') & set(description)
    assert description.isascii()
    assert read(description) == parts


def test_a_description_of_plain_json_is_read():
    """As programs that were exported earlier hold it."""
    assert read('{"dim": 64, "config": {"mlp": "swiglu"}}') == {
        "dim": 64, "config": {"mlp": "swiglu"}
    }  # fmt: skip
