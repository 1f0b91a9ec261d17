"""The polynomial features as an op: torch's own checks of it, compiled = eager, its gradients."""

import pytest
import torch
from helpers import difference
from torch._dynamo.testing import CompileCounterWithBackend

from atlas_blocks import ops
from atlas_blocks.functional import polynomial_features, taylor_coefficients
from atlas_blocks.ops import Provider, providers

OPS = torch.ops.atlas


def arguments(degree, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=g, dtype=torch.float64).to(dtype)
    return x, taylor_coefficients(degree)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_opcheck_passes_forward_and_backward(degree, dtype):
    x, coefficients = arguments(degree, dtype)
    checks = ("test_schema", "test_faketensor")
    forward, backward = OPS.polynomial_features.default, OPS.polynomial_features_backward.default
    torch.library.opcheck(forward, (x, coefficients, "definition"), {}, test_utils=checks)
    grad = torch.ones_like(forward(x, coefficients, "definition"))
    torch.library.opcheck(backward, (grad, x, coefficients, "definition"), {}, test_utils=checks)


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("degree", [1, 3])
def test_compiled_and_another_provider_equal_plain_autograd(monkeypatch, degree):
    """Outputs and gradients; the graph is one for every length."""
    definition = providers.find("polynomial_features", "definition")
    other = Provider("other", lambda call: None, definition.forward, definition.backward)
    monkeypatch.setitem(providers._PROVIDERS, "polynomial_features", {})
    ops.register_provider("polynomial_features", other, automatic_on=())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.polynomial_features, backend=counter, fullgraph=True, dynamic=True)
    for length in (3, 4, 6):
        x, coefficients = arguments(degree)
        x = x[:, :1].repeat(1, length, 1)

        def run(f, x=x, coefficients=coefficients, **options):
            leaves = [t.clone().requires_grad_() for t in (x, coefficients)]
            y = f(*leaves, **options)
            y.square().sum().backward()
            return [y, *(t.grad for t in leaves)]

        true = run(polynomial_features)
        assert difference(run(ops.polynomial_features), true) == 0
        assert difference(run(ops.polynomial_features, provider="other"), true) < 1e-12
        assert difference(run(compiled), true) < 1e-12
    assert counter.frame_count == 1
    with torch.no_grad():
        found = ops.polynomial_features(x, coefficients, provider="other")
    assert torch.equal(found, polynomial_features(x, coefficients))


def test_wrong_arguments_are_named():
    x, coefficients = arguments(2)
    for bad, message in (
        ((x.long(), coefficients), "x: expected dtype .*, got torch.int64"),
        ((torch.tensor(1.0), coefficients), r"x: expected shape \[..., D\] = \[any\], got \[\]"),
        ((x, coefficients[None]), r"coefficients: expected shape \[p \+ 1\]"),
        ((x, coefficients[:0]), "coefficients' length: expected an int >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.polynomial_features(*bad)
    with pytest.raises(ValueError, match="provider: expected one of auto, definition, got 'tri"):
        ops.polynomial_features(x, coefficients, provider="triton")
    with ops.use_provider("triton"):  # it has none of this name, so it chooses for itself
        ops.polynomial_features(x, coefficients)


def test_the_choice_can_be_explained():
    from atlas_blocks.ops.polynomial_features import Call

    choice = ops.explain_choice("polynomial_features", Call("cuda", torch.float32, 64, 2, True))
    assert (choice.provider, choice.refusals) == ("definition", {})
