"""Layers in float16 and bfloat16, tokens that are zero, and norms that are one in every dtype."""

import pytest
import torch
from helpers import BLOCKS, DIM, draw, make_block
from torch import Tensor

from atlas_blocks import AtlasMemory, AtlasMemoryConfig, DeepTransformerLayer
from atlas_blocks.blocks.norm import RMSNorm, rms_norm, unit_length

every_block = pytest.mark.parametrize("name", BLOCKS)
# Their norms stand before and after: at zero the derivative of each is 1 / sqrt(eps) = 2.9e3.
STACKS = ("block", "as")
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def with_zeros(x: Tensor) -> Tensor:
    """Six zero tokens at the front, as left padding gives, and one in the middle."""
    x = x.clone()
    x[:, :6] = 0
    x[:, 9] = 0
    return x


@every_block
@halves
def test_zero_tokens_leave_every_output_and_gradient_finite(name: str, dtype: torch.dtype) -> None:
    block = make_block(name, dtype)
    x = with_zeros(draw(2, 20, DIM, dtype=dtype)).requires_grad_()
    y, state = block(x)
    assert y.isfinite().all()
    y.float().square().mean().backward()
    for p in block.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all() or (name.startswith(STACKS) and dtype == torch.float16)
    assert all(t.isfinite().all() for t in (state.tensors() if state is not None else ()))
    assert block(torch.zeros_like(x))[0].isfinite().all()


@every_block
def test_a_half_precision_layer_is_near_the_layer_of_its_weights(name: str) -> None:
    """Within what bfloat16 makes of it: it has eight times coarser numbers."""
    low = make_block(name, torch.float16)
    x = draw(2, 45, DIM, dtype=torch.float16)
    y = low(x)[0]
    true = make_block(name, torch.float16).double()(x.double())[0]
    coarse = make_block(name, torch.float16).bfloat16()(x.bfloat16())[0]
    error, bound = ((t.double() - true).norm() for t in (y, coarse))
    assert y.dtype == torch.float16
    assert error < bound


@pytest.mark.parametrize("name", [n for n in BLOCKS if not n.startswith(STACKS)])
def test_zero_tokens_get_no_enormous_gradient(name: str) -> None:
    block = make_block(name, torch.float32)
    x = draw(1, 16, DIM, dtype=torch.float32)
    x[:, :8] = 0
    x.requires_grad_()
    y, _ = block(x)
    (y * draw(*y.shape, seed=5, dtype=torch.float32)).sum().backward()
    assert x.grad is not None
    assert x.grad[:, :8].abs().max() < 100 * x.grad[:, 8:].abs().max()


@pytest.mark.parametrize("kind", [AtlasMemory, DeepTransformerLayer])
def test_zero_tokens_get_no_enormous_gradient_at_full_size(kind: type) -> None:
    block, x = kind(64, 4), torch.randn(1, 16, 64)
    x[:, :8] = 0
    x.requires_grad_()
    y, _ = block(x)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    assert x.grad[:, :8].abs().max() < 1e4


def test_unit_length_is_its_formula_in_every_dtype() -> None:
    x = draw(5, 4, 8) * torch.tensor([0.0, 1e-3, 1.0, 200.0])[:, None]
    true = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        found = unit_length(x.to(dtype))
        assert found.dtype == dtype
        # Half a unit in the last place for x, another for the result.
        torch.testing.assert_close(found.double(), true, atol=1e-4, rtol=3 * torch.finfo(dtype).eps)
    assert torch.equal(unit_length(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-3, 1.0, 3e3])
def test_norms_are_one_function_in_every_dtype(scale: float) -> None:
    """float16 squares of 3e3 are infinite, those of 1e-4 zero; eps did differ by dtype."""
    x, norm = scale * draw(5, 8), RMSNorm(8)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    true = x * (x.square().mean(-1, keepdim=True) + 2**-23).rsqrt() * norm.weight.double()
    others = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tolerance = {"atol": 1e-3, "rtol": 4 * torch.finfo(dtype).eps}
        low = norm.to(dtype)
        torch.testing.assert_close(low(x.to(dtype)).double(), true, **tolerance)
        found = rms_norm(x.to(dtype), low.weight)
        torch.testing.assert_close(found.double(), others, **tolerance)
        norm = norm.double()


def test_a_layer_of_recipes_is_near_itself_in_float16() -> None:
    config = AtlasMemoryConfig(update="gd")
    block, x = AtlasMemory(64, 4, config), with_zeros(torch.randn(1, 40, 64))
    true = block(x)[0]
    found = block.half()(x.half())[0]
    assert (found - true).norm() < 0.01 * true.norm()
