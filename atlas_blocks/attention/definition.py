"""Sliding-window attention: the definition over SDPA, the choice of a backend, rotary positions.

B batch, T queries, S keys (C = S - T of them cached), H heads, D head width, Dv value width,
P sink tokens, w window, b block of queries, n blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.attention import providers
from atlas_blocks.data import there
from atlas_blocks.float64 import float64_device

INTS = (torch.int32, torch.int64)
# Fastest first where there is a GPU; sdpa serves every call.
BACKENDS = ("flash", "xformers", "flex", "sdpa")
# Queries that share a call to SDPA, unless the window is longer: shorter blocks only add overhead.
MIN_BLOCK = 64


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 15), coordinate i paired with D/2 + i.

    x: [B, T, H, D], D even. positions: int [T] or [B, T]. Returns [B, T, H, D] in the dtype of x.
    Angles are computed in float64 (on the CPU for a device that has none), so that a score depends
    on the distance alone to the precision of x at any position below about 1e12; the product is at
    least float32.
    Raises ValueError on a wrong shape or dtype.
    """
    check.tensor("x", x, "[B, T, H, D]", (None, None, None, None))
    B, T, _, D = x.shape
    if D % 2:
        check.fail("x", "an even last axis D", D)
    per_row = isinstance(positions, Tensor) and positions.dim() == 2
    axes, sizes = ("[B, T]", (B, T)) if per_row else ("[T]", (T,))
    check.tensor("positions", positions, axes, sizes, INTS)
    device = float64_device(x.device)
    exponents = torch.arange(0, D, 2, dtype=torch.float64, device=device) / D
    angles = positions.to(device).double()[..., None, None] * base**-exponents  # [.., T, 1, D/2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(dtype).to(x.device) for t in (angles.cos(), angles.sin()))
    x1, x2 = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    valid: Tensor | None = None,
    first: Tensor | None = None,
    sink_q: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Causal softmax attention of each query over the last `window` keys, its own included.

    q: [B, T, H, D], any T >= 0. k: [B, S, H, D], v: [B, S, H, Dv], S >= T: the last T keys belong
    to the queries, the S - T before them are cache. All of one dtype, float64 to float16.
    window: None means every key up to the query's own.
    valid: int [B], how many of the cached keys are real (the last ones); None: all of them. Keep
    it on the CPU: its values are then checked, and equal ones served without a mask.
    first: int [T], for queries without cached keys: the earliest key that each one sees, where its
    packed document begins; None: key 0.
    sink_k: [H, P, D], sink_v: [H, P, Dv]: keys and values that every query sees besides its
    window. sink_q: [B, T, H, D], the queries they are scored with (None: q), so that sinks can be
    free of position while q is rotated.
    backend: one of BACKENDS, or "auto" for what `choose_backend` answers.
    Returns y [B, T, H, Dv] in the dtype of q; scores are scaled by D ** -0.5. Memory grows with
    T * window. Raises ValueError on wrong arguments and where `backend` cannot serve them.
    """
    _check(q, k, v, window, valid, first, sink_q, sink_k, sink_v)
    k, v, window, valid = _drop_unseen(q, k, v, window, valid)
    name, _ = _choose(backend, q, k, v, window, valid, first, (sink_q, sink_k, sink_v))
    T, D, Dv = q.shape[1], q.shape[3], v.shape[3]
    if T == 0:
        return v[:, :0]
    P = 0
    if sink_k is not None and sink_v is not None:
        P = sink_k.shape[1]
        if sink_q is not None:
            # Both pairs of queries and keys lie side by side in one wider head; the values are
            # padded to the same width because fused kernels want it.
            q, k, sink_k = torch.cat([q, sink_q], -1), F.pad(k, (0, D)), F.pad(sink_k, (D, 0))
            wide = max(2 * D, Dv)
            v, sink_v = F.pad(v, (0, wide - Dv)), F.pad(sink_v, (0, wide - Dv))
        k, v = _prepend(sink_k, k), _prepend(sink_v, v)
    run = _sdpa if name == "sdpa" else providers.RUN[name]
    return run(q, k, v, P, window, valid, first, D**-0.5)[..., :Dv]


def choose_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    valid: Tensor | None = None,
    first: Tensor | None = None,
    sink_q: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    backend: str = "auto",
) -> tuple[str, str]:
    """Which backend `sliding_window_attention` takes for these arguments, and why.

    Returns (name, reason); for "auto" the reason says why no faster one was taken. Raises
    ValueError on wrong arguments and where an explicit `backend` cannot serve them.
    """
    _check(q, k, v, window, valid, first, sink_q, sink_k, sink_v)
    k, v, window, valid = _drop_unseen(q, k, v, window, valid)
    return _choose(backend, q, k, v, window, valid, first, (sink_q, sink_k, sink_v))


def _choose(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    valid: Tensor | None,
    first: Tensor | None,
    sink_qkv: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[str, str]:
    check.choice("backend", backend, ("auto", *BACKENDS))
    tensors = [t for t in (q, k, v, *sink_qkv) if t is not None]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    sinks = len(tensors) > 3
    facts = (q, v, training, valid is not None, sinks, first is not None)
    if backend != "auto":
        if (reason := providers.why_not(backend, *facts)) is not None:
            check.fail("backend", f"one that can serve this call, {backend} cannot", reason)
        return backend, "asked for"
    if q.device.type != "cuda":
        return "sdpa", f"the others are fast on a GPU only, and q is on {q.device.type}"
    one_call = q.shape[1] == 1 or (window is None and k.shape[1] == q.shape[1])
    if one_call and valid is None and first is None and not sinks:
        return "sdpa", "no mask is needed, and SDPA runs a fused kernel of its own"
    refused: list[str] = []
    for name in BACKENDS:
        reason = providers.why_not(name, *facts)
        if reason is None and name == "flex" and (window is None or q.shape[1] <= MIN_BLOCK):
            reason = "no gain over a single SDPA call"
        if reason is None:
            return name, "; ".join(refused) or "the fastest"
        refused.append(f"not {name}: {reason}")
    raise AssertionError("sdpa serves every call")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    valid: Tensor | None,
    first: Tensor | None,
    sink_q: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
) -> None:
    check.tensor("q", q, "[B, T, H, D]", (None, None, None, None))
    (B, T, H, D), same = q.shape, ((q.dtype,), q.device)
    check.tensor("k", k, "[B, S, H, D]", (B, None, H, D), *same)
    S = k.shape[1]
    if S < T:
        check.fail("k", f"at least as many keys S as queries, T = {T}", S)
    check.tensor("v", v, "[B, S, H, Dv]", (B, S, H, None), *same)
    if window is not None:
        check.at_least("window", window, 1)
    if valid is not None:
        check.tensor("valid", valid, "[B]", (B,), INTS)
        counts = valid.tolist() if _readable(valid) else []
        if not all(0 <= n <= S - T for n in counts):
            check.fail("valid", f"counts of cached keys, 0 to S - T = {S - T}", counts)
    if first is not None:
        check.tensor("first", first, "[T]", (T,), INTS, q.device)
        if S > T:
            check.fail("first", f"None with S - T = {S - T} cached keys", "a tensor")
    if (sink_k is None) != (sink_v is None):
        check.fail("sink_v", "sink_k and sink_v both or neither", "one of them")
    if sink_k is not None:
        check.tensor("sink_k", sink_k, "[H, P, D]", (H, None, D), *same)
        check.tensor("sink_v", sink_v, "[H, P, Dv]", (H, sink_k.shape[1], v.shape[3]), *same)
    if sink_q is not None:
        if sink_k is None:
            check.fail("sink_q", "None without sink_k and sink_v", "a tensor")
        check.tensor("sink_q", sink_q, "[B, T, H, D]", tuple(q.shape), *same)


def _readable(valid: Tensor) -> bool:
    """Values may be looked at without waiting for a GPU and without breaking a traced graph."""
    return there(valid) and valid.device.type == "cpu" and not torch.compiler.is_compiling()


def _drop_unseen(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, int | None, Tensor | None]:
    """The same attention without cached keys that no query sees, and with no idle argument."""
    T, C = q.shape[1], k.shape[1] - q.shape[1]
    keep = C if window is None else min(C, window - 1)
    if valid is not None:
        valid = valid.clamp(max=keep)
        if C == 0:
            valid = None
        elif _readable(valid) and len(counts := set(valid.tolist())) <= 1:
            keep, valid = max(counts, default=0), None
        else:
            valid = valid.to(q.device)
    k, v = k[:, C - keep :], v[:, C - keep :]
    return k, v, None if window is None or window >= keep + T else window, valid


def _prepend(sink: Tensor, x: Tensor) -> Tensor:
    """[H, P, D] in front of each row of [B, S, H, D]."""
    return torch.cat([sink.transpose(0, 1).expand(x.shape[0], -1, -1, -1), x], dim=1)


# The backends. Each takes k and v with P sink tokens in front: [B, P + C + T, H, D].


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    P: int,
    window: int | None,
    valid: Tensor | None,
    first: Tensor | None,
    scale: float,
) -> Tensor:
    """The definition: SDPA with a band mask over blocks of queries."""
    B, T = q.shape[:2]
    C = k.shape[1] - T - P
    if window is None:
        return _causal(q, k, v, P, valid, first, scale)
    b = max(window, MIN_BLOCK)
    # The first block alone sees the cache.
    head = min(b, T)
    since = None if first is None else first[:head]
    mask = _visible(head, C, P, window, valid, since, q.device)
    y = _attend(q[:, :head], k[:, : P + C + head], v[:, : P + C + head], mask, scale)
    if head == T:
        return y
    # Each later block sees its own b keys, the last `window` of the block before, and the sinks.
    n = -(-T // b)

    def block_keys(x: Tensor) -> Tensor:
        sinks, x = x[:, None, :P].expand(-1, n - 1, -1, -1, -1), _blocks(x[:, P + C :], n, b)
        return torch.cat([sinks, x[:, :-1, b - window :], x[:, 1:]], dim=2).flatten(0, 1)

    queries = _blocks(q, n, b)[:, 1:].flatten(0, 1)
    if first is not None:
        # Counted from the block's first key.
        blocks = F.pad(first, (0, n * b - T)).view(n, b)
        since = (blocks - b * torch.arange(n, device=q.device)[:, None])[1:, None].repeat(B, 1, 1)
    mask = _visible(b, window, P, window, None, since, q.device)
    rest = _attend(queries, block_keys(k), block_keys(v), mask, scale)
    rest = rest.unflatten(0, (B, n - 1)).flatten(1, 2)
    return torch.cat([y, rest[:, : T - b]], dim=1)


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    P: int,
    valid: Tensor | None,
    first: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention over every earlier key."""
    T, lead = q.shape[1], k.shape[1] - q.shape[1]
    if valid is None and T == 1:
        return _attend(q, k, v, None, scale)
    if valid is None and first is None and lead <= T:
        # Idle queries in front line the diagonal up, and no mask need exist.
        q = F.pad(q, (0, 0, 0, 0, lead, 0))
        return _attend(q, k, v, None, scale, is_causal=True)[:, lead:]
    return _attend(q, k, v, _visible(T, lead - P, P, None, valid, first, q.device), scale)


def _blocks(x: Tensor, n: int, b: int) -> Tensor:
    """[B, T, H, D] -> [B, n, b, H, D], zeros behind."""
    return F.pad(x, (0, 0, 0, 0, 0, n * b - x.shape[1])).unflatten(1, (n, b))


def _visible(
    T: int,
    C: int,
    P: int,
    window: int | None,
    valid: Tensor | None,
    first: Tensor | None,
    device: torch.device,
) -> Tensor:
    """True where query i sees key j of [P sinks, C earlier, T own]: [T, P+C+T] or [B, 1, T, ..].

    first: [T] or [B, 1, T], 0 is the first of the own keys.
    """
    i = torch.arange(T, device=device)[:, None]
    j = torch.arange(-P - C, T, device=device)
    seen = j <= i
    if window is not None:
        seen = seen & (j > i - window)
    if valid is not None:
        seen = seen & (j >= -valid[:, None, None, None])
    if first is not None:
        seen = seen & (j >= first[..., None])
    return seen | (j < -C)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    return y.transpose(1, 2)
