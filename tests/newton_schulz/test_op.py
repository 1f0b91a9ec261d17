"""Newton-Schulz as an op: torch's own checks of it, compiled = eager, its gradients, its FLOPs."""

import pytest
import torch
from helpers import difference, draw
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from atlas_blocks import ops
from atlas_blocks.functional import newton_schulz
from atlas_blocks.graph import providers
from atlas_blocks.newton_schulz.op import NewtonSchulzCall
from atlas_blocks.ops import Provider

OPS = torch.ops.atlas
SHAPES = ((4, 4), (2, 3, 7), (3, 1, 9, 2))


@pytest.fixture
def other(monkeypatch):
    """The definition under another name, so that the ops are called in eager mode, too."""
    definition = providers.find("newton_schulz", "definition")
    monkeypatch.setitem(providers._PROVIDERS, "newton_schulz", {})
    ops.register_provider(
        "newton_schulz",
        Provider("other", lambda call: None, definition.forward, definition.backward),
        automatic_on=(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck_passes_forward_and_backward(shape, dtype):
    s, grad = draw(*shape, dtype=dtype), draw(*shape, seed=2, dtype=dtype)
    checks = ("test_schema", "test_faketensor")
    options = (5, "jordan", "definition")
    torch.library.opcheck(OPS.newton_schulz.default, (s, *options), {}, test_utils=checks)
    backward = OPS.newton_schulz_backward.default
    torch.library.opcheck(backward, (grad, s, *options), {}, test_utils=checks)
    # A view: what comes back is contiguous all the same, and the fake tensor knows.
    torch.library.opcheck(OPS.newton_schulz.default, (s.mT, *options), {}, test_utils=checks)


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_compiled_and_another_provider_equal_the_definition(other, gradient):
    """Outputs and gradients; the graph is one for every number of matrices."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.newton_schulz, backend=counter, fullgraph=True, dynamic=True)
    for count in (3, 4, 6):

        def run(f, count=count, **options):
            s = draw(count, 4, 6).requires_grad_()
            u = f(s, gradient=gradient, **options)
            (u * draw(count, 4, 6, seed=2)).sum().backward()
            return [u, s.grad]

        true = run(newton_schulz)
        assert difference(run(ops.newton_schulz), true) == 0
        assert difference(run(ops.newton_schulz, provider="other"), true) < 1e-12
        assert difference(run(compiled), true) < 1e-12
    assert counter.frame_count == 1


@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_through_the_ops(other, shape, coefficients):
    def run(s):
        return ops.newton_schulz(s, steps=3, coefficients=coefficients, provider="other")

    assert gradcheck(run, draw(*shape).requires_grad_())


@pytest.mark.parametrize("steps", [0, 1, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_formula_is_what_the_definition_computes(shape, steps):
    ops.register_flop_formulas()

    def counted(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    s, grad = draw(*shape), draw(*shape, seed=2)
    options = (steps, "jordan")
    definition = providers.find("newton_schulz", "definition")
    assert counted(lambda: OPS.newton_schulz(s, *options, "definition")) == counted(
        lambda: definition.forward(s, *options)
    )
    assert counted(lambda: OPS.newton_schulz_backward(grad, s, *options, "definition")) == counted(
        lambda: definition.backward(grad, s, *options)
    )


def test_wrong_arguments_are_named():
    for bad, message in (
        ({"s": torch.eye(3).long()}, "s: expected dtype .*, got torch.int64"),
        ({"s": torch.zeros(3)}, r"s: expected a tensor \[..., m, n\]"),
        ({"steps": -1}, "steps: expected an int >= 0, got -1"),
        ({"coefficients": "best"}, "coefficients: expected one of jordan, polar_express"),
        ({"gradient": "none"}, "gradient: expected one of exact, straight_through"),
        ({"provider": "other"}, "provider: expected one of auto, definition, triton, got 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.newton_schulz(**{"s": torch.eye(3), **bad})


def test_the_choice_can_be_explained():
    choice = ops.explain_choice(
        "newton_schulz", NewtonSchulzCall("cpu", torch.float32, 64, 64, True)
    )
    assert choice.provider == "definition"
