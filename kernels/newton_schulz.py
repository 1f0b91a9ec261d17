"""The Triton provider of `atlas::newton_schulz` and its backward: one program per matrix.

    X_0 = S / (||S||_F + eps);   X <- a X + (b A + c A A) X,  A = X X^T

The backward computes D, the derivative along the incoming gradient, beside X (see
newton_schulz/definition.py). Where the iterates are depends on what fits:

* resident: X and D stay on chip from the first step to the last.
* streamed: A and A' do; X and D pass through once a step, in blocks of columns that are each
  updated and added to the next A at once. X lies in the output itself; in the backward D does, and
  X in scratch.
* tiled: everything lies in scratch, and is multiplied tile by tile.

Scratch is a fixed number of matrices for each program, and the number of programs is that of what
the GPU runs at a time: it grows neither with the number of matrices nor with that of the steps.
In the Gram space, where the definition takes a wide X, rounding grows by a^2 a step, which tf32
does not bear; streamed kernels take all products of X itself.

m rows, n columns, m <= n: a tall S is read and written transposed. Products are in tf32.
"""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.graph.providers import DEFINITION, Provider, find
from atlas_blocks.kernels.tiles import (
    chip,
    dot,
    fits,
    inside,
    launch,
    no_device,
    padded,
)
from atlas_blocks.newton_schulz.definition import EPS, triples
from atlas_blocks.newton_schulz.op import NewtonSchulzCall

LARGEST = 128  # of the smaller side
_EPS = tl.constexpr(EPS)


@triton.jit
def _at(x, row, column, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr):
    """Where a block of X lies in S, or in S^T."""
    if TALL:
        return x + row[:, None] + column[None, :] * M
    else:
        return x + row[:, None] * N + column[None, :]


@triton.jit
def _load(x, row, column, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr):
    at = _at(x, row, column, M, N, TALL)
    if fits(M, row.shape[0]) and fits(N, column.shape[0]):
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=inside(row, M, column, N), other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, row, column, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr):
    at = _at(x, row, column, M, N, TALL)
    value = value.to(x.dtype.element_ty)
    if fits(M, row.shape[0]) and fits(N, column.shape[0]):
        tl.store(at, value)
    else:
        tl.store(at, value, mask=inside(row, M, column, N))


@triton.jit
def _norm(squares):
    """||S|| and 1 / (||S|| + eps), where S is zero 1 and 0."""
    norm = tl.sqrt(squares)
    scale = tl.where(norm > 0, 1 / (norm + _EPS), 0.0)
    return tl.where(norm > 0, norm, 1.0), scale


@triton.jit
def _coefficients(table, step):
    at = table + 3 * step
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _slope(gram, along, b, c):
    """The derivative of b A + c A A where A' = along + along^T."""
    along += tl.trans(along)
    half = dot(along, gram)
    return b * along + c * (half + tl.trans(half))


