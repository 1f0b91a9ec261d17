"""Feature maps: the exact kernel identity, the sketch's expectation, gradients, dtypes."""

import math

import pytest
import torch
from helpers import difference
from torch import Tensor
from torch.autograd import gradcheck

from atlas_blocks.functional import (
    PolynomialMap,
    SketchMap,
    polynomial_features,
    polynomial_width,
    sketch_features,
    sketch_tables,
    taylor_coefficients,
)
from atlas_blocks.omega.feature_maps import monomial_scales, sketch_tables_for


def draw(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def coefficients_of(degree: int) -> Tensor:
    return 0.2 + torch.rand(degree + 1, generator=torch.Generator().manual_seed(3)).double()


def kernel(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    """sum_n a_n (x . y)^n for x [..., m, D], y [..., n, D]."""
    dots = x @ y.mT
    return sum((a[n] * dots**n for n in range(len(a))), start=torch.zeros_like(dots))


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_features_have_exactly_the_kernel(dim: int, degree: int) -> None:
    x, y, a = draw(2, 7, dim), draw(2, 6, dim, seed=1), coefficients_of(degree)
    f, g = polynomial_features(x, a), polynomial_features(y, a)
    assert f.shape == (2, 7, math.comb(dim + degree, degree))
    assert polynomial_width(dim, degree) == f.shape[-1]
    assert difference([f @ g.mT], [kernel(x, y, a)]) < 1e-12
    shortcut = PolynomialMap(a)
    assert shortcut.width_of(dim) == f.shape[-1]
    assert difference([shortcut.kernel(x, y)], [kernel(x, y, a)]) < 1e-12
    assert torch.equal(shortcut(x), f)


def test_float32_coefficients_do_not_cost_float64_features_their_precision() -> None:
    x, y, a = draw(7, 3), draw(6, 3, seed=1), taylor_coefficients(3)
    phi = PolynomialMap(a)
    assert difference([phi(x) @ phi(y).mT], [phi.kernel(x, y)]) < 1e-12


def test_every_monomial_comes_once() -> None:
    """The width is the least that has the kernel: the features are linearly independent."""
    f = polynomial_features(draw(200, 3), torch.ones(4).double())
    assert torch.linalg.matrix_rank(f) == f.shape[-1] == 20


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_polynomial_gradcheck_with_its_coefficients(degree: int) -> None:
    x, a = draw(2, 3).requires_grad_(), coefficients_of(degree).requires_grad_()
    assert gradcheck(polynomial_features, (x, a))
    y = draw(4, 3, seed=1).requires_grad_()
    assert gradcheck(lambda x, y, a: PolynomialMap(a).kernel(x, y), (x, y, a))


def test_a_coefficient_of_zero_drops_its_degree_and_has_a_finite_gradient() -> None:
    x, y = draw(5, 3), draw(4, 3, seed=1)
    a = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    f, g = polynomial_features(x, a), polynomial_features(y, a)
    assert difference([f @ g.mT], [1 + 0.5 * (x @ y.mT) ** 2]) < 1e-13
    assert not f[:, 1:4].any()
    f.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad[1] == 0
    assert a.grad[2] != 0


def test_taylor_coefficients_make_the_exponential() -> None:
    x, y = draw(6, 4), draw(6, 4, seed=1)
    x, y = (t / t.norm(dim=-1, keepdim=True) for t in (x, y))
    for degree in range(5):
        phi = PolynomialMap(taylor_coefficients(degree).double())
        gap = (phi(x) @ phi(y).mT - (x @ y.mT).exp()).abs().max()
        # The remainder for |x . y| <= 1; the coefficients are float32.
        assert gap <= math.e / math.factorial(degree + 1) + 1e-6


def sketches(tables: int, width: int, a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Kernels of `tables` sketches [tables, m, n]."""
    found = []
    for seed in range(tables):
        phi = SketchMap(a, *sketch_tables(x.shape[-1], width, len(a) - 1, seed), width)
        found.append(phi(x) @ phi(y).mT)
    return torch.stack(found)


@pytest.mark.parametrize(("degree", "width"), [(2, 9), (2, 40), (3, 16)])
def test_the_mean_of_many_sketches_is_the_kernel(degree: int, width: int) -> None:
    x, y, a = draw(4, 5), draw(3, 5, seed=1), coefficients_of(degree)
    found = sketches(1500, width, a, x, y)
    error = found.mean(0) - kernel(x, y, a)
    standard = found.std(0) / len(found) ** 0.5
    assert (error.abs() < 5 * standard).all()
    # No miracle of an enormous spread: a standard error is small beside the kernel.
    assert (standard < 0.1 * kernel(x, x, a).diagonal().max()).all()


def test_wider_sketches_spread_less() -> None:
    x, y, a = draw(4, 5), draw(3, 5, seed=1), coefficients_of(2)
    narrow, wide = (sketches(300, width, a, x, y).std(0).mean() for width in (14, 134))
    # 8 and 128 buckets for degree two: a quarter, were the spread exactly 1 / sqrt(buckets).
    assert 0.15 < wide / narrow < 0.4


def test_constant_and_linear_part_of_a_sketch_are_exact() -> None:
    x, y = draw(4, 5), draw(3, 5, seed=1)
    a = torch.tensor([0.7, 1.3, 0.0], dtype=torch.float64)
    for found in sketches(5, 9, a, x, y):
        assert difference([found], [0.7 + 1.3 * x @ y.mT]) < 1e-14


def test_a_sketch_is_the_circular_convolution_of_count_sketches() -> None:
    dim, width, a = 4, 12, coefficients_of(2)
    buckets, signs = sketch_tables(dim, width, 2, 2)
    x, size = draw(dim), width - 1 - dim
    counts = torch.zeros(2, size, dtype=torch.float64)
    for n in range(2):
        for i in range(dim):
            counts[n, buckets[n, i]] += signs[n, i] * x[i]
    second = torch.zeros(size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            second[(i + j) % size] += counts[0, i] * counts[1, j]
    true = torch.cat([a[:1].sqrt(), a[1].sqrt() * x, a[2].sqrt() * second])
    assert difference([sketch_features(x, a, buckets, signs, width)], [true]) < 1e-13


def test_tables_depend_on_their_arguments_alone() -> None:
    """Checkpoints do not hold them: these numbers may never change."""
    buckets, signs = sketch_tables(4, 12, 3, seed=0)
    assert buckets.tolist() == [
        [1, 3, 0, 2], [2, 2, 2, 3], [1, 0, 0, 2], [1, 1, 2, 1], [0, 2, 0, 2]
    ]  # fmt: skip
    assert signs.tolist() == [
        [1, 1, 1, -1], [1, 1, -1, 1], [1, 1, 1, -1], [1, 1, 1, -1], [1, -1, 1, 1]
    ]  # fmt: skip
    torch.manual_seed(1)
    with torch.device("meta"):
        again = sketch_tables(4, 12, 3)
    assert torch.equal(again[0], buckets)
    assert torch.equal(again[1], signs)
    assert not torch.equal(sketch_tables(4, 12, 3, seed=1)[0], buckets)


def test_tables_alone_decide_a_sketch() -> None:
    a, x = coefficients_of(3), draw(6, 5)
    first, again, other = (sketch_tables(5, 16, 3, seed) for seed in (1, 1, 2))
    torch.manual_seed(4)
    f = sketch_features(x, a, *first, 16)
    torch.manual_seed(5)
    assert torch.equal(sketch_features(x, a, *again, 16), f)
    assert not torch.equal(sketch_features(x, a, *other, 16), f)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_vectors_have_no_features(shape: tuple[int, ...]) -> None:
    phi = SketchMap(coefficients_of(2), *sketch_tables(5, 16, 2), 16)
    assert phi(torch.zeros(shape)).shape == (*shape[:-1], 16)


def test_sketch_gradcheck_with_its_coefficients() -> None:
    tables = sketch_tables(3, 12, 3, 1)
    x, a = draw(2, 3).requires_grad_(), coefficients_of(3).requires_grad_()
    assert gradcheck(lambda x, a: sketch_features(x, a, *tables, 12), (x, a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_features_have_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    x = (0.5 * draw(6, 5)).to(dtype)
    tables = sketch_tables(5, 16, 2, 1)
    for phi in (
        PolynomialMap(taylor_coefficients(3)),
        SketchMap(taylor_coefficients(2), *tables, 16),
    ):
        f = phi(x)
        assert f.dtype == dtype
        # A feature is a few products of rounded numbers.
        assert difference([f.double()], [phi(x.double())]) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: taylor_coefficients(-1), "degree: expected an int >= 0, got -1"),
        (
            lambda: polynomial_features(torch.ones(3), torch.ones(2, 2)),
            r"coefficients: expected shape \[p \+ 1\] = \[any\], got \[2, 2\]",
        ),
        (
            lambda: polynomial_features(torch.ones(3), torch.ones(0)),
            "coefficients' length: expected an int >= 1, got 0",
        ),
        (lambda: sketch_tables(5, 16, 1), "degree: expected an int >= 2, got 1"),
        (lambda: sketch_tables(5, 16, 2, seed=-1), "seed: expected an int >= 0, got -1"),
        (
            lambda: sketch_tables(5, 6, 2),
            r"sketch width: expected at least 1 \+ D \+ \(degree - 1\) = 7, got 6",
        ),
        (
            lambda: sketch_features(torch.ones(4), torch.ones(3), *sketch_tables(5, 16, 2), 16),
            r"buckets: expected shape \[F, D\] = \[2, 4\], got \[2, 5\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_first_made_inside_of_torch_func_serves_outside() -> None:
    """A tensor of a level of torch.func that has ended works in some places and not in others."""

    def made(x: Tensor) -> tuple[Tensor, ...]:
        scales = monomial_scales(11, 3, torch.float64, x.device)
        return scales, *sketch_tables_for(x, 11, 24, 3, 5)

    x = draw(5, 11)
    torch.func.grad(lambda x: sum((t * x[0, 0]).sum() for t in made(x)))(x)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in made(x))
