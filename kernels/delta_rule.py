"""The gated delta rule of flash-linear-attention as a provider of `atlas::omega_rule`.

For a matrix memory, "l2", gradient descent, a window of one, no momentum, and each error as the
memory just before its token leaves it (online errors, or one token a chunk), with w_t = eta^_t
gamma_t the rule is

    M_t = alpha_t M_{t-1} - w_t (M_{t-1} k_t - v_t) k_t^T,    y_t = M_t q_t.

Theirs takes the error after the decay; its state is the transpose of M, and g the log of a decay:

    M_t = a_t M_{t-1} - beta_t (a_t M_{t-1} k_t - v'_t) k_t^T,    a_t = exp(g_t).

So a = alpha, beta = w / alpha and v' = alpha v give ours; eta^_t = eta_t / max(1, w_t |k_t|^2) for
online errors, else eta_t. Their kernels take 64 tokens at a time,
where ours walk one after the other. alpha's gradient carries their rounding times w / alpha, of
which a sigmoid's logit sees w: it takes alpha (1 - alpha) of that gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion

from atlas_blocks.documents.definition import document_bounds
from atlas_blocks.graph.contract import own
from atlas_blocks.graph.providers import Provider
from atlas_blocks.kernels.tiles import no_device
from atlas_blocks.omega.arguments import Arguments, first_state
from atlas_blocks.omega.definition import run
from atlas_blocks.omega.op import OmegaCall, Settings, unflatten
from atlas_blocks.omega.state import OmegaState

LARGEST_KEY = 256  # their kernels'
# alpha = 0 has neither a log nor an inverse. What a decay of this much leaves is lost in the
# rounding of tf32 and bfloat16, and 1 / alpha takes no precision from beta.
LEAST_ALPHA = 1e-4


def _supports(call: OmegaCall) -> str | None:
    rule = call.rule
    for name, value, served in (
        ("memory", rule.memory, "matrix"),
        ("objective", rule.objective, "l2"),
        ("update", rule.update, "gd"),
        ("feature map", call.feature_map, "identity"),
        ("momentum", call.momentum, False),
        ("window", rule.window, 1),
        ("decay_to", rule.decay_to, "zero"),
        ("chunk_size", 1 if rule.errors == "online" else rule.chunk_size, 1),
    ):
        if value != served:
            return f"it is the delta rule, {name} {served}, not {value}"
    for name, value, kept in (
        ("dtype of q", call.dtype, (torch.bfloat16, torch.float32)),
        ("state dtype", call.state_dtype, (torch.float32,)),
    ):
        if value not in kept:
            return f"{name} {value} is not served, only {' and '.join(map(str, kept))}"
    if call.key_width > LARGEST_KEY:
        return f"key width {call.key_width} is beyond the kernels' {LARGEST_KEY}"
    if call.device != "cuda":
        return f"it needs a CUDA device, not {call.device}"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install 'atlas-blocks[fla]')"
    reason = no_device(call.device, call.dtype)
    if reason is None and call.needs_grad and _backward_is_broken():
        return (
            f"its backward refuses a Hopper GPU with Triton {triton.__version__} (3.7.1 mends it)"
        )
    return reason


def _backward_is_broken() -> bool:
    """fla.ops.common.chunk_o raises there, because Triton computed a gradient wrongly."""
    hopper = torch.cuda.get_device_capability()[0] == 9
    return hopper and "3.4" <= TorchVersion(triton.__version__) < "3.7.1"


def _gated_delta_rule() -> Callable[..., tuple[Tensor, Tensor]]:
    # Imported here: it brings all of flash-linear-attention, which warns where there is no GPU.
    return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule


def _rule(a: Arguments) -> tuple[Tensor, OmegaState]:
    """The rule under autograd. float64 inputs stay so, for kernels that take them."""
    if 0 in a.q.shape[:2]:
        return run(a)  # nothing to launch
    before, length, packed = a.state or first_state(a), a.q.shape[1], None
    if a.cu_seqlens is not None:
        document_bounds(a.cu_seqlens, length)
        packed = a.cu_seqlens.to(a.q.device, torch.int64)
    (m,) = before.chunk_start if a.rule.rewinds else before.weights
    alpha = a.alpha.to(m.dtype).clamp(min=LEAST_ALPHA)
    write = (a.eta * a.gamma[..., 0]).to(m.dtype)
    if a.rule.limits:
        # The scale is |k|^2, also where gamma is 0 and nothing is written.
        write = write / (write * a.k.to(m.dtype).square().sum(-1)).clamp(min=1)
    dtype = torch.promote_types(a.q.dtype, torch.promote_types(a.k.dtype, a.v.dtype))
    y, after = _gated_delta_rule()(
        q=a.q.to(dtype),
        k=a.k.to(dtype),
        v=(alpha[..., None] * a.v).to(dtype),
        g=alpha.log(),
        beta=write / alpha,
        scale=1.0,
        initial_state=m.mT.contiguous(),
        output_final_state=True,
        cu_seqlens=packed,
    )
    m = after.mT
    position = before.position + (length if packed is None else packed.diff())
    # No history: neither a window nor, where chunks are of one token, a chunk to begin again.
    start = (m,) if a.rule.rewinds else ()
    state = before.replace(weights=(m,), chunk_start=start, position=position)
    return y.to(a.q.dtype), state


def _forward(tensors: list[Tensor], settings: Settings, save: bool) -> list[Tensor]:
    with torch.no_grad():
        y, state = _rule(unflatten(tensors, settings))
        return [own(t) for t in (y, *state.tensors())]


def _backward(
    grads: list[Tensor], tensors: list[Tensor], saved: list[Tensor], settings: Settings
) -> list[Tensor]:
    """Forward once more: the memory at every token, which others save, is more than all else."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in leaves if t.requires_grad]
    with torch.enable_grad():
        y, state = _rule(unflatten(leaves, settings))
    *floats, _ = state.tensors()  # the position has no gradient
    pairs = [(t, g) for t, g in zip((y, *floats), grads, strict=True) if t.requires_grad]
    outputs, gradients = zip(*pairs, strict=True)
    found: Any = torch.autograd.grad(outputs, wanted, gradients, materialize_grads=True)
    return [own(g) for g in found]


PROVIDER = Provider("fla", _supports, _forward, _backward, saves=False)
