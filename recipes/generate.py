"""Sampling from a language model: the prompt is read once, in pieces, then one token at a time.

B batch, T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState

# Tokens of a prompt that are read at a time.
PIECE = 2048


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row. logits [B, V] -> [B]. temperature 0 takes the likeliest.

    top_p keeps the smallest set of tokens whose probabilities reach it, and at least one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1)
    ranked, order = probabilities.sort(dim=-1, descending=True)
    # Kept while the likelier tokens have not reached top_p yet.
    kept = ranked.cumsum(-1) - ranked < top_p
    kept[:, 0] = True
    choice = torch.multinomial(ranked * kept, 1, generator=generator)
    return order.gather(-1, choice).squeeze(-1)


@torch.no_grad()
def prefill(
    model: LanguageModel,
    prompt: Tensor,
    state: LanguageModelState | None = None,
    *,
    piece: int = PIECE,
) -> tuple[Tensor, LanguageModelState]:
    """Read prompt int [B, T], T >= 1, after `state`: logits [B, V] of what comes next, and the
    state.

    piece: tokens read at a time; memory grows with it and not with T. Raises ValueError on a
    wrong prompt or a state that does not fit it.
    """
    check.tensor("prompt", prompt, "[B, T]", (None, None), (torch.int64, torch.int32))
    if prompt.shape[0] < 1 or prompt.shape[1] < 1:
        check.fail("prompt", "at least one row of at least one token", list(prompt.shape))
    check.at_least("piece", piece, 1)
    vocab = model.config.vocab_size
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab:
        check.fail("prompt", f"tokens in [0, {vocab - 1}]", f"{low} to {high}")
    last = None
    for part in prompt.split(piece, 1):
        logits, state = model(part, state)
        # A copy, or the logits of the whole piece would stay.
        last = logits[:, -1].clone()
    assert last is not None
    assert state is not None
    return last, state


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    state: LanguageModelState | None = None,
    piece: int = PIECE,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` times the next token [B] of every row of `prompt` int [B, T], T >= 1.

    The state is carried, so a token costs the same however long the text already is. state: of
    what was read before the prompt, as `prefill` returns it; it stays as it is. piece: see
    `prefill`. Raises ValueError, at once, on a wrong prompt, state, or a temperature or top_p out
    of range.
    """
    check.at_least("max_new_tokens", max_new_tokens, 0)
    check.between("temperature", temperature, 0, 100)
    check.between("top_p", top_p, 0, 1)
    logits, state = prefill(model, prompt, state, piece=piece)
    return _continued(model, logits, state, max_new_tokens, temperature, top_p, seed)


@torch.no_grad()
def _continued(
    model: LanguageModel,
    logits: Tensor,
    state: LanguageModelState,
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[Tensor]:
    generator = torch.Generator(logits.device).manual_seed(seed)
    for index in range(count):
        token = pick(logits, temperature, top_p, generator)
        yield token
        if index + 1 < count:
            after, state = model(token[:, None], state)
            logits = after[:, -1]


def generate(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    state: LanguageModelState | None = None,
    piece: int = PIECE,
) -> Tensor:
    """The prompt and its continuation, int64 [B, T + N]. Arguments and errors: see `stream`."""
    new = stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        state=state,
        piece=piece,
    )
    return torch.cat([prompt.long(), *(token[:, None] for token in new)], dim=1)
