"""Where a program finds its chunk, and the memory that stages hand over through."""

# A call of a jitted function is NoReturn to pyright.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from atlas_blocks.kernels.tiles import dot, load_block


@triton.jit
def project(
    x, w, r, ROWS, j, HIDDEN, D, BD: tl.constexpr, TILES
):  # fmt: skip
    """x W^T for some rows of x [ROWS, D] and some hidden units of W [HIDDEN, D]."""
    found = tl.zeros([r.shape[0], j.shape[0]], tl.float32)
    for i in tl.range(TILES, disable_licm=True):
        d = i * BD + tl.arange(0, BD)
        found += dot(load_block(x, r, ROWS, d, D), tl.trans(load_block(w, j, HIDDEN, d, D)))
    return found


@triton.jit
def room(rooms, index: tl.constexpr, line, LINES, size: tl.constexpr):
    """The memory of one name, of one program."""
    return rooms + (index * LINES + line).to(tl.int64) * size


@triton.jit
def two_rooms(rooms, index: tl.constexpr, line, LINES, size: tl.constexpr):
    """Those of one name and of the next."""
    return room(rooms, index, line, LINES, size), room(rooms, index + 1, line, LINES, size)


@triton.jit
def place(rows, START, OFFSET, PER_ROW, line, H: tl.constexpr, GROUP: tl.constexpr):
    """Where one row's and head's chunk START + OFFSET lies: whether it is there, among the programs
    of its group, and among all chunks."""
    row, head = line // H, line % H
    there = tl.load(rows + row * 2 + 1) > START + OFFSET
    mine = (row * GROUP + OFFSET) * H + head
    return there, mine, ((row * PER_ROW + START + OFFSET) * H + head).to(tl.int64)
