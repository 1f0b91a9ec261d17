"""The Triton provider of `atlas::omega_rule_step`: a matrix memory, update="gd", one token.

    e_j = M phi(k_{t-j}) - v_{t-j}  ("l2"),  -v_{t-j}  ("dot")        j < c
    S <- theta S + sum_j gamma_j e_j phi(k_{t-j})^T      M <- alpha M - eta^ S      y = M phi(q)

and + (1 - alpha) M_0 in M where decay leads there.

It serves rules whose errors are those at the memory before the token: chunks of one token, a window
of one with online errors, and "dot". (A rule that rewinds does its begun chunk again for every
token, which no step in place can be.) One program per row, head and block of V holds its rows of M
and S; features, history and eta^ are a few small PyTorch operations. Nothing is read back to the
host and no shape depends on data: a CUDA graph can hold a step. Everything is float32 and no
product is a tensor core's.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.graph.providers import Provider
from atlas_blocks.kernels.tiles import INTERPRETED, ceil_div, launch, padded, unknown
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.feature_maps import FeatureMap, PolynomialMap, monomial_scales, monomials
from atlas_blocks.omega.online import MAX_THETA
from atlas_blocks.omega.op import Settings
from atlas_blocks.omega.step_op import StepCall, arguments, no_backward

# The window's errors stay in registers; a matrix is addressed with 32 bits.
LARGEST_WINDOW, LARGEST_VALUE, LARGEST_FEATURES = 64, 256, 8192
WARPS, VALUES = 4, 8


@triton.jit
def _step(
    q, k, v, alpha, eta, theta, gamma, weights, momentum, initial, y,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    L2: tl.constexpr, MOMENTUM: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """k, v: phi(k), v of the window [B, c, H, D | V]; SPAN: c padded; BD: block of D.

    A tile [BV, BD] has no fewer entries than the program has threads, so that each lies in one
    thread, and what one thread writes no other has yet to read.
    """
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    here = tl.program_id(0).to(tl.int64)
    c, b = tl.load(alpha + here), tl.load(eta + here)
    g = tl.arange(0, BV) + tl.program_id(1) * BV
    lag, d = tl.arange(0, SPAN), tl.arange(0, BD)
    # Token t; token t - j lies j H before it.
    last = (row.to(tl.int64) * WINDOW + WINDOW - 1) * H + head
    weights += here * V * D
    if MOMENTUM:
        momentum += here * V * D
        th = tl.load(theta + here)
    inside = (g < V)[:, None] & (lag < WINDOW)[None, :]
    e = -tl.load(v + last * V + g[:, None] - (lag * H * V)[None, :], mask=inside, other=0.0)
    if L2:
        for i in range(TILES):
            x_in = d + i * BD < D
            at, both = g[:, None] * D + (d + i * BD)[None, :], (g < V)[:, None] & x_in[None, :]
            m = tl.load(weights + at, mask=both, other=0.0)
            for j in range(WINDOW):
                x = tl.load(k + (last - j * H) * D + d + i * BD, mask=x_in, other=0.0)
                product = tl.sum(m * x[None, :], 1)
                e += tl.where(lag[None, :] == j, product[:, None], 0.0)
        tl.debug_barrier()  # all of M is read before any is written
    e *= tl.load(gamma + here * WINDOW + lag, mask=lag < WINDOW, other=0.0)[None, :]
    read = tl.zeros([BV], tl.float32)
    for i in range(TILES):
        x_in = d + i * BD < D
        at, both = g[:, None] * D + (d + i * BD)[None, :], (g < V)[:, None] & x_in[None, :]
        w = tl.load(weights + at, mask=both, other=0.0)
        if MOMENTUM:
            s = th * tl.load(momentum + at, mask=both, other=0.0)
        else:
            s = tl.zeros([BV, BD], tl.float32)
        for j in range(WINDOW):
            x = tl.load(k + (last - j * H) * D + d + i * BD, mask=x_in, other=0.0)
            left = tl.sum(tl.where(lag[None, :] == j, e, 0.0), 1)
            s += left[:, None] * x[None, :]
        w = c * w - b * s
        if INITIAL:
            w += (1 - c) * tl.load(initial + head * V * D + at, mask=both, other=0.0)
        tl.store(weights + at, w, mask=both)
        if MOMENTUM:
            tl.store(momentum + at, s, mask=both)
        x = tl.load(q + here * D + d + i * BD, mask=x_in, other=0.0)
        read += tl.sum(w * x[None, :], 1)
    tl.store(y + here * V + g, read.to(y.dtype.element_ty), mask=g < V)


def _supports(call: StepCall) -> str | None:
    rule = call.rule
    reason = unknown(rule, call.feature_map)
    if reason is not None:
        return reason
    for name, value, served in (
        ("update", rule.update, ("gd",)),
        ("memory", rule.memory, ("matrix",)),
        ("dtype of q", call.dtype, (torch.bfloat16, torch.float16, torch.float32)),
        ("state dtype", call.state_dtype, (torch.float32,)),
    ):
        if value not in served:
            return f"{name} {value} has no kernel, only {' and '.join(map(str, served))}"
    if rule.corrects and rule.window > 1:
        return f"with a window of {rule.window}, online errors need the whole chunk"
    if rule.rewinds and rule.chunk_size > 1:
        return f"with errors at the start of chunks of {rule.chunk_size} it needs the whole chunk"
    for name, size, most in (
        ("window", rule.window, LARGEST_WINDOW),
        ("value width", call.value_width, LARGEST_VALUE),
        ("feature width", call.feature_width, LARGEST_FEATURES),
    ):
        if size > most:
            return f"{name} {size} is beyond the kernels' {most}"
    if call.position_device != call.state_device:
        return (
            f"it reads state.position on {call.state_device}, not {call.position_device} "
            "(state.replace(position=state.position.to(device)) moves it)"
        )
    if INTERPRETED:
        return None
    if call.device != "cuda":
        return f"it needs a CUDA device, not {call.device} (or TRITON_INTERPRET=1, to check it)"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    return None


def _lifted(phi: FeatureMap | None, x: Tensor) -> Tensor:
    """phi(x), contiguous."""
    if isinstance(phi, PolynomialMap):
        degree = phi.coefficients.shape[0] - 1
        root = phi.coefficients.float().clamp(min=0).sqrt()
        levels = [root[n] * level for n, level in enumerate(monomials(x, degree))]
        x = torch.cat(levels, -1) * monomial_scales(x.shape[-1], degree, x.dtype, x.device)
    elif phi is not None:
        x = phi(x)
    return x.contiguous()


def _forward(tensors: list[Tensor], state_tensors: list[Tensor], settings: Settings) -> Tensor:
    a = arguments(tensors, state_tensors, settings)
    phi, rule, state = a.feature_map, a.rule, a.state
    assert state is not None
    batch, _, heads, width = a.v.shape
    position = state.position[:, None]
    alpha, eta = a.alpha.float().contiguous(), a.eta.float()
    theta = None if a.theta is None else a.theta.float().contiguous()
    # The window does not reach back over the start of the sequence.
    inside = torch.arange(rule.window, device=position.device) <= position
    gamma = (a.gamma.float() * inside[:, None, None]).contiguous()
    keys = torch.cat([state.keys, a.k.float()], 1)
    values = torch.cat([state.values, a.v.float()], 1)
    q, k = _lifted(phi, a.q.float()), _lifted(phi, keys)
    if rule.limits:
        most = window = gamma[..., 0] * k.square().sum(-1)
        if theta is not None:
            scale = theta * state.scale[:, None] + window
            state.scale.copy_(scale[:, 0])
            most = torch.maximum(window / (1 - theta.clamp(max=MAX_THETA)), (1 + theta) * scale)
        eta = eta / (eta * most).clamp(min=1)
    y = a.q.new_empty(batch, heads, width)
    d = q.shape[-1]
    block = min(128, padded(d))
    momentum = state.momentum[0] if state.momentum else None
    initial = a.weights[0].float().contiguous() if rule.decay_to == "initial" else None
    launch(
        _step, (batch * heads, ceil_div(width, VALUES)),
        q, k, values.contiguous(), alpha, eta.contiguous(), theta, gamma, state.weights[0],
        momentum, initial, y, heads, d, width, WINDOW=rule.window,
        SPAN=1 << (rule.window - 1).bit_length(), BD=block, BV=VALUES, TILES=ceil_div(d, block),
        L2=rule.objective == "l2", MOMENTUM=momentum is not None, INITIAL=initial is not None,
        num_warps=WARPS,
    )  # fmt: skip
    _remember(a, keys, values)
    return y


def _remember(a: Arguments, keys: Tensor, values: Tensor) -> None:
    """The state after the token, but for M, S and scale."""
    state = a.state
    assert state is not None
    state.keys.copy_(keys[:, 1:])
    state.values.copy_(values[:, 1:])
    if a.rule.rewinds:  # chunks of one token: the next one begins here
        gates = {"alpha": a.alpha, "eta": a.eta, "gamma": a.gamma}
        gates |= {} if a.theta is None else {"theta": a.theta}
        for name, gate in gates.items():
            past = getattr(state, name)
            past.copy_(torch.cat([past, gate.to(past.dtype)], 1)[:, 1:])
        for start, now in (
            (state.chunk_start, state.weights),
            (state.momentum_start, state.momentum),
        ):
            for old, new in zip(start, now, strict=True):
                old.copy_(new)
    state.position.add_(1)


PROVIDER = Provider("triton", _supports, _forward, no_backward)
