"""The short convolution equals its plain sum, forward and backward."""

import torch
import torch.nn.functional as F

from atlas_blocks.blocks.causal_conv import causal_conv


def draw(*size):
    g = torch.Generator().manual_seed(0)
    return torch.randn(*size, generator=g, dtype=torch.float64).requires_grad_()


def test_it_equals_a_grouped_conv1d():
    reach, weight = draw(2, 11, 5), draw(4, 5)
    true = F.conv1d(reach.mT, weight.T.unsqueeze(1), groups=5).mT
    ours = causal_conv(reach, weight)
    assert torch.allclose(ours, true, rtol=1e-12, atol=1e-12)


def test_its_gradient():
    assert torch.autograd.gradcheck(causal_conv, (draw(2, 7, 3), draw(4, 3)))
    assert torch.autograd.gradcheck(causal_conv, (draw(1, 3, 2), draw(4, 2)))  # no token


def test_compiled_it_is_the_plain_sum():
    torch._dynamo.reset()
    reach, weight = draw(2, 11, 5), draw(4, 5)
    compiled = torch.compile(causal_conv, backend="aot_eager", fullgraph=True)
    true = torch.autograd.grad(causal_conv(reach, weight).square().sum(), (reach, weight))
    ours = torch.autograd.grad(compiled(reach, weight).square().sum(), (reach, weight))
    for a, b in zip(ours, true, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
