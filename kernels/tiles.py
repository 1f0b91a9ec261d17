"""What every kernel shares: where a chunk's tokens lie, tiles of them, products of tiles.

A *row* is a sequence of the batch, or a packed document; a *slot* is one chunk of one row. All
kernels that need no memory state run one program per slot and head. The token streams are
contiguous [tokens, H, D], rows one after the other; key streams begin every row with HIST tokens
that the rule looks back at, and so do gate streams, with GATES of them, where it does a begun chunk
again from its start. Rows of a chunk outside its sequence are neutral: they load 0, decay by 1,
write nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from atlas_blocks.omega.rule import Rule

# The interpreter multiplies bfloat16 as integers.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@dataclass(frozen=True)
class Layout:
    """Which tokens every chunk of a call holds.

    slots: int32 [slots, 4]: row; first token of the chunk in the stream, which for a chunk that an
    earlier call began lies before the row's; first and last + 1 token of the row. Slots without a
    chunk hold an empty range. rows: int32 [R, 2]: first slot and number of chunks.
    """

    slots: Tensor
    rows: Tensor
    batch: int  # R
    per_row: int  # slots of every row, 0 where those of one row follow those of another
    chunk: int
    longest: int  # tokens of a row

    @property
    def count(self) -> int:
        return self.slots.shape[0]

    def ends_whole(self) -> Tensor:
        """Whether a row's last chunk is whole [R]; of no chunk it is not."""
        newest = self.slots[(self.rows[:, 0] + self.rows[:, 1] - 1).clamp(min=0).long()]
        return (newest[:, 3] - newest[:, 1] == self.chunk) & (self.rows[:, 1] > 0)


def layout(
    bounds: Tensor,
    longest: int,
    chunk: int,
    position: Tensor | None,
    *,
    per_row: int = 0,
    count: int = 0,
) -> Layout:
    """Rows of the tokens from bounds[r] to bounds[r + 1] - 1, 1 to `longest` of them, at these
    positions [R] of their sequences (None: 0).

    bounds: int64 [R + 1], on the device of the layout. per_row: so many slots for every row; or
    count: so many in all, without a gap between rows.
    """
    low, high = bounds[:-1], bounds[1:]
    place = torch.zeros_like(low) if position is None else position.to(low.device) % chunk
    used = (place + high - low + chunk - 1) // chunk
    first = used.cumsum(0) - used
    if per_row:
        count = len(low) * per_row
        first = torch.arange(len(low), device=low.device) * per_row
    slot = torch.arange(count, device=low.device)
    row = torch.searchsorted(first, slot, right=True) - 1
    n = slot - first[row]
    high = torch.where(n < used[row], high[row], low[row])
    slots = torch.stack([row, (low - place)[row] + n * chunk, low[row], high], 1).int()
    return Layout(slots, torch.stack([first, used], 1).int(), len(low), per_row, chunk, longest)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded(width: int) -> int:
    """The power of 2, at least 16, that a tile of this width takes: products need it."""
    return max(16, 1 << (width - 1).bit_length())


class Launch(NamedTuple):
    """One kernel with everything its compilation depends on."""

    kernel: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]


LONGEST_AXIS = 65_535
_recording: list[Launch] | None = None
_recorded_for = 0


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """kernel[grid](*arguments, **settings), or under `recorded` a note that it would be.

    Raises ValueError for a second or third axis longer than a GPU takes: what grows with a call
    lies along the first.
    """
    if max(grid[1:], default=0) > LONGEST_AXIS:
        raise ValueError(f"grid: expected at most {LONGEST_AXIS} along y and z, got {grid}")
    if _recording is not None:
        _recording.append(Launch(kernel, arguments, settings))
    elif grid[0]:
        kernel[grid](*arguments, **settings)


@contextmanager
def recorded(chip: int) -> Iterator[list[Launch]]:
    """Collect launches for a chip such as 90 in place of running them; meta tensors will do."""
    global _recording, _recorded_for
    _recording, _recorded_for = [], chip
    try:
        yield _recording
    finally:
        _recording = None


def chip() -> int:
    """The compute capability that launches are for, such as 90."""
    if _recording is not None:
        return _recorded_for
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def no_device(device: str, dtype: torch.dtype) -> str | None:
    """Why no kernel runs on this type of device, or not in this dtype; None where one does."""
    if INTERPRETED:
        return None
    if device != "cuda":
        return f"it needs a CUDA device, not {device} (or TRITON_INTERPRET=1, to check it)"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return (
            "it multiplies float32 in tf32, and torch.get_float32_matmul_precision() is "
            "'highest' (torch.set_float32_matmul_precision('high') allows it)"
        )
    return None


# What kernels compute; each says in its provider which of these it has.
KNOWN = {
    "memory": ("matrix", "mlp", "gated_mlp"),
    "objective": ("l2", "dot"),
    "update": ("gd", "muon"),
    "errors": ("chunk", "online"),
    "decay_to": ("zero", "initial"),
}
FEATURE_MAPS = ("identity", "polynomial", "sketch")


