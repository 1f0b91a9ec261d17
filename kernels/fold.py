"""What keys get in their own chunk and in the halos of the chunks after, added up."""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atlas_blocks.kernels.coefficients import Spans
from atlas_blocks.kernels.tiles import (
    Layout,
    ceil_div,
    launch,
    load_tile,
    padded,
    store_tile,
)


@triton.jit
def _fold(
    own, halo, out, slots, rows, SIGN, PARTS,
    H: tl.constexpr, D: tl.constexpr, HISTORY: tl.constexpr,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, HALO: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    both, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    row, head = both // H, both % H
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    first_slot, count = tl.load(rows + row * 2), tl.load(rows + row * 2 + 1)
    at = slots + first_slot.to(tl.int64) * 4
    first, low, high = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    past = part * BT + tl.arange(0, BT)
    there = past < high - low + HISTORY
    token = low - HISTORY + past
    # Division rounds to zero; history reaches no further back than HALO + CHUNK.
    REACH: tl.constexpr = (HALO + CHUNK - 1) // CHUNK
    n = (token - first + (REACH + 1) * CHUNK) // CHUNK - (REACH + 1)
    column = (d < D)[None, :]
    mine = there & (n >= 0) & (n < count)
    if STREAM:
        total = load_tile(own, low + row * HISTORY, past, mine, head, H, d, D).to(tl.float32)
    else:
        line = ((first_slot + n).to(tl.int64) * H + head) * SPAN + token - first - n * CHUNK
        total = tl.load(
            own + line[:, None] * D + d[None, :], mask=mine[:, None] & column, other=0.0
        )
        total = total.to(tl.float32)
    for later in range(1, REACH + 1):
        m = n + later
        i = token - (first + m * CHUNK - HALO)
        mine = there & (m >= 0) & (m < count) & (i >= 0) & (i < HALO)
        line = ((first_slot + m).to(tl.int64) * H + head) * HALO + i
        x = tl.load(halo + line[:, None] * D + d[None, :], mask=mine[:, None] & column, other=0.0)
        total += x.to(tl.float32)
    store_tile(out, SIGN * total, low + row * HISTORY, past, there, head, H, d, D)


def fold(
    own: Tensor,
    halo: Tensor,
    out: Tensor,
    at: Layout,
    spans: Spans,
    sign: float = 1.0,
    stream: bool = False,
) -> None:
    """sign x (own + halo) to a key stream [B, HIST + T, H, width], of packed documents
    [1, R HIST + T, ...]. own: [slots, H, SPAN, width], or a stream as well; halo:
    [slots, H, HALO, width]."""
    heads, width = out.shape[-2:]
    block = min(16 if width % 16 else 64, padded(width))
    # Of rows, heads and tokens there may be more than the second axis of a grid can have.
    parts = ceil_div(at.longest + spans.history, 64)
    launch(
        _fold, (at.batch * heads * parts, ceil_div(width, block)),
        own, halo, out, at.slots, at.rows, sign, parts, heads, width, spans.history,
        CHUNK=spans.chunk, SPAN=spans.span, HALO=spans.halo, BT=64, BD=block, STREAM=stream,
    )  # fmt: skip
