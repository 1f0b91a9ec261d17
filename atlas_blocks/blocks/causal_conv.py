"""Causal depthwise convolution over a few tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.derivatives import transformed


def causal_conv(reach: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_i weight[i] * reach_{t+i}, a channel at a time.

    reach: [B, width - 1 + T, C], the tokens with the width - 1 before them; weight: [width, C].
    Returns [B, T, C].
    """
    if torch.compiler.is_compiling() or transformed():
        # A compiler fuses the plain sum.
        length = reach.shape[1] - weight.shape[0] + 1
        first, *rest = (w * reach[:, i : i + length] for i, w in enumerate(weight.unbind()))
        return sum(rest, first)
    return _CausalConv.apply(reach, weight)


class _CausalConv(torch.autograd.Function):
    """Sums of shifted products in place: on a CPU several times as fast as a grouped conv1d."""

    @staticmethod
    def forward(ctx: Any, reach: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(reach, weight)
        width = weight.shape[0]
        length = reach.shape[1] - width + 1
        y = weight[0] * reach[:, :length]
        for i in range(1, width):
            y.addcmul_(weight[i], reach[:, i : i + length])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (reach, weight) = grads, ctx.saved_tensors
        length, width = grad.shape[1], weight.shape[0]
        if torch.is_grad_enabled():  # a second derivative may be asked for
            parts = [reach[:, i : i + length] for i in range(width)]
            back = [F.pad(w * grad, (0, 0, i, width - 1 - i)) for i, w in enumerate(weight)]
            of_weight = torch.stack([(grad * part).sum((0, 1)) for part in parts])
            return torch.stack(back).sum(0), of_weight
        grad_reach, grad_weight = torch.zeros_like(reach), torch.empty_like(weight)
        product = torch.empty_like(grad)
        for i in range(width):
            shifted = slice(i, i + length)
            grad_reach[:, shifted].addcmul_(weight[i], grad)
            grad_weight[i] = torch.mul(grad, reach[:, shifted], out=product).sum((0, 1))
        return grad_reach, grad_weight