def unknown(rule: Rule, feature_map: str) -> str | None:
    """What of a rule and its features no kernel has heard of, None where all of it is known.

    A memory of two weights is not an mlp because it has two weights.
    """
    named = {**{name: getattr(rule, name) for name in KNOWN}, "feature map": feature_map}
    for name, value in named.items():
        known = KNOWN.get(name, FEATURE_MAPS)
        if value not in known:
            return f"{name} {value!r} has no kernel, only {' and '.join(map(repr, known))}"
    return None


@triton.jit
def chunk_tokens(slots, slot, SPAN: tl.constexpr, CHUNK: tl.constexpr) -> Any:
    """Row and token range of a slot, its SPAN token indices and which of them it writes."""
    at = slots + slot.to(tl.int64) * 4
    row, first = tl.load(at), tl.load(at + 1)
    low, high = tl.load(at + 2), tl.load(at + 3)
    r = tl.arange(0, SPAN)
    token = first + r
    mine = (token >= low) & (token < high) & (r < CHUNK)
    return row, first, low, high, token, mine


@triton.jit
def chunk_gates(slots, slot, SPAN: tl.constexpr, CHUNK: tl.constexpr, GATES: tl.constexpr) -> Any:
    """Whether a slot holds a chunk, where its SPAN tokens lie in a gate stream, which of them it
    has, those of an earlier call included, and of which it has the one before."""
    row, _, low, high, token, _ = chunk_tokens(slots, slot, SPAN, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    r = tl.arange(0, SPAN)
    there = (token < high) & (r < CHUNK)
    before = (token <= high) & (r <= CHUNK) & (r > 0)
    return low < high, token + (row + 1) * GATES, there, before


@triton.jit
def load_gate(x, token, mine, head, H, neutral):
    return tl.load(x + token.to(tl.int64) * H + head, mask=mine, other=neutral)


@triton.jit
def tile(x, start, row, head, H, column, D):
    """Where [rows, columns] of one head lie in a stream [tokens, H, D], from token `start` on.

    Offsets are 32-bit, from a 64-bit start: tiles of 64-bit offsets would take the registers.
    """
    return x + (start.to(tl.int64) * H + head) * D + (row * (H * D))[:, None] + column[None, :]


@triton.constexpr_function
def fits(size, block):
    """Whether blocks fill an axis of this size."""
    return size % block == 0


@triton.jit
def inside(row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr):
    """The mask of a block of a matrix [ROWS, COLUMNS]: none where the blocks fit. (A mask takes a
    register for every element.)"""
    mask = True
    if not fits(ROWS, row.shape[0]):
        mask = (row < ROWS)[:, None]
        if not fits(COLUMNS, column.shape[0]):
            mask = mask & (column < COLUMNS)[None, :]
    elif not fits(COLUMNS, column.shape[0]):
        mask = (column < COLUMNS)[None, :]
    return mask


@triton.jit
def load_tile(x, start, row, some, head, H: tl.constexpr, column, D: tl.constexpr):
    mask = some[:, None]
    if not fits(D, column.shape[0]):
        mask = mask & (column < D)[None, :]
    return tl.load(tile(x, start, row, head, H, column, D), mask=mask, other=0.0)


@triton.jit
def store_tile(x, value, start, row, some, head, H: tl.constexpr, column, D: tl.constexpr):
    mask = some[:, None]
    if not fits(D, column.shape[0]):
        mask = mask & (column < D)[None, :]
    tl.store(tile(x, start, row, head, H, column, D), value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_block(x, row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr):
    """A dense block [rows, columns] of a matrix [ROWS, COLUMNS]."""
    at = x + row[:, None] * COLUMNS + column[None, :]
    if fits(ROWS, row.shape[0]) and fits(COLUMNS, column.shape[0]):
        return tl.load(at)
    else:
        return tl.load(at, mask=inside(row, ROWS, column, COLUMNS), other=0.0)


@triton.jit
def store_block(x, value, row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr):
    at = x + row[:, None] * COLUMNS + column[None, :]
    value = value.to(x.dtype.element_ty)
    if fits(ROWS, row.shape[0]) and fits(COLUMNS, column.shape[0]):
        tl.store(at, value)
    else:
        tl.store(at, value, mask=inside(row, ROWS, column, COLUMNS))


@triton.jit
def dot(a, b):
    """a @ b summed in float32: of two 16-bit tiles exactly, else the operands rounded to tf32.

    (What was computed in float32 would lose too much in bfloat16: the error against float64 was
    three times the definition's own.)
    """
    if a.dtype != b.dtype or a.dtype == tl.float32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    elif INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit
def exact_dot(a, b):
    """a @ b of float32 tiles, to float32's precision on the tensor cores."""
    return tl.dot(a, b, input_precision="tf32x3")


# A launch setting. Left to itself ptxas keeps to fewer registers than a thread can have, so that
# more programs run at once, and may then spill a few.
ALL_REGISTERS = {"maxnreg": 255}