@triton.jit
def _resident_forward(
    s, out, table,
    STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (M * N)
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    x = _load(s + start, row, column, M, N, TALL)
    _, scale = _norm(tl.sum(x * x))
    x *= scale
    for step in tl.range(STEPS, disable_licm=True):
        a, b, c = _coefficients(table, step)
        gram = dot(x, tl.trans(x))
        x = a * x + dot(b * gram + c * dot(gram, gram), x)
    _store(out + start, x, row, column, M, N, TALL)


@triton.jit
def _resident_backward(
    grad, s, out, table,
    STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (M * N)
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    x = _load(s + start, row, column, M, N, TALL)
    norm, scale = _norm(tl.sum(x * x))
    x *= scale
    d = _load(grad + start, row, column, M, N, TALL)
    for step in tl.range(STEPS, disable_licm=True):
        a, b, c = _coefficients(table, step)
        gram = dot(x, tl.trans(x))
        slope = _slope(gram, dot(d, tl.trans(x)), b, c)
        p = b * gram + c * dot(gram, gram)
        d = a * d + dot(p, d) + dot(slope, x)
        x = a * x + dot(p, x)
    x = scale * _load(s + start, row, column, M, N, TALL)
    found = scale * d - x / norm * tl.sum(x * d)
    _store(out + start, found, row, column, M, N, TALL)


@triton.jit
def _squares(
    s, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """||S||^2."""
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    sums = tl.zeros([BM], tl.float32)
    for j in tl.range(0, N, BN, disable_licm=True):
        x = _load(s, row, j + column, M, N, TALL)
        sums += tl.sum(x * x, 1)
    return tl.sum(sums)


@triton.jit
def _streamed_forward(
    s, out, table,
    STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (M * N)
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    _, scale = _norm(_squares(s + start, M, N, TALL, BM, BN))
    gram = tl.zeros([BM, BM], tl.float32)
    for j in tl.range(0, N, BN, disable_licm=True):
        x = scale * _load(s + start, row, j + column, M, N, TALL)
        gram += dot(x, tl.trans(x))
        _store(out + start, x, row, j + column, M, N, TALL)
    for step in tl.range(STEPS, disable_licm=True):
        a, b, c = _coefficients(table, step)
        p = b * gram + c * dot(gram, gram)
        gram = tl.zeros([BM, BM], tl.float32)
        tl.debug_barrier()  # all of X is written
        for j in tl.range(0, N, BN, disable_licm=True):
            x = _load(out + start, row, j + column, M, N, TALL)
            x = a * x + dot(p, x)
            gram += dot(x, tl.trans(x))
            _store(out + start, x, row, j + column, M, N, TALL)


@triton.jit
def _streamed_backward(
    grad, s, out, scratch, table, COUNT,
    STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    mine = scratch + tl.program_id(0).to(tl.int64) * (M * N)
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    start = tl.program_id(0).to(tl.int64) * (M * N)
    for _ in tl.range(tl.program_id(0), COUNT, tl.num_programs(0), disable_licm=True):
        norm, scale = _norm(_squares(s + start, M, N, TALL, BM, BN))
        gram = tl.zeros([BM, BM], tl.float32)
        along = tl.zeros([BM, BM], tl.float32)
        tl.debug_barrier()  # the scratch is no longer read
        for j in tl.range(0, N, BN, disable_licm=True):
            x = scale * _load(s + start, row, j + column, M, N, TALL)
            d = _load(grad + start, row, j + column, M, N, TALL)
            gram += dot(x, tl.trans(x))
            along += dot(d, tl.trans(x))
            _store(mine, x, row, j + column, M, N, TALL)
            _store(out + start, d, row, j + column, M, N, TALL)
        for step in tl.range(STEPS, disable_licm=True):
            a, b, c = _coefficients(table, step)
            slope = _slope(gram, along, b, c)
            p = b * gram + c * dot(gram, gram)
            gram = tl.zeros([BM, BM], tl.float32)
            along = tl.zeros([BM, BM], tl.float32)
            tl.debug_barrier()  # all of X and D is written
            for j in tl.range(0, N, BN, disable_licm=True):
                x = _load(mine, row, j + column, M, N, TALL)
                d = _load(out + start, row, j + column, M, N, TALL)
                d = a * d + dot(p, d) + dot(slope, x)
                x = a * x + dot(p, x)
                gram += dot(x, tl.trans(x))
                along += dot(d, tl.trans(x))
                _store(mine, x, row, j + column, M, N, TALL)
                _store(out + start, d, row, j + column, M, N, TALL)
        tl.debug_barrier()
        sums = tl.zeros([BM], tl.float32)
        for j in tl.range(0, N, BN, disable_licm=True):
            x = scale * _load(s + start, row, j + column, M, N, TALL)
            sums += tl.sum(x * _load(out + start, row, j + column, M, N, TALL), 1)
        inner = tl.sum(sums)
        for j in tl.range(0, N, BN, disable_licm=True):
            x = scale * _load(s + start, row, j + column, M, N, TALL)
            d = _load(out + start, row, j + column, M, N, TALL)
            _store(out + start, scale * d - x / norm * inner, row, j + column, M, N, TALL)
        start += tl.num_programs(0).to(tl.int64) * (M * N)


@triton.jit
def _tile(x, row, column, SIZE: tl.constexpr):
    """Where a tile of a matrix in scratch lies, `SIZE` the length of its rows."""
    return x + row[:, None] * SIZE + column[None, :]


@triton.jit
def _symmetric(x, row, column, SIZE: tl.constexpr):
    """A tile of x + x^T."""
    at = x + row[:, None] + column[None, :] * SIZE
    return tl.load(_tile(x, row, column, SIZE)) + tl.load(at)


@triton.jit
def _tiled_backward(
    grad, s, out, scratch, table, COUNT,
    STEPS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TALL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scratch of a program: X and D [BM, BN]; then [BM, BM]: A; P = b A + c A A; H = D X^T, later
    H = A' A; slope = A' = H + H^T, later P'."""
    x = scratch + tl.program_id(0).to(tl.int64) * (2 * BM * BN + 4 * BM * BM)
    d = x + BM * BN
    gram = d + BM * BN
    p = gram + BM * BM
    h = p + BM * BM
    slope = h + BM * BM
    row, k = tl.arange(0, BM), tl.arange(0, BK)
    start = tl.program_id(0).to(tl.int64) * (M * N)
    for _ in tl.range(tl.program_id(0), COUNT, tl.num_programs(0), disable_licm=True):
        norm, scale = _norm(_squares(s + start, M, N, TALL, BM, BK))
        tl.debug_barrier()  # the scratch is no longer read
        for j in tl.range(0, BN, BK, disable_licm=True):
            unit = scale * _load(s + start, row, j + k, M, N, TALL)
            tl.store(_tile(x, row, j + k, BN), unit)
            tl.store(_tile(d, row, j + k, BN), _load(grad + start, row, j + k, M, N, TALL))
        for step in tl.range(STEPS, disable_licm=True):
            a, b, c = _coefficients(table, step)
            tl.debug_barrier()
            for j in tl.range(0, BM, BK, disable_licm=True):
                of_x = tl.zeros([BM, BK], tl.float32)
                of_d = tl.zeros([BM, BK], tl.float32)
                for n in tl.range(0, BN, BK, disable_licm=True):
                    right = tl.trans(tl.load(_tile(x, j + k, n + k, BN)))
                    of_x += dot(tl.load(_tile(x, row, n + k, BN)), right)
                    of_d += dot(tl.load(_tile(d, row, n + k, BN)), right)
                tl.store(_tile(gram, row, j + k, BM), of_x)
                tl.store(_tile(h, row, j + k, BM), of_d)
            tl.debug_barrier()
            for j in tl.range(0, BM, BK, disable_licm=True):
                tl.store(_tile(slope, row, j + k, BM), _symmetric(h, row, j + k, BM))
            tl.debug_barrier()
            for j in tl.range(0, BM, BK, disable_licm=True):
                of_x = tl.zeros([BM, BK], tl.float32)
                of_d = tl.zeros([BM, BK], tl.float32)
                for n in tl.range(0, BM, BK, disable_licm=True):
                    right = tl.load(_tile(gram, n + k, j + k, BM))
                    of_x += dot(tl.load(_tile(gram, row, n + k, BM)), right)
                    of_d += dot(tl.load(_tile(slope, row, n + k, BM)), right)
                of_x = b * tl.load(_tile(gram, row, j + k, BM)) + c * of_x
                tl.store(_tile(p, row, j + k, BM), of_x)
                tl.store(_tile(h, row, j + k, BM), of_d)
            tl.debug_barrier()
            for j in tl.range(0, BM, BK, disable_licm=True):
                at = _tile(slope, row, j + k, BM)
                tl.store(at, b * tl.load(at) + c * _symmetric(h, row, j + k, BM))
            tl.debug_barrier()
            for j in tl.range(0, BN, BK, disable_licm=True):
                of_x = a * tl.load(_tile(x, row, j + k, BN))
                for n in tl.range(0, BM, BK, disable_licm=True):
                    right = tl.load(_tile(x, n + k, j + k, BN))
                    of_x += dot(tl.load(_tile(p, row, n + k, BM)), right)
                of_d = a * tl.load(_tile(d, row, j + k, BN))
                for n in tl.range(0, BM, BK, disable_licm=True):
                    right = tl.load(_tile(d, n + k, j + k, BN))
                    of_d += dot(tl.load(_tile(p, row, n + k, BM)), right)
                for n in tl.range(0, BM, BK, disable_licm=True):
                    right = tl.load(_tile(x, n + k, j + k, BN))
                    of_d += dot(tl.load(_tile(slope, row, n + k, BM)), right)
                tl.debug_barrier()  # these columns have been read
                tl.store(_tile(x, row, j + k, BN), of_x)
                tl.store(_tile(d, row, j + k, BN), of_d)
        tl.debug_barrier()
        sums = tl.zeros([BM], tl.float32)
        for j in tl.range(0, BN, BK, disable_licm=True):
            unit = scale * _load(s + start, row, j + k, M, N, TALL)
            sums += tl.sum(unit * tl.load(_tile(d, row, j + k, BN)), 1)
        inner = tl.sum(sums)
        for j in tl.range(0, BN, BK, disable_licm=True):
            unit = scale * _load(s + start, row, j + k, M, N, TALL)
            found = scale * tl.load(_tile(d, row, j + k, BN)) - unit / norm * inner
            _store(out + start, found, row, j + k, M, N, TALL)
        start += tl.num_programs(0).to(tl.int64) * (M * N)


class _Plan(NamedTuple):
    """Which kernel takes a matrix, and how."""

    kernel: Any
    block: int  # columns at a time: all of them where the kernel is resident
    warps: int
    scratch: int  # floats for each program; 0 where every matrix has a program of its own


def _forward_plan(m: int, n: int) -> _Plan:
    bm, bn = padded(m), padded(n)
    if bn <= 64 or (bn <= 128 and bm <= 64) or (bm == bn == 128 and chip() < 90):
        return _Plan(_resident_forward, bn, 4 if bn <= 64 else 8, 0)
    return _Plan(_streamed_forward, 32, 8, 0)


def _backward_plan(m: int, n: int) -> _Plan:
    bm, bn, hopper = padded(m), padded(n), chip() >= 90
    if bn <= 32 or (bn <= 64 and (hopper or bm == 16)):
        return _Plan(_resident_backward, bn, 4 if bn <= 32 else 8, 0)
    if bm <= 64 and hopper:
        return _Plan(_streamed_backward, 32, 8, m * n)
    block = min(bm, 32 if hopper else 16)
    return _Plan(_tiled_backward, block, 4 if bm <= 32 else 8, 2 * bm * bn + 4 * bm * bm)


def _widths(s: Tensor) -> tuple[int, int, bool]:
    """m, n and whether S is tall."""
    rows, columns = s.shape[-2:]
    return min(rows, columns), max(rows, columns), rows > columns


def _programs(s: Tensor) -> int:
    """Of a kernel that needs scratch: twice the GPU's multiprocessors, or one for each matrix."""
    processors = 132
    if s.device.type == "cuda":
        processors = torch.cuda.get_device_properties(s.device).multi_processor_count
    return min(2 * processors, s.shape[:-2].numel())


@functools.cache
def _table(steps: int, coefficients: str, device: torch.device) -> Tensor:
    """a, b, c of every step."""
    return torch.tensor(triples(max(1, steps), coefficients), dtype=torch.float32, device=device)


def _supports(call: NewtonSchulzCall) -> str | None:
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {call.dtype} has no kernel, only 32 and 16 bits have"
    reason = no_device(call.device, call.dtype)
    return refused_shape(call.rows, call.columns) if reason is None else reason


def refused_shape(rows: int, columns: int) -> str | None:
    """Why the chip that launches are for does not take [rows, columns], or None."""
    m, n = min(rows, columns), max(rows, columns)
    if m > LARGEST:
        return f"the smaller side {m} is beyond the kernels' {LARGEST}"
    if m > 64 and n > 128 and chip() < 90:
        return f"[{rows}, {columns}] spills registers on compute capability 8"
    return None


def _forward(s: Tensor, steps: int, coefficients: str) -> Tensor:
    if not s.numel():
        return find("newton_schulz", DEFINITION).forward(s, steps, coefficients)
    s = s.contiguous()
    m, n, tall = _widths(s)
    plan = _forward_plan(m, n)
    kind = s.dtype if plan.kernel is _resident_forward else torch.float32  # it holds the iterates
    out = torch.empty_like(s, dtype=kind)
    launch(
        plan.kernel, (s.shape[:-2].numel(),),
        s, out, _table(steps, coefficients, s.device),
        STEPS=steps, M=m, N=n, TALL=tall, BM=padded(m), BN=plan.block,
        num_warps=plan.warps, num_stages=1,
    )  # fmt: skip
    return out.to(s.dtype)


def _backward(grad: Tensor, s: Tensor, steps: int, coefficients: str) -> Tensor:
    if not s.numel():
        return find("newton_schulz", DEFINITION).backward(grad, s, steps, coefficients)
    grad, s = grad.contiguous(), s.contiguous()
    m, n, tall = _widths(s)
    plan = _backward_plan(m, n)
    table, count = _table(steps, coefficients, s.device), s.shape[:-2].numel()
    kind = torch.float32 if plan.kernel is _streamed_backward else s.dtype
    out = torch.empty_like(s, dtype=kind)
    settings = {"STEPS": steps, "M": m, "N": n, "TALL": tall, "BM": padded(m)}
    settings |= {"num_warps": plan.warps, "num_stages": 1}
    if plan.kernel is _resident_backward:
        launch(plan.kernel, (count,), grad, s, out, table, BN=plan.block, **settings)
        return out
    programs = _programs(s)
    scratch = s.new_empty(programs, plan.scratch, dtype=torch.float32)
    blocks = {"BN": plan.block}
    if plan.kernel is _tiled_backward:
        blocks = {"BN": padded(n), "BK": plan.block}
    launch(plan.kernel, (programs,), grad, s, out, scratch, table, count, **settings, **blocks)
    return out.to(s.dtype)


PROVIDER = Provider("triton", _supports, _forward, _backward)
