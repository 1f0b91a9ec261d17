"""What a language model is trained on and judged by: cross entropy of the next token, in batches
whose documents may go on from those before.

B batch, L length of a crop, N pieces of documents in a packed batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from atlas_blocks import State, check
from atlas_blocks.recipes import text
from atlas_blocks.recipes.data.batches import Batch
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState

# Tokens of the held-out text that are read, at most.
HELD_OUT = 32_768


def next_byte_loss(model: LanguageModel, rows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of every token of rows [B, L + 1] after the first."""
    return batch_loss(model, Batch.of(rows), reduction=reduction)[0]


def batch_loss(
    model: LanguageModel,
    batch: Batch,
    carried: LanguageModelState | None = None,
    *,
    reduction: str = "mean",
) -> tuple[Tensor, LanguageModelState | None]:
    """Cross entropy in nats of a batch's targets; and of a batch that others go on from, the state
    after every crop [B], cut from the graph. carried: that of the batch before."""
    state = None if batch.before is None else _entering(model, batch, carried)
    logits, state = model(batch.tokens, state, cu_seqlens=batch.cu_seqlens)
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), reduction=reduction
    )
    return loss, None if batch.last is None else state[batch.last]


def _entering(
    model: LanguageModel, batch: Batch, carried: LanguageModelState | None
) -> LanguageModelState:
    """The state before every piece [N]: what is carried, or that of a beginning, in the graph."""
    assert batch.before is not None
    fresh = fresh_state(model, batch.tokens)
    if carried is None:
        return fresh[[0] * len(batch.before)]
    every = State.cat([fresh, carried])
    return every[batch.before + 1]


def fresh_state(model: LanguageModel, tokens: Tensor) -> LanguageModelState:
    """The state before the first of tokens [B, T], in the graph."""
    with torch.compiler.set_stance("force_eager"):
        return model(tokens[:, :0], detach_state=False).state


@torch.no_grad()
def mean_loss(model: LanguageModel, steps: Iterable[Sequence[Batch]]) -> float:
    """Cross entropy in nats of the targets of all steps, states carried where batches say so."""
    device = next(model.parameters()).device
    nats, count = 0.0, 0
    carried: list[LanguageModelState | None] = []
    training = model.training
    model.eval()
    for batches in steps:
        before, carried = carried, []
        for batch, state in itertools.zip_longest(batches, before):
            loss, state = batch_loss(model, batch.to(device), state, reduction="sum")
            carried.append(state)
            nats, count = nats + loss.item(), count + batch.targets.numel()
    model.train(training)
    return nats / count


def bits_per_token(
    model: LanguageModel, data: Tensor, *, length: int, batch: int = 16, limit: int = HELD_OUT
) -> float:
    """Mean bits per token over consecutive windows of the first `limit` tokens of data [N]."""
    windows = ([Batch.of(rows)] for rows in text.windows(data, batch, length, limit))
    return mean_loss(model, windows) / math.log(2)


def bits_per_byte(
    model: LanguageModel, data: Tensor, *, length: int, batch: int = 16, limit: int = HELD_OUT
) -> float:
    """`bits_per_token` where tokens are bytes. Raises ValueError for data other than uint8."""
    check.tensor("data", data, "[bytes]", (None,), (torch.uint8,))
    return bits_per_token(model, data, length=length, batch=batch, limit=limit)
