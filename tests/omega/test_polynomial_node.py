"""The polynomial features as a node: torch's own checks of it, compiled = eager, its gradients."""

import pytest
import torch
from helpers import difference
from torch._dynamo.testing import CompileCounterWithBackend

from atlas_blocks.functional import PolynomialMap, polynomial_features, taylor_coefficients
from atlas_blocks.omega.polynomial_node import as_node

OPS = torch.ops.atlas


def arguments(degree, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=g, dtype=torch.float64).to(dtype)
    return x, taylor_coefficients(degree)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_opcheck_passes_forward_and_backward(degree, dtype):
    tensors, checks = list(arguments(degree, dtype)), ("test_schema", "test_faketensor")
    forward, backward = OPS.polynomial_features.default, OPS.polynomial_features_backward.default
    torch.library.opcheck(forward, (tensors, []), {}, test_utils=checks)
    wanted = [True, True]
    y, key = forward(tensors, wanted)
    rest = ([torch.ones_like(y)], tensors, [], key, wanted)
    torch.library.opcheck(backward, rest, {}, test_utils=checks)


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("degree", [1, 3])
def test_traced_it_is_one_node_and_equals_plain_autograd(degree):
    """Outputs and gradients; the graph is one for every length."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def traced(x, coefficients):
        phi = as_node(PolynomialMap(coefficients))
        assert phi is not None
        return phi(x)

    compiled = torch.compile(traced, backend=counter, fullgraph=True, dynamic=True)
    for length in (3, 4, 6):
        x, coefficients = arguments(degree)
        x = x[:, :1].repeat(1, length, 1)

        def run(f, x=x, coefficients=coefficients):
            leaves = [t.clone().requires_grad_() for t in (x, coefficients)]
            y = f(*leaves)
            y.square().sum().backward()
            return [y, *(t.grad for t in leaves)]

        true = run(polynomial_features)
        assert difference(run(traced), true) < 1e-12
        assert difference(run(compiled), true) < 1e-12
    assert counter.frame_count == 1


def test_wrong_arguments_are_named():
    x, coefficients = arguments(2)
    for bad, message in (
        (coefficients[None], r"coefficients: expected shape \[p \+ 1\]"),
        (coefficients[:0], "coefficients' length: expected an int >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            polynomial_features(x, bad)
