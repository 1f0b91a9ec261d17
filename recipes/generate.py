"""Sampling from a language model: prompts are read once, in pieces, then one token at a time.

B batch, T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import State, check
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState
from atlas_blocks.recipes.rows import Rows
from atlas_blocks.recipes.sampling import Continuation, Sampling, choose

# Tokens of a prompt that are read at a time.
PIECE = 2048
# In the place of a token, of a row that has ended.
ENDED = -1


@torch.no_grad()
def prefill(
    model: LanguageModel,
    prompt: Tensor | Sequence[Tensor],
    state: LanguageModelState | None = None,
    *,
    piece: int = PIECE,
) -> tuple[Tensor, LanguageModelState]:
    """Read a prompt int [B, T], or B prompts [T] of their own lengths, each at least one token,
    after `state`: logits [B, V] of what comes next, and the state.

    Prompts of unequal length are packed. piece: tokens read at a time, of one row or of all that
    are packed; memory grows with it and not with T. Raises ValueError on a wrong prompt or a state
    that does not fit it.
    """
    check.at_least("piece", piece, 1)
    rows = _rows(model, prompt)
    if len({len(row) for row in rows}) > 1:
        return _packed(model, rows, state, piece)
    last = None
    for part in torch.stack(rows).split(piece, 1):
        logits, state = model(part, state)
        # A copy, or the logits of the whole piece would stay.
        last = logits[:, -1].clone()
    assert last is not None
    assert state is not None
    return last, state


def _rows(model: LanguageModel, prompt: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The prompts one by one, checked."""
    integers = (torch.int64, torch.int32)
    if isinstance(prompt, Tensor):
        check.tensor("prompt", prompt, "[B, T]", (None, None), integers)
    elif not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)):
        check.fail("prompt", "int [B, T], or a list of int [T]", type(prompt).__name__)
    rows = list(prompt)
    for row in rows:
        check.tensor("prompt", row, "[T]", (None,), integers)
    shapes = [len(row) for row in rows]
    if not rows or min(shapes) < 1:
        check.fail("prompt", "at least one row of at least one token", shapes)
    vocab = model.config.vocab_size
    low = min(int(row.min()) for row in rows)
    high = max(int(row.max()) for row in rows)
    if low < 0 or high >= vocab:
        check.fail("prompt", f"tokens in [0, {vocab - 1}]", f"{low} to {high}")
    return rows


def _packed(
    model: LanguageModel, rows: list[Tensor], state: LanguageModelState | None, piece: int
) -> tuple[Tensor, LanguageModelState]:
    """`prefill` of unequal prompts: as many tokens of each in a call, until it is read."""
    reading, at = list(range(len(rows))), 0
    last: dict[int, Tensor] = {}
    done: dict[int, LanguageModelState] = {}
    while reading:
        step = max(1, piece // len(reading))
        parts = [rows[i][at : at + step] for i in reading]
        bounds = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        logits, after = model(torch.cat(parts)[None], state, cu_seqlens=bounds)
        at += step
        over = [n for n, i in enumerate(reading) if len(rows[i]) <= at]
        for n in over:
            last[reading[n]] = logits[0, int(bounds[n + 1]) - 1].clone()
            done[reading[n]] = after[[n]]
        going = [n for n in range(len(reading)) if n not in over]
        reading, state = [reading[n] for n in going], after[going]
    order = range(len(rows))
    return torch.stack([last[i] for i in order]), State.cat([done[i] for i in order])


def stream(
    model: LanguageModel,
    prompt: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    stopped: Callable[[int, int], bool] | None = None,
    state: LanguageModelState | None = None,
    piece: int = PIECE,
) -> Iterator[Tensor]:
    """Yield the next token [B] of every row, ENDED for a row that has none, until all have ended.

    prompt: int [B, T], or a list of B prompts [T] of their own lengths. The state is carried, so a
    token costs the same however long the text already is. temperature to stop_ids: see `Sampling`.
    seed: one for each row; a number is that of the first row, the next row's is one more. stopped:
    called with a row's number and its token; True makes it the row's last. state: of what was read
    before the prompt, as `prefill` returns it; it stays as it is. piece: see `prefill`. Raises
    ValueError, at once, on a wrong prompt, state or setting.
    """
    rows = _rows(model, prompt)
    seeds = [seed + i for i in range(len(rows))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(rows):
        check.fail("seed", f"{len(rows)} numbers, one for each row", len(seeds))
    settings = [
        Sampling(max_new_tokens, temperature, top_p, repetition_penalty, one, tuple(stop_ids))
        for one in seeds
    ]
    logits, state = prefill(model, prompt, state, piece=piece)
    return _continued(model, rows, logits, state, settings, stopped)


@torch.no_grad()
def _continued(
    model: LanguageModel,
    prompts: list[Tensor],
    logits: Tensor,
    state: LanguageModelState,
    settings: list[Sampling],
    stopped: Callable[[int, int], bool] | None,
) -> Iterator[Tensor]:
    vocab, batch = model.config.vocab_size, Rows(model)
    both = zip(settings, prompts, strict=True)
    sequences = [Continuation(sampling, prompt, vocab) for sampling, prompt in both]
    going = [i for i, s in enumerate(settings) if s.max_new_tokens > 0]
    if going:
        batch.join([state[going]])
    logits = logits[going]
    while going:
        column = torch.full((len(sequences),), ENDED)
        tokens = choose(logits, [sequences[i] for i in going])
        column[going] = torch.tensor(tokens)
        ended = [
            (stopped is not None and stopped(i, token)) | (sequences[i].take(token) is not None)
            for i, token in zip(going, tokens, strict=True)
        ]
        yield column.to(logits.device)
        left = [n for n, end in enumerate(ended) if not end]
        going, tokens = [going[n] for n in left], [tokens[n] for n in left]
        if going:
            batch.keep(left)
            logits = batch.step(tokens)


def generate(
    model: LanguageModel,
    prompt: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] = (),
    state: LanguageModelState | None = None,
    piece: int = PIECE,
) -> Tensor:
    """The prompt and its continuation, int64 [B, T + N]. Arguments and errors: see `stream`.

    Of prompts of unequal length T is that of the longest: every row begins with its own prompt and
    goes on with its new tokens, and ENDED fills up what is left of it.
    """
    new = list(
        stream(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop_ids=stop_ids,
            state=state,
            piece=piece,
        )
    )
    rows = []
    for i, start in enumerate(prompt):
        added = [column[i] for column in new if column[i] != ENDED]
        rows.append(torch.cat([start.long(), torch.stack(added)]) if added else start.long())
    length = max(len(start) for start in prompt) + len(new)
    return torch.stack([F.pad(row, (0, length - len(row)), value=ENDED) for row in rows])
