"""What a call of the deep memories' kernels is made of: its arguments, its groups of chunks, the
memory that stages hand over through, and how widths are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.kernels import coefficients
from atlas_blocks.kernels.coefficients import Coefficients, Spans
from atlas_blocks.kernels.deep.cutter import Cutter
from atlas_blocks.kernels.deep.discount import FEATURES
from atlas_blocks.kernels.tiles import ALL_REGISTERS, Layout, ceil_div, chip, padded

GROUP = 4  # chunks at a time
LEAST_HALO = 32  # so that keys come in tiles of 32


@dataclass(frozen=True)
class Group:
    """The same few chunks of every row."""

    start: int  # the first
    at: Layout  # their slots alone, [B, GROUP]
    cutter: Cutter


def groups(at: Layout, spans: Spans) -> list[Group]:
    """All chunks of a call, GROUP at a time."""
    slots, found = at.slots.unflatten(0, (at.batch, at.per_row)), []
    for start in range(0, at.per_row, GROUP):
        some = slots[:, start : start + GROUP]
        if some.shape[1] < GROUP:  # slots without a chunk
            some = torch.cat(
                [some, torch.zeros_like(slots[:, :1]).expand(-1, GROUP - some.shape[1], -1)], 1
            )
        part = replace(at, slots=some.flatten(0, 1).contiguous(), per_row=GROUP)
        found.append(Group(start, part, Cutter.of(part, spans)))
    return found


@dataclass(frozen=True)
class Rooms:
    """What the programs of a group hand from one stage to the next, float32."""

    hidden: Tensor  # [names, lines, KEYS * HIDDEN]
    errors: Tensor  # e [lines, KEYS, V]
    features: Tensor  # of the discount [lines, 13, KEYS]
    grams: Tensor  # W_1 W_1^T [lines, V, V]

    @staticmethod
    def of(names: int, at: Layout, spans: Spans, w: list[Tensor]) -> Rooms:
        batch, heads, v, hidden = w[0].shape
        lines, keys = batch * GROUP * heads, spans.span + spans.halo
        return Rooms(
            w[0].new_empty(names, lines, keys * hidden), w[0].new_empty(lines, keys, v),
            w[0].new_empty(lines, FEATURES, keys), w[0].new_empty(lines, v, v),
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """The arguments of `forward`."""

    q: Tensor  # [B, T, H, D], and B = 1 where the rows are packed documents
    k: Tensor  # [B, HIST + T, H, D]
    target: Tensor  # [B, HIST + T, H, V]
    alpha: Tensor  # [B T, H], and so the other gates
    eta: Tensor
    theta: Tensor | None
    gamma: Tensor  # [B T, H, c]
    mass: Tensor | None  # [B, HIST + T, H] where writes are discounted
    w: list[Tensor]  # [B, H, dout, din]
    s: list[Tensor]  # empty without momentum
    m: list[Tensor]  # M^(0), empty where no chunk is begun
    at: Layout
    spans: Spans
    l2: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """H, D, V and hidden units."""
        v, hidden = self.w[0].shape[-2:]
        return self.q.shape[2], self.q.shape[3], v, hidden

    def settings(self, widest: int = 32) -> dict[str, Any]:
        """The compile-time settings that all kernels share; widest: tile of hidden units."""
        _, d, v, hidden = self.shape
        spans = self.spans
        keys = {"SPAN": spans.span, "KEYS": spans.span + spans.halo, "GROUP": GROUP}
        kinds = {"GATED": len(self.w) == 3, "MOMENTUM": self.theta is not None}
        return keys | kinds | tiles(d, v, hidden, spans, widest)

    def window(self, group: Group) -> Coefficients:
        """C, and thbar where P thbar would be: with alpha = 0 and eta = 1 P is the identity."""
        none, one = torch.zeros_like(self.alpha), torch.ones_like(self.eta)
        return coefficients.forward(none, one, self.theta, self.gamma, group.at, self.spans)

    def coefficients(self, group: Group, strengths: Tensor) -> Coefficients:
        """All of the dual form's coefficients for these write strengths."""
        return coefficients.forward(
            self.alpha, strengths, self.theta, self.gamma, group.at, self.spans
        )


def joined(own: Tensor, halo: Tensor) -> Tensor:
    """Coefficients of all keys."""
    return torch.cat([own, halo], -1) if halo.shape[-1] else own


def three(group: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """Pointers for W_1..W_3; those to what is not there are never followed."""
    group = group or other
    return [*group, *(3 - len(group)) * group[-1:]]


def tiles(d: int, v: int, hidden: int, spans: Spans, widest: int) -> dict[str, int]:
    """How keys, D and the hidden units are cut; V is not. The largest that `aot` finds no register
    spilled with."""
    widest_d, least_d = 64 if chip() >= 90 else 32, 32 if chip() >= 100 else 16
    if d % 16:
        widest_d //= 2  # every element needs an address
    block_d = min(widest_d, max(least_d, padded(d)))
    block_h = min(widest, padded(hidden))
    found = {
        "BK": min(LEAST_HALO, spans.span, spans.halo or spans.span),
        "BD": block_d, "BV": padded(v), "BH": block_h,
        "TILES": ceil_div(d, block_d), "BLOCKS": ceil_div(hidden, block_h),
        "num_warps": 8, "num_stages": 1,
    }  # fmt: skip
    return found | ALL_REGISTERS
