"""What a call of the deep memories' kernels is made of: its arguments, its groups of chunks, the
memory that stages hand over through, and how widths are cut."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.kernels import coefficients
from atlas_blocks.kernels.coefficients import Coefficients, Spans
from atlas_blocks.kernels.deep.cutter import Cutter
from atlas_blocks.kernels.tiles import ALL_REGISTERS, Layout, ceil_div, chip, padded

GROUP = 4  # chunks at a time
LEAST_HALO = 32  # so that keys come in tiles of 32
FEATURES = 8  # numbers of every key, see online.py
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # launch settings that are no kernel's argument


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
class DeepCall:
    """The arguments of `forward`. All but q begin every row with HIST tokens of history."""

    q: Tensor  # [B, T, H, D], and B = 1 where the rows are packed documents
    k: Tensor  # [B, HIST + T, H, D]
    target: Tensor  # [B, HIST + T, H, V]
    alpha: Tensor  # [B (HIST + T), H], and so the other gates
    eta: Tensor
    theta: Tensor | None
    gamma: Tensor  # [B (HIST + T), H, c]
    masses: Tensor | None  # m_i(j) of specification 9b, of gamma's shape, where writes are limited
    weight: Tensor | None  # sum_j gamma[t, j] of every token, likewise [B (HIST + T), H]
    w: list[Tensor]  # [B, H, dout, din], at the start of the first chunk
    s: list[Tensor]  # empty without momentum
    at: Layout
    spans: Spans
    l2: bool
    limits: bool  # whether write strengths are limited
    corrects: bool  # whether errors are online
    anchors: list[Tensor] = field(default_factory=list)  # A [H, dout, din], empty where it is 0
    anchored: Tensor | None = None  # what A reads of every key [B, HIST + T, H, V], if it corrects

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """H, D, V and hidden units."""
        v, hidden = self.w[0].shape[-2:]
        return self.q.shape[2], self.q.shape[3], v, hidden

    @property
    def lines(self) -> int:
        """Chunks of a group, of all rows and heads."""
        return self.at.batch * GROUP * self.shape[0]

    @property
    def keys(self) -> int:
        """Rows of a chunk's keys."""
        return self.spans.span + self.spans.halo

    def settings(self, widest: int = 32) -> dict[str, Any]:
        """The compile-time settings that all kernels share; widest: tile of hidden units."""
        _, d, v, hidden = self.shape
        keys = {"SPAN": self.spans.span, "KEYS": self.keys, "GROUP": GROUP}
        kinds = {"GATED": len(self.w) == 3, "MOMENTUM": self.theta is not None}
        return keys | kinds | tiles(d, v, hidden, self.spans, widest)

    def window(self, group: Group) -> Coefficients:
        """C, and thbar where P thbar would be: with alpha = 0 and eta = 1 P is the identity."""
        none, one = torch.zeros_like(self.alpha), torch.ones_like(self.eta)
        return coefficients.forward(none, one, self.theta, self.gamma, group.at, self.spans)

    def coefficients(self, group: Group) -> Coefficients:
        """All of the dual form's coefficients, where write strengths are not limited."""
        return coefficients.forward(
            self.alpha, self.eta, self.theta, self.gamma, group.at, self.spans
        )


@dataclass(frozen=True)
class Rooms:
    """What the programs of a group hand from one stage to the next, float32."""

    hidden: Tensor  # [names, lines, KEYS * HIDDEN]
    errors: Tensor  # those that the factors are of [lines, KEYS, V]
    bare: Tensor  # those at M^(0); `errors` itself where they are not corrected
    along: Tensor  # the derivative along S of what M^(0) reads [lines, SPAN, V]
    features: Tensor  # [lines, FEATURES, KEYS]
    gram: Tensor  # x x^T [lines, KEYS, KEYS]
    kappa: Tensor  # [lines, KEYS, KEYS]
    before: Tensor  # N [lines, KEYS, KEYS]
    inverses: Tensor  # of the system's blocks of 16 on its diagonal [lines, KEYS, 16]

    @staticmethod
    def of(names: int, call: DeepCall) -> Rooms:
        _, _, v, hidden = call.shape
        lines, keys, span = call.lines, call.keys, call.spans.span

        def new(there: bool, *shape: int) -> Tensor:
            return call.eta.new_empty(lines if there else 0, *shape)

        errors, corrects = new(True, keys, v), call.corrects
        return Rooms(
            call.eta.new_empty(names, lines, keys * hidden),
            errors,
            new(True, keys, v) if corrects else errors,
            new(corrects and call.theta is not None, span, v),
            new(call.limits, FEATURES, keys),
            new(corrects, keys, keys),
            new(corrects, keys, keys),
            new(corrects, keys, keys),
            new(corrects, keys, 16),
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
