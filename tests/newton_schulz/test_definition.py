"""Newton-Schulz: the literal loop, scale invariance, degenerate inputs, gradients, precision."""

import math

import pytest
import torch
from helpers import difference
from torch import Tensor
from torch.autograd import gradcheck

from atlas_blocks.functional import newton_schulz
from atlas_blocks.newton_schulz.definition import COEFFICIENTS, EPS

NAMES = tuple(COEFFICIENTS)
SHAPES = ((4, 4), (3, 5), (5, 3), (2, 9), (9, 2), (1, 6), (6, 1), (1, 1), (2, 3, 4, 6), (3, 6, 4))


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def literal(s: Tensor, steps: int = 5, coefficients: str = "jordan") -> Tensor:
    """Section 7, one matrix at a time, every power of A written out."""
    if s.ndim > 2:
        return torch.stack([literal(x, steps, coefficients) for x in s])
    if s.shape[0] > s.shape[1]:
        return literal(s.T, steps, coefficients).T
    table = COEFFICIENTS[coefficients]
    x = s / (s.square().sum().sqrt() + 1e-7)
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("steps", [0, 1, 5, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_literal_loop(shape: tuple[int, ...], steps: int, coefficients: str) -> None:
    s = draw(*shape)
    ours = newton_schulz(s, steps=steps, coefficients=coefficients)
    assert difference([ours], [literal(s, steps, coefficients)]) < 1e-10


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 10.0, 1e6])
def test_does_not_see_the_scale_of_its_input(scale: float) -> None:
    s = draw(5, 4, 6)
    # Exact but for eps beside the norm, which five steps magnify at most 485 times.
    bound = 485 * 2 * EPS / min(scale, 1.0) / s.flatten(1).norm(dim=1).min().item()
    assert difference([newton_schulz(scale * s)], [newton_schulz(s)]) < bound


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_gives_zero_and_a_zero_gradient(
    shape: tuple[int, int], gradient: str, dtype: torch.dtype
) -> None:
    # Between two others: the batch's other gradients must not suffer either.
    s = draw(3, *shape).to(dtype)
    s[1] = 0
    s.requires_grad_()
    out = newton_schulz(s, gradient=gradient)
    (out * draw(*out.shape, seed=1).to(dtype)).sum().backward()
    assert not out[1].any()
    assert s.grad is not None
    assert not s.grad[1].any()
    assert s.grad.isfinite().all()
    assert s.grad[0].any()
    assert s.grad[2].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_one_and_tiny_inputs_are_finite(
    shape: tuple[int, int], scale: float, dtype: torch.dtype
) -> None:
    m, n = shape
    s = (scale * torch.outer(draw(m), draw(n, seed=1))).to(dtype).requires_grad_()
    out = newton_schulz(s)
    out.sum().backward()
    assert out.isfinite().all()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    # One singular value near 1; the others were rounding, at most 485 times as much now.
    if scale >= 1:
        values = torch.linalg.svdvals(out.detach().double())
        assert 0.6 < values[0] < 1.3
        assert values[1] < 485 * 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2), (2, 3, 4)], ids=str)
def test_gradcheck(shape: tuple[int, ...], coefficients: str) -> None:
    s = draw(*shape).requires_grad_()
    for steps in (1, 3):
        assert gradcheck(lambda x, k=steps: newton_schulz(x, steps=k, coefficients=coefficients), s)


def test_five_steps_have_the_gradient_of_the_literal_loop() -> None:
    for shape in ((4, 4), (3, 7), (7, 3)):
        s, weight = draw(*shape).requires_grad_(), draw(*shape, seed=1)
        (ours,) = torch.autograd.grad((newton_schulz(s) * weight).sum(), s)
        (true,) = torch.autograd.grad((literal(s) * weight).sum(), s)
        assert difference([ours], [true]) < 1e-9


