"""Layers in float16 and bfloat16, tokens that are zero, and norms that are one in every dtype."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BLOCKS, DIM, draw, make_block
from torch import Tensor

from atlas_blocks import AtlasMemory, AtlasMemoryConfig, DeepTransformerLayer
from atlas_blocks.blocks.norm import RMSNorm, rms_norm, unit_length
from atlas_blocks.recipes import build

every_block = pytest.mark.parametrize("name", BLOCKS)
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
    assert x.grad.isfinite().all()
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


@every_block
def test_zero_tokens_get_no_enormous_gradient(name: str) -> None:
    block = make_block(name, torch.float32)
    x = draw(1, 16, DIM, dtype=torch.float32)
    x[:, :8] = 0
    x.requires_grad_()
    y, _ = block(x)
    (y * draw(*y.shape, seed=5, dtype=torch.float32)).sum().backward()
    assert x.grad is not None
    # Sink tokens make small numbers of zeros, which the next norm enlarges a hundredfold.
    assert x.grad[:, :8].abs().max() < 200 * x.grad[:, 8:].abs().max()


@pytest.mark.parametrize("kind", [AtlasMemory, DeepTransformerLayer])
def test_zero_tokens_get_no_enormous_gradient_at_full_size(kind: type) -> None:
    block, x = kind(64, 4), torch.randn(1, 16, 64)
    x[:, :8] = 0
    x.requires_grad_()
    y, _ = block(x)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    assert x.grad[:, :8].abs().max() < 1e4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["transformer", "atlas-mag", "atlas-mal", "titans-mac", "samba"])
def test_zero_tokens_in_many_layers_get_gradients_as_others_do(
    name: str, dtype: torch.dtype
) -> None:
    """Norms in series, each with 1 / sqrt(eps) for a derivative, gave 1e50 or NaN here."""
    torch.manual_seed(0)
    model = build(f"{name}-tiny", depth=8).to(dtype)
    with torch.no_grad():
        model.embedding.weight[0] = 0
    tokens = torch.randint(1, 256, (1, 24))
    tokens[:, :8] = 0
    found = []
    hook = model.embedding.register_forward_hook(lambda m, args, y: found.append(y))
    logits = model(tokens).logits
    hook.remove()
    loss = F.cross_entropy(logits[0, 8:-1].float(), tokens[0, 9:])
    x, *others = torch.autograd.grad(loss, [found[0], *model.parameters()])
    assert all(t.isfinite().all() for t in others)
    assert 0 < x[:, :8].abs().max() < 10 * x[:, 8:].abs().max()


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0])
def test_a_norm_is_torchs_but_for_the_gradient_of_zero_rows(scale: float) -> None:
    x, weight = scale * torch.randn(6, 8), torch.rand(8) + 0.5
    x[2] = x[4] = 0
    x[4, 3] = scale  # one number is enough for a row
    norm = RMSNorm(8)
    norm.load_state_dict({"weight": weight})
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, true = norm(ours), F.rms_norm(theirs, (8,), weight, norm.eps)
    assert torch.equal(y, true)
    y.sum().backward()
    true.sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    rows = [0, 1, 3, 4, 5]
    assert torch.equal(ours.grad[rows], theirs.grad[rows])
    torch.testing.assert_close(ours.grad[2], weight)


def test_norms_leave_a_row_of_zeros_a_gradient_of_size_one() -> None:
    x, norm, scale = torch.zeros(3, 8, requires_grad=True), RMSNorm(8), torch.ones(8)
    for y in (norm(x), rms_norm(x, scale), unit_length(x)):
        assert torch.equal(y, torch.zeros(3, 8))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, torch.ones(3, 8))


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
