"""The Triton provider of Newton-Schulz is the plain iteration, forward and backward."""

import pytest
import torch
from helpers import difference, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atlas_blocks import ops
from atlas_blocks.newton_schulz.definition import COEFFICIENTS, EPS, triples
from atlas_blocks.newton_schulz.op import NewtonSchulzCall

pytest.importorskip("triton")
from atlas_blocks.kernels import newton_schulz as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of float32 under the interpreter, of tf32 on a GPU: one rounding is magnified 485 times in the
# values, and about as much again in the gradients.
ROUNDING = (5e-2, 2e-1) if DEVICE == "cuda" else (1e-4, 1e-3)


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def plain(s: Tensor, steps: int, coefficients: str) -> Tensor:
    """The iteration as it is printed, for autograd."""
    if s.shape[-2] > s.shape[-1]:
        return plain(s.mT, steps, coefficients).mT
    x = s / (torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True) + EPS)
    for a, b, c in triples(steps, coefficients):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def value_and_gradient(f, s: Tensor) -> list[Tensor]:
    s = s.detach().clone().requires_grad_()
    u = f(s)
    (u.double() * draw(*s.shape, seed=7).to(s.device)).sum().backward()
    assert s.grad is not None
    return [u.detach().double(), s.grad.double()]


def results(s: Tensor, **options) -> list[list[Tensor]]:
    """Value and gradient by the kernels, by plain autograd in float32 and in float64."""
    plainly = {k: options.get(k, d) for k, d in (("steps", 5), ("coefficients", "jordan"))}
    return [
        value_and_gradient(lambda x: ops.newton_schulz(x, provider="triton", **options), s),
        value_and_gradient(lambda x: plain(x, **plainly), s.float()),
        value_and_gradient(lambda x: plain(x, **plainly), s.double()),
    ]


def assert_equals_the_plain_iteration(s: Tensor, rounding: float = 0.0, **options) -> None:
    for a, b, true, bound in zip(*results(s, **options), ROUNDING, strict=True):
        assert difference([a], [true]) < 2 * difference([b], [true]) + bound + rounding


@settings(max_examples=10)
@given(
    count=st.sampled_from(((), (1,), (3,), (2, 2))),
    shape=st.sampled_from(((16, 16), (1, 1), (3, 5), (5, 3), (17, 9), (8, 150), (150, 20))),
    steps=st.sampled_from((0, 1, 5, 7)),
    coefficients=st.sampled_from(sorted(COEFFICIENTS)),
    scale=st.sampled_from((1e-3, 1.0, 1e6)),
    seed=st.integers(0, 9),
)
def test_equals_the_plain_iteration(count, shape, steps, coefficients, scale, seed):
    s = (scale * draw(*count, *shape, seed=seed)).float().to(DEVICE)
    assert_equals_the_plain_iteration(s, steps=steps, coefficients=coefficients)


@pytest.mark.parametrize(
    ("chip", "shape", "forward", "backward"),
    [
        (80, (20, 130), "_streamed_forward", "_tiled_backward"),
        (80, (64, 40), "_resident_forward", "_tiled_backward"),
        (90, (64, 64), "_resident_forward", "_resident_backward"),
        (90, (130, 20), "_streamed_forward", "_streamed_backward"),
        (90, (66, 70), "_streamed_forward", "_tiled_backward"),
        (100, (20, 130), "_streamed_forward", "_streamed_backward"),
    ],
    ids=str,
)
def test_every_kernel_on_the_chips_that_take_it(monkeypatch, chip, shape, forward, backward):
    monkeypatch.setattr(kernels, "chip", lambda: chip)
    m, n = sorted(shape)
    assert kernels._forward_plan(m, n).kernel is getattr(kernels, forward)
    assert kernels._backward_plan(m, n).kernel is getattr(kernels, backward)
    assert_equals_the_plain_iteration(draw(1, *shape).float().to(DEVICE), steps=2)


@pytest.mark.parametrize("shape", [(16, 16), (20, 130)], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_zero_gives_zero_and_rank_one_is_finite(shape, gradient):
    s = draw(4, *shape).float().to(DEVICE)
    s[1] = 0
    s[2] = torch.outer(s[0, :, 0], s[0, 0])
    s[3] *= 1e-30
    u, found = value_and_gradient(
        lambda x: ops.newton_schulz(x, gradient=gradient, provider="triton"), s
    )
    assert u.isfinite().all()
    assert found.isfinite().all()
    assert not u[1].any()
    assert not found[1].any()
    assert found[0].any()
    assert 0.6 < torch.linalg.svdvals(u[2])[0] < 1.3


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 130, 20)], ids=str)
def test_straight_through_is_the_gradient_of_the_normalisation(shape):
    s = draw(*shape).float().to(DEVICE)
    ours = value_and_gradient(
        lambda x: ops.newton_schulz(x, gradient="straight_through", provider="triton"), s
    )
    true = [value_and_gradient(lambda x, k=k: plain(x, k, "jordan"), s.double()) for k in (5, 0)]
    assert difference(ours, [true[0][0], true[1][1]]) < ROUNDING[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 16), (20, 130)], ids=str)
def test_sixteen_bits_are_rounded_once(shape, dtype):
    """What comes back is the float32 result, rounded."""
    s = draw(2, *shape).to(dtype).to(DEVICE)
    assert_equals_the_plain_iteration(s, torch.finfo(dtype).eps, steps=3)


@pytest.mark.slow(compile_nodes=False)
def test_more_matrices_than_programs_share_the_scratch(monkeypatch):
    """Each takes the scratch after another."""
    monkeypatch.setattr(kernels, "_programs", lambda s: 2)
    for chip in (80, 90):  # tiled, streamed
        monkeypatch.setattr(kernels, "chip", lambda chip=chip: chip)
        assert_equals_the_plain_iteration(draw(5, 10, 130).float().to(DEVICE), steps=1)


def test_views_and_empty_batches():
    s = draw(3, 16, 20).float().to(DEVICE)
    assert_equals_the_plain_iteration(s.transpose(0, 1)[:, :, :7])
    assert ops.newton_schulz(s[:0], provider="triton").shape == (0, 16, 20)
    u, found = value_and_gradient(lambda x: ops.newton_schulz(x, provider="triton"), s[:0])
    assert u.shape == found.shape == (0, 16, 20)


def test_what_it_does_not_serve_it_says(monkeypatch):
    monkeypatch.setattr(kernels, "chip", lambda: 80)
    for s, reason in (
        (torch.zeros(70, 150), "spills registers on compute capability 8"),
        (torch.zeros(130, 200), "smaller side 130 is beyond the kernels' 128"),
        (torch.zeros(4, 4, dtype=torch.float64), "dtype torch.float64 has no kernel"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.newton_schulz(s.to(DEVICE), provider="triton")
    assert kernels.PROVIDER.supports(NewtonSchulzCall(DEVICE, torch.float32, 64, 64, True)) is None