def test_straight_through_differentiates_the_normalisation_alone() -> None:
    s, weight = draw(3, 4, 6).requires_grad_(), draw(3, 4, 6, seed=1)
    out = newton_schulz(s, gradient="straight_through")
    assert difference([out.detach()], [newton_schulz(s.detach())]) < 1e-12
    (ours,) = torch.autograd.grad((out * weight).sum(), s)
    unit = s / (torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True) + EPS)
    (true,) = torch.autograd.grad((unit * weight).sum(), s)
    assert difference([ours], [true]) < 1e-12


def float32_errors(shape: tuple[int, int], condition: float, name: str) -> tuple[float, float]:
    """Worst errors against float64 of the library's and of the literal loop, run in float32."""
    ours = plain = 0.0
    for seed in range(20):
        u, _, v = torch.linalg.svd(draw(*shape, seed=seed), full_matrices=False)
        values = torch.logspace(0, -math.log10(condition), min(shape), dtype=torch.float64)
        s = (u * values @ v).float()
        true = literal(s.double(), 5, name)
        ours = max(ours, difference([newton_schulz(s, coefficients=name).double()], [true]))
        plain = max(plain, difference([literal(s, 5, name).double()], [true]))
    return ours, plain


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (64, 8)], ids=str)
def test_float32_is_as_good_as_the_literal_loop_in_float32(
    shape: tuple[int, int], coefficients: str
) -> None:
    ours, plain = float32_errors(shape, 10.0, coefficients)
    assert ours < 3 * plain
    # A Gram matrix holds squares: what is 1e4 times smaller than the largest loses digits there,
    # measured up to 4e-3 of the largest entry, the resolution of bfloat16.
    ours, plain = float32_errors(shape, 1e4, coefficients)
    assert ours < (2 * plain if shape[0] == shape[1] else 1e-2)


def test_polar_express_brings_every_singular_value_to_one() -> None:
    for shape in ((6, 6), (4, 20), (20, 4)):
        u, _, v = torch.linalg.svd(draw(*shape), full_matrices=False)
        s = u * torch.logspace(0, -2, min(shape), dtype=torch.float64) @ v
        out = newton_schulz(s, steps=8, coefficients="polar_express")
        torch.testing.assert_close(
            torch.linalg.svdvals(out), torch.ones(min(shape)).double(), rtol=0, atol=1e-6
        )
        # ... and keeps the singular vectors: it is the polar factor.
        assert difference([out], [u @ v]) < 1e-6


def test_jordan_brings_singular_values_near_one() -> None:
    u, _, v = torch.linalg.svd(draw(8, 8), full_matrices=False)
    s = u * torch.logspace(0, -1.5, 8, dtype=torch.float64) @ v
    values = torch.linalg.svdvals(newton_schulz(s))
    assert values.min() > 0.6
    assert values.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    s = draw(4, 6).to(dtype)
    out = newton_schulz(s)
    assert out.dtype == dtype
    true = newton_schulz(s.double())
    assert difference([out.double()], [true]) < torch.finfo(dtype).eps + 1e-4


def test_keeps_only_its_input_for_the_backward() -> None:
    saved = []
    s = draw(10, 8, 8).requires_grad_()

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        newton_schulz(s, steps=5)
    assert sum(saved) <= s.numel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s": torch.zeros(3)}, r"s: expected a tensor \[\.\.\., m, n\], got torch.Size\(\[3\]\)"),
        ({"s": [[1.0]]}, r"s: expected a tensor \[\.\.\., m, n\], got list"),
        ({"steps": -1}, "steps: expected an int >= 0, got -1"),
        ({"steps": 2.5}, "steps: expected an int >= 0, got 2.5"),
        (
            {"coefficients": "best"},
            "coefficients: expected one of jordan, polar_express, got 'best'",
        ),
        ({"gradient": "none"}, "gradient: expected one of exact, straight_through, got 'none'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        newton_schulz(**{"s": torch.eye(3), **arguments})
