"""Grouped-query attention (arXiv 2305.13245): heads of queries share heads of keys and values."""

from __future__ import annotations

from torch import Tensor

from atlas_blocks import check


def kv_head_count(kv_heads: int | None, heads: int) -> int:
    """Heads of keys and values, as many as those of queries where None is asked for. Raises
    ValueError where they do not divide them."""
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        check.fail("kv_heads", f"a divisor of heads = {heads}", kv_heads)
    return kv_heads


def for_every_query(t: Tensor, heads: int, axis: int) -> Tensor:
    """Keys or values with G heads on this axis: one for each of `heads` of queries."""
    shares = heads // t.shape[axis]
    return t if shares == 1 else t.repeat_interleave(shares, axis)
