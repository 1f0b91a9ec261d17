"""What masks and positions of transformers say of a batch: padding, documents packed in its rows.

B rows, T new tokens, P tokens in the cache before them, S = P + T.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.blocks.padding import Padding, run_padded
from atlas_blocks.recipes.hugging_face.cache import StateLayer

MASK = "a causal mask with padding (that in the cache too) or documents one after another"
BAND = f"{MASK}, within the window of {{}}"
POSITIONS = "counting on by 1 from token to token, padding apart"


class Places(NamedTuple):
    """Where the documents of a padded or packed batch lie.

    padding: None where every new token is there and goes on from its row's state. own [B, T]: the
    new tokens that are there; real [B, S], offset [B]: for the cache.
    """

    padding: Padding | None
    own: Tensor
    real: Tensor
    offset: Tensor | None


def places_of(
    mask: Any,
    positions: Tensor | None,
    x: Tensor,
    past: StateLayer | None,
    window: int | None = None,
) -> Places | None:
    """Where the real tokens of x [B, T, ...] lie; None where the batch can be run as it is.

    mask: None, [B, S] with 1 where a token is real, or what may be seen [B, 1, T, S]. window: of
    the attention that the mask is for; it may then leave out tokens that are out of the window.
    Raises ValueError for masks and positions that are neither causal, padded nor packed.
    """
    (B, T), device = x.shape[:2], x.device
    known, P = (None, 0) if past is None else (past.real, past.length)
    visible = row = None
    if isinstance(mask, Tensor) and mask.shape == (B, P + T):
        row = mask.to(device).bool()
    elif mask is not None:
        visible = _visible(mask, B, T, P, window).to(device)
    positions = None if positions is None else positions.to(device)
    plain = _plain(visible, row, positions, T, P, past is not None, window)
    if torch.compiler.is_compiling():
        # Compiled, nothing is read on the host: what is not plain fails as the graph runs.
        if known is not None:
            check.fail("past_key_values", "a cache without padding in a compiled model", "padding")
        if plain is not None:
            message = "attention_mask, position_ids: a compiled model takes neither padding nor "
            message += "packed documents; run this batch uncompiled"
            torch.ops.aten._assert_async.msg(plain, message)
        return None
    if known is None and (plain is None or bool(plain)):
        return None
    return _documents(visible, row, positions, x, past, window)


def run_placed(
    call: Any, x: Tensor, state: Any, places: Places | None, cached: bool
) -> tuple[Tensor, Any]:
    """`call(x, state, cu_seqlens) -> y, state` over x [B, T, ...]; y is 0 at padding.

    cached: every row is one document, whose state goes on; else there is none.
    """
    padding = None if places is None else places.padding
    if padding is None:
        return call(x, state, None)
    if cached or not len(padding.index):
        return run_padded(call, x, state, padding)
    y, _ = call(padding.packed(x), None, padding.cu_seqlens)
    return padding.padded(y, x.shape[:2]), None


def held(y: Tensor, own: Tensor, last: Tensor | None) -> Tensor:
    """y [B, T, dim] with the last token's at padding after it, last [B, dim] that of before."""
    there = own.cumsum(1) > 0
    found = y.gather(1, _latest(own)[..., None].expand_as(y))
    before = torch.zeros_like(y) if last is None else last.to(y)[:, None].expand_as(y)
    return torch.where(there[..., None], found, before)


def _visible(mask: Any, B: int, T: int, P: int, window: int | None) -> Tensor:
    """Which of S tokens each new one may see, as a mask of transformers says [B, T, S]."""
    S = P + T
    fewest = S if window is None else min(S, window - 1 + T)
    if (
        isinstance(mask, Tensor)
        and mask.ndim == 4
        and mask.shape[0] in (1, B)
        and mask.shape[1:3] == (1, T)
        and fewest <= mask.shape[3] <= S
    ):
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        # A cache that has let tokens go has none of them in its mask.
        return F.pad(seen, (S - seen.shape[2], 0)).expand(B, T, S)
    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    check.fail("attention_mask", f"None or a tensor [{B}, 1, {T}, {S}] or [{B}, {S}]", got)


def _causal(T: int, S: int, device: torch.device, window: int | None) -> Tensor:
    steps = torch.arange(S, device=device)
    new = steps[S - T :, None]
    return (steps <= new) if window is None else (steps <= new) & (steps > new - window)


