"""Sampling from a language model: the prompt is read once, then one token at a time.

B batch, T prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes.model import LanguageModel


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
def stream(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield `max_new_tokens` times the next token [B] of every row of `prompt` int [B, T], T >= 1.

    The state is carried, so a token costs the same however long the text already is.
    Raises ValueError on a wrong prompt or a temperature or top_p out of range.
    """
    check.tensor("prompt", prompt, "[B, T]", (None, None), (torch.int64, torch.int32))
    if prompt.shape[0] < 1 or prompt.shape[1] < 1:
        check.fail("prompt", "at least one row of at least one token", list(prompt.shape))
    vocab = model.config.vocab_size
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocab:
        check.fail("prompt", f"tokens in [0, {vocab - 1}]", f"{low} to {high}")
    check.at_least("max_new_tokens", max_new_tokens, 0)
    check.between("temperature", temperature, 0, 100)
    check.between("top_p", top_p, 0, 1)
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens, state = prompt, None
    for _ in range(max_new_tokens):
        logits, state = model(tokens, state)
        token = pick(logits[:, -1], temperature, top_p, generator)
        yield token
        tokens = token[:, None]


def generate(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """The prompt and its continuation, int64 [B, T + N]. Arguments and errors: see `stream`."""
    new = stream(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return torch.cat([prompt.long(), *(token[:, None] for token in new)], dim=1)
