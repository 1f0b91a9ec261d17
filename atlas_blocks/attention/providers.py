"""Faster providers of sliding-window attention, and what each cannot serve.

B batch, T queries, S keys (P sink tokens, then C cached, then T own), H heads, D width, w window.
A provider takes q [B, T, H, D], k and v [B, S, H, D]; optional packages are imported when used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# FlexAttention's own default tile.
TILE = 128


# Looked up once, without importing: a constant to torch.compile.
INSTALLED = {
    package: importlib.util.find_spec(package) is not None for package in ("flash_attn", "xformers")
}


def why_not(
    name: str, q: Tensor, v: Tensor, training: bool, mixed: bool, sinks: bool, packed: bool
) -> str | None:
    """Why the backend `name` cannot serve a call, or None where it can."""
    device = q.device.type
    if name == "sdpa":
        return None
    if name == "flex":
        if device not in ("cpu", "cuda"):
            return f"FlexAttention runs on cpu and cuda, and q is on {device}"
        if device == "cpu" and training:
            return "FlexAttention has no backward on a CPU, and a gradient is needed"
        if q.dtype == torch.float64:
            return "FlexAttention takes no float64"
        if device == "cuda" and min(q.shape[3], v.shape[3]) < 16:
            return f"FlexAttention needs heads of width >= 16, got {min(q.shape[3], v.shape[3])}"
        return None
    # flash_attn and xformers (which calls the same kernels) have the same limits.
    package = {"flash": "flash_attn", "xformers": "xformers"}[name]
    if device != "cuda":
        return f"{package} needs a CUDA device, and q is on {device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{package} takes float16 and bfloat16, and q is {q.dtype}"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 256:
        return f"{package} needs one width, a multiple of 8 up to 256, for keys and values"
    if sinks:
        return f"{package} has no sink tokens"
    if packed:
        return f"{package} takes packed documents as numbers, which would have to be waited for"
    if mixed:
        return f"{package} has no mask for rows with different (or, on a GPU, unknown) valid"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"{package} needs compute capability 8.0 or higher"
    return None if INSTALLED[package] else f"the package {package} is not installed"


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    P: int,
    window: int | None,
    valid: Tensor | None,
    first: Tensor | None,
    scale: float,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    C = S - T - P

    # Captured as tensors: as integers each length would be a graph of its own, and the C++
    # template of torch 2.13 takes no symbolic ones.
    def scalar(n: int) -> Tensor:
        return torch.full((), n, device=q.device)

    lead, cached = scalar(P + C), scalar(C)
    reach = scalar(S if window is None else window)
    oldest = -(cached.repeat(B) if valid is None else valid.long())

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        j = j - lead
        seen = (j <= i) & (j > i - reach) & (j >= oldest[batch])
        if first is not None:
            seen = seen & (j >= first[i])
        return seen | (j < -cached)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    mask = _tiles(T, P, C, window, visible, q.device)
    return attend(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention on its own writes out every score; compiled it is the fused kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def _tiles(
    T: int,
    P: int,
    C: int,
    window: int | None,
    visible: Callable[..., Tensor],
    device: torch.device,
) -> BlockMask:
    """Which tiles of keys each tile of queries visits.

    Written down from the band: create_block_mask would evaluate all T * S pairs first. The table
    has one entry for each pair of tiles, T * S / TILE**2 of them.
    """
    from torch.nn.attention.flex_attention import BlockMask

    S = P + C + T
    n_q, n_k = -(-T // TILE), -(-S // TILE)
    first_query = torch.arange(n_q, device=device)[:, None] * TILE
    last = (P + C + first_query + TILE - 1).clamp(max=S - 1) // TILE
    oldest = P + C + first_query - (S if window is None else window - 1)
    start = oldest.clamp(min=0) // TILE
    sinks = start.clamp(max=-(-P // TILE))
    tile = torch.arange(n_k, device=device)
    # The sinks' tiles come first, then the band's; entries past the count are not read.
    indices = torch.where(tile < sinks, tile, start + tile - sinks).clamp(max=n_k - 1)
    counts = (sinks + last - start + 1)[:, 0]
    return BlockMask.from_kv_blocks(
        counts.int()[None, None],
        indices.int()[None, None],
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(T, S),
    )


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    P: int,
    window: int | None,
    valid: Tensor | None,
    first: Tensor | None,
    scale: float,
) -> Tensor:
    flash_attn = importlib.import_module("flash_attn")
    left, right = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn.flash_attn_func(
        q, k, v, softmax_scale=scale, causal=True, window_size=(left, right)
    )


def _xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    P: int,
    window: int | None,
    valid: Tensor | None,
    first: Tensor | None,
    scale: float,
) -> Tensor:
    fmha = importlib.import_module("xformers.ops.fmha")
    bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()
    if window is not None:
        bias = bias.make_local_attention(window)
    return fmha.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


RUN: dict[str, Callable[..., Tensor]] = {"flash": _flash, "xformers": _xformers, "flex": _flex}
