"""Deep memories of packed documents: those of similar length at a time.

The kernels of forward.py and backward.py take as many chunks of every row as its longest has. So
that short documents beside a long one do not take its room, documents go in batches, longest first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atlas_blocks.kernels.deep import backward as deep_backward
from atlas_blocks.kernels.deep import forward as deep_forward
from atlas_blocks.kernels.deep.backward import Gradients
from atlas_blocks.kernels.deep.call import DeepCall
from atlas_blocks.kernels.deep.forward import Result
from atlas_blocks.kernels.tiles import Layout

# A batch has at most so many times the slots that its documents fill. More batches mean fewer
# programs at once.
SLACK = 2


@dataclass(frozen=True)
class Batch:
    """Some of a call's documents, and their chunks among all of its slots."""

    rows: Tensor  # which documents [n]
    at: Layout  # of these alone, per_row slots each
    slots: Tensor  # of the call's layout [n per_row], 0 where there is no chunk
    there: Tensor  # whether there is one [n per_row]

    @staticmethod
    def of(at: Layout, documents: list[int], per_row: int) -> Batch:
        rows = torch.tensor(documents, device=at.slots.device)
        first, used = at.rows[rows].long().unbind(1)
        n = torch.arange(per_row, device=rows.device)
        there = (n < used[:, None]).flatten()
        slots = torch.where(there, (first[:, None] + n).flatten(), 0)
        mine = torch.arange(len(documents), device=rows.device) * per_row
        part = replace(
            at,
            # Documents keep their numbers here, which say where their history lies.
            slots=torch.where(there[:, None], at.slots[slots], 0),
            rows=torch.stack([mine, used], 1).int(),
            batch=len(documents),
            per_row=per_row,
        )
        return Batch(rows, part, slots, there)

    def call(self, call: DeepCall) -> DeepCall:
        """The call for these documents."""
        w, s = ([x[self.rows] for x in part] for part in (call.w, call.s))
        return replace(call, w=w, s=s, at=self.at)

    def starts(self, x: Tensor) -> Tensor:
        """[slots of the call, ...] -> [slots of the batch, ...], zero where there is no chunk."""
        return torch.where(self.there.view(-1, *(x.dim() - 1) * (1,)), x[self.slots], 0.0)

    def put_starts(self, x: Tensor, found: Tensor) -> None:
        """The same in the other direction; `found` is zero where there is no chunk."""
        x.index_add_(0, self.slots, found)


def batches(at: Layout, chunks: list[int]) -> list[Batch]:
    """chunks: the most that each document may have."""
    found: list[list[int]] = []
    filled = 0
    for i in sorted(range(len(chunks)), key=chunks.__getitem__, reverse=True):
        if found and (len(found[-1]) + 1) * chunks[found[-1][0]] <= SLACK * (filled + chunks[i]):
            found[-1].append(i)
            filled += chunks[i]
        else:
            found.append([i])
            filled = chunks[i]
    return [Batch.of(at, documents, chunks[documents[0]]) for documents in found]


def forward(call: DeepCall, scale: Tensor, parts: list[Batch]) -> Result:
    """`forward.forward` of all batches; of the call itself where there are none."""
    if not parts:
        return deep_forward.forward(call, scale)
    at, heads = call.at, call.shape[0]

    def starts(group: list[Tensor]) -> list[Tensor]:
        return [x.new_zeros(at.count, *x.shape[1:]) for x in group]

    ends = [torch.empty_like(x) for x in (*call.w, *call.s, scale)]
    all_starts = [*starts(call.w), *starts(call.s), scale.new_zeros(at.count, heads)]
    y = call.eta.new_zeros(*call.q.shape[:-1], call.shape[2])
    for part in parts:
        found = deep_forward.forward(part.call(call), scale[part.rows])
        y += found.y
        for x, new in zip(ends, (*found.w, *found.s, found.scale), strict=True):
            x[part.rows] = new
        news = (*found.starts_w, *found.starts_s, found.scales)
        for x, new in zip(all_starts, news, strict=True):
            part.put_starts(x, new)
    n = len(call.w)
    *w_s, end = ends
    *starts_w_s, scales = all_starts
    return Result(y, w_s[:n], w_s[n:], end, starts_w_s[:n], starts_w_s[n:], scales)


def backward(
    call: DeepCall,
    starts_w: list[Tensor],
    starts_s: list[Tensor],
    scales: Tensor,
    dy: Tensor,
    dw: list[Tensor],
    ds: list[Tensor],
    dm: list[Tensor],
    dn: list[Tensor],
    d_scale: Tensor,
    d_start: Tensor,
    parts: list[Batch],
) -> Gradients:
    """`backward.backward` of all batches; of the call itself where there are none."""
    of_rows = (dw, ds, dm, dn, [d_scale], [d_start])
    if not parts:
        return deep_backward.backward(
            call, starts_w, starts_s, scales, dy, dw, ds, dm, dn, d_scale, d_start
        )
    rows = [[torch.empty_like(x) for x in group] for group in (dw, ds, [d_scale])]
    total: Gradients | None = None
    for part in parts:
        of_starts = ([part.starts(x) for x in group] for group in (starts_w, starts_s, [scales]))
        part_w, part_s, (part_scales,) = of_starts
        of_ends = ([x[part.rows] for x in group] for group in of_rows)
        part_dw, part_ds, part_dm, part_dn, (part_scale,), (part_start,) = of_ends
        found = deep_backward.backward(
            part.call(call), part_w, part_s, part_scales, dy, part_dw, part_ds, part_dm, part_dn,
            part_scale, part_start,
        )  # fmt: skip
        for group, news in zip(rows, (found.w, found.s, [found.scale]), strict=True):
            for x, new in zip(group, news, strict=True):
                x[part.rows] = new
        if total is None:
            total = found
            continue
        # Of tokens: zero at those of other batches.
        streams = (
            total.q,
            total.k,
            total.target,
            *total.gates,
            total.masses,
            total.weight,
            total.anchored,
        )
        news = (
            found.q,
            found.k,
            found.target,
            *found.gates,
            found.masses,
            found.weight,
            found.anchored,
        )
        for x, new in zip(streams, news, strict=True):
            if x is not None and new is not None:
                x += new
        for x, new in zip(total.anchors, found.anchors, strict=True):
            x += new
    assert total is not None
    return total._replace(w=rows[0], s=rows[1], scale=rows[2][0])
