"""Maps that a memory learns online from pairs of input and output (ATLAS, section 6.4).

A sequence has a map of its own, drawn anew. A memory reads its pairs once, in order, and is asked
for every output before it sees it. Nothing else is trained: how well it does says what the memory
can represent, and how fast its inner optimizer learns.

B batch, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import check


@dataclasses.dataclass(frozen=True)
class MapTask:
    """kind: "low-rank", o = X Y i; "mlp", o = MLP(i), one hidden layer with GELU; "attention",
    o = MLP(a) of causal attention a over the inputs; "attention-input", o = MLP(a) where a is also
    what is given; "window", as "attention" over the last `window` inputs.

    length: pairs. rank: of the low-rank map. hidden: units of the MLP over `dim`. Inputs are
    normally distributed with |i|^2 = 1 in the mean, and so are outputs in size.
    Raises ValueError for what is out of range.
    """

    kind: str = "mlp"
    length: int = 4096
    dim: int = 256
    rank: int = 16
    hidden: int = 1
    window: int = 512

    def __post_init__(self) -> None:
        check.choice("kind", self.kind, KINDS)
        for name in ("length", "dim", "rank", "hidden", "window"):
            check.at_least(name, getattr(self, name), 1)
        if self.kind == "low-rank" and self.rank > self.dim:
            check.fail("rank", f"at most dim = {self.dim}", self.rank)

    @property
    def chance(self) -> float:
        """The error of a memory that answers with zero."""
        return 1.0

    def curriculum(self) -> tuple[MapTask, ...]:
        """Every kind, from the easiest."""
        return tuple(dataclasses.replace(self, kind=kind) for kind in KINDS)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """inputs and outputs, float32 [B, T, D]; every row has a map of its own."""

        def draw(*shape: int) -> Tensor:
            # Of inputs of |x|^2 = n it makes outputs of about as many.
            return torch.randn(batch, *shape, generator=generator) / shape[-1] ** 0.5

        inputs = self.dim**0.5 * draw(self.length, self.dim)
        inputs, outputs = KINDS[self.kind](self, inputs, draw)
        return _of_size_one(inputs), _of_size_one(outputs)


def error(answers: Tensor, outputs: Tensor) -> Tensor:
    """|y - o|^2 / |o|^2 of each pair [B, T], of [B, T, D]."""
    return (answers - outputs).square().sum(-1) / outputs.square().sum(-1)


def _of_size_one(x: Tensor) -> Tensor:
    """Scaled, all pairs of a sequence alike, so that the mean of |x|^2 is 1."""
    return x * x.square().sum(-1).mean(-1)[:, None, None].rsqrt()


Draw = Callable[..., Tensor]
Pairs = tuple[Tensor, Tensor]


def _low_rank(task: MapTask, x: Tensor, draw: Draw) -> Pairs:
    inner = x @ draw(task.rank, task.dim).mT
    return x, inner @ draw(task.dim, task.rank).mT


def _mlp(task: MapTask, x: Tensor, draw: Draw) -> Pairs:
    units = task.hidden * task.dim
    return x, F.gelu(x @ draw(units, task.dim).mT) @ draw(task.dim, units).mT


def _attended(task: MapTask, x: Tensor, draw: Draw, window: int | None) -> Tensor:
    """Causal attention [B, T, D] with one head over the last `window` inputs."""
    q, k, v = (x @ draw(task.dim, task.dim).mT for _ in range(3))
    mask = torch.ones(task.length, task.length, dtype=torch.bool).tril()
    if window is not None:
        mask &= ~mask.tril(-window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attention(task: MapTask, x: Tensor, draw: Draw) -> Pairs:
    return x, _mlp(task, _attended(task, x, draw, None), draw)[1]


def _attention_input(task: MapTask, x: Tensor, draw: Draw) -> Pairs:
    return _mlp(task, _attended(task, x, draw, None), draw)


def _window(task: MapTask, x: Tensor, draw: Draw) -> Pairs:
    return x, _mlp(task, _attended(task, x, draw, task.window), draw)[1]


KINDS: dict[str, Callable[[MapTask, Tensor, Draw], Pairs]] = {
    "low-rank": _low_rank,
    "mlp": _mlp,
    "attention-input": _attention_input,
    "window": _window,
    "attention": _attention,
}