def _plain(
    visible: Tensor | None,
    row: Tensor | None,
    positions: Tensor | None,
    T: int,
    P: int,
    cached: bool,
    window: int | None,
) -> Tensor | None:
    """Whether each row is one sequence from its first token on; None: nothing says otherwise.

    Padding at the right does not matter where no state is kept: no real token sees it.
    """
    parts = []
    if positions is not None:
        steps = torch.arange(P, P + T, device=positions.device)
        right = positions == steps
        if row is not None:
            right = right | ~row[:, P:]
        parts.append(right.all())
    if row is not None:
        parts.append(row.all() if cached else (row[:, 1:] <= row[:, :-1]).all())
    if visible is not None:
        own = visible.diagonal(P, 1, 2)
        causal = _causal(T, P + T, visible.device, window)
        parts.append(((visible == causal) | ~own[..., None]).all())
        parts += [own.all()] if cached else []
    return torch.stack(parts).all() if parts else None


def _documents(
    visible: Tensor | None,
    row: Tensor | None,
    positions: Tensor | None,
    x: Tensor,
    past: StateLayer | None,
    window: int | None,
) -> Places:
    B, T = x.shape[:2]
    P = 0 if past is None else past.length
    steps = torch.arange(P + T, device=x.device)
    known = torch.ones(B, P, dtype=torch.bool, device=x.device)
    if past is not None and past.real is not None:
        known = past.real.to(x.device)
    own = torch.ones(B, T, dtype=torch.bool, device=x.device)
    if visible is not None:
        own = visible.diagonal(P, 1, 2)
    elif row is not None:
        own = row[:, P:]
    counted = None if positions is None else positions.expand(B, T)
    first = own & (own.cumsum(1) == 1)
    heads, start = first, torch.zeros(B, T, dtype=torch.int64, device=x.device)
    if past is None:
        if visible is not None and (window is None or counted is None):
            # A document begins at a token that sees none before it.
            heads = own & (visible.int().argmax(-1) == steps)
        elif counted is not None:
            heads = first | (own & _restarts(counted, own))
        start = _latest(heads)

    real = torch.cat([known, own], 1)
    if visible is not None:
        seen = _causal(T, P + T, x.device, window) & real[:, None]
        expected = seen & (steps >= start[..., None])
        # What padding sees does not matter.
        fits = ((visible == expected).all(-1) | ~own).all()
    else:
        fits = (known if row is None else row[:, :P] == known).all()
    if not bool(fits):
        check.fail("attention_mask", MASK if window is None else BAND.format(window), "another")
    offset = None if past is None else past.offset
    if counted is not None:
        offset = _offset(counted, start, heads, own, real, past)
    goes_on = past is not None and bool(own.all())
    return Places(None if goes_on else Padding.of(own, heads), own, real, offset)


def _restarts(positions: Tensor, own: Tensor) -> Tensor:
    """Whether a token's position is no further than that of the last real one before [B, T]."""
    before = _latest(own)[:, :-1]
    further = positions[:, 1:] > positions.gather(1, before)
    return torch.cat([torch.zeros_like(own[:, :1]), ~further], 1)


def _latest(marks: Tensor) -> Tensor:
    """The place of the last mark up to every token, 0 before the first [B, T]."""
    places = torch.arange(marks.shape[1], device=marks.device)
    return torch.where(marks, places, 0).cummax(1).values


def _offset(
    positions: Tensor,
    start: Tensor,
    heads: Tensor,
    own: Tensor,
    real: Tensor,
    past: StateLayer | None,
) -> Tensor:
    """What each row's positions are ahead of its tokens' numbers [B], if that is one number in
    every document: rotary positions count from anywhere."""
    T = own.shape[1]
    ahead = positions + 1 - real.cumsum(1)[:, -T:]
    offset = ahead.gather(1, heads.int().argmax(1, keepdim=True))[:, 0]
    if past is None:
        same = ahead == ahead.gather(1, start)
    else:
        before = torch.zeros_like(offset) if past.offset is None else past.offset
        offset = torch.where(real[:, :-T].any(1), before, offset)
        same = ahead == offset[:, None]
    if not bool((same | ~own).all()):
        kept = "" if past is None else "; packed documents need use_cache=False"
        check.fail("position_ids", POSITIONS + kept, positions.tolist())
    return offset
