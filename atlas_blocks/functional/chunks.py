"""The part of the dual form that needs no memory, computed for all chunks of a call at once.

B batch, T tokens, H heads, G = B H; Dk, Dv key and value width, Dphi width after the feature map;
c window, b chunk, N chunks, L tokens of a chunk (b, or less at the ends), E = e + L keys that a
chunk sees, e of them before it, L' tokens of the chunk so far. Per chunk: A decay matrix,
C = Theta Gam window weights after momentum, P = A diag(eta), see specification section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks.functional.features import FeatureMap, PolynomialMap
from atlas_blocks.functional.memories import MEMORIES
from atlas_blocks.functional.rule import Rule

if TYPE_CHECKING:
    from typing_extensions import Self


class Tokens(NamedTuple):
    """All tokens of a call. Keys, values and writes begin with the n of the history."""

    q_raw: Tensor  # [B, T, H, Dk]
    k_raw: Tensor  # [B, n + T, H, Dk]
    q: Tensor  # phi(q)  [B, T, H, Dphi]
    k: Tensor  # phi(k)  [B, n + T, H, Dphi]
    v: Tensor  # [B, n + T, H, Dv]
    alpha: Tensor  # [B, T, H]
    eta: Tensor  # [B, T, H]
    theta: Tensor | None  # [B, T, H]
    gamma: Tensor  # [B, T, H, c]
    writes: Tensor | None  # m_s [B, n + T, H] where writes are discounted


class Piece(NamedTuple):
    """Consecutive chunks of one size."""

    first: int  # their first token
    span: int  # tokens a chunk
    count: int
    place: int  # where they begin in their chunk: 0, unless an earlier call began it


class _Record:
    """A dataclass of tensors stacked along a chunk axis, or of other such records, or None."""

    def unbind(self) -> Iterator[Self]:
        """The chunks one by one. (Indexing would cost a full-size gradient for every chunk.)"""
        columns: dict[str, Sequence[Any] | None] = {}
        for name, value in vars(self).items():
            columns[name] = None if value is None else list(value.unbind())
        count = next(len(c) for c in columns.values() if c is not None)
        for n in range(count):
            yield type(self)(**{k: None if c is None else c[n] for k, c in columns.items()})

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same record with `fn` applied to every tensor."""

        def one(value: Any) -> Any:
            return value.map(fn) if isinstance(value, _Record) else fn(value)

        fields = {k: None if v is None else one(v) for k, v in vars(self).items()}
        return type(self)(**fields)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in field order."""
        found: list[Tensor] = []
        self.map(lambda t: found.append(t) or t)
        return found

    def flatten(self) -> Self:
        """[N, G, ...] -> [N G, ...]."""
        return self.map(lambda t: t.flatten(0, 1))


@dataclass(frozen=True)
class Discount(_Record):
    """What a discount needs that must wait for M^(0), because the memory is deep."""

    similarity: Tensor  # |phi(k_s) . phi(k_t)|  [N, G, L', L']
    squares: Tensor  # |phi(k_i)|^2  [N, G, E]
    held: Tensor  # whether the window of t weighs key i  [N, G, L, E]
    writes: Tensor  # m_s  [N, G, L']
    momentum: Tensor | None  # Theta  [N, G, L, L]


@dataclass(frozen=True)
class Last(_Record):
    """What the weights after a chunk are made of: the last rows of the coefficients of W_t."""

    written: Tensor  # last row of P C as a column  [N, G, E, 1]
    carried: Tensor | None  # last of P thbar  [N, G, 1, 1]


@dataclass(frozen=True)
class Write(_Record):
    """What takes the memory from a chunk's start to its end."""

    k: Tensor  # phi(k)  [N, G, E, Dphi]
    target: Tensor  # what M(k) without its residual should be: v - r(k), or v  [N, G, E, Dv]
    eta: Tensor  # discounted already unless `discount` is there  [N, G, L]
    abar: Tensor  # product of all alpha  [N, G, 1, 1]
    decay: Tensor  # last row of A  [N, G, 1, L]
    thbar: Tensor | None  # running product of theta  [N, G, L, 1]
    thbar_last: Tensor | None  # [N, G, 1, 1]
    window: Tensor  # C = Theta Gam  [N, G, L, E]
    window_last: Tensor  # last row of C as a column  [N, G, E, 1]
    discount: Discount | None
    last: Last | None  # for gradient descent; known ahead unless `discount` is there

    def last_coefficients(self, eta: Tensor) -> Last:
        """The last rows for a write strength eta [..., L], of one chunk or of all."""
        step = self.decay * eta.unsqueeze(-2)
        carried = None if self.thbar is None else step @ self.thbar
        return Last((step @ self.window).mT, carried)


@dataclass(frozen=True)
class Read(_Record):
    """What reads the memory at every token of a chunk."""

    q: Tensor  # phi(q)  [N, G, L, Dphi]
    residual: Tensor | None  # r(q)  [N, G, L, Dv]
    dots: Tensor  # phi(q) . phi(k)  [N, G, L, E]
    abar: Tensor  # running product of alpha  [N, G, L, 1]
    decay: Tensor  # A  [N, G, L, L]


def cut(rule: Rule, feature_map: FeatureMap | None, x: Tokens, piece: Piece) -> tuple[Write, Read]:
    """Cut a piece's chunks out of a call."""
    first, span, count, place = piece
    n = rule.history
    # Keys before the chunk: the window's halo, and the begun chunk where writes are discounted.
    extra = max(rule.window - 1, place if rule.write_discount else 0)

    def chunks(t: Tensor, begin: int) -> Tensor:
        """[B, T, H, ...] -> [N, B, H, L, ...], the first chunk at token `begin`."""
        parts = t[:, begin : begin + span * count].unflatten(1, (count, span))
        return parts.transpose(0, 1).transpose(2, 3)

    def tokens(t: Tensor) -> Tensor:
        """[B, T, H, ...] -> [N, G, L, ...]."""
        return chunks(t, first).flatten(1, 2)

    def with_past(t: Tensor, past: int) -> Tensor:
        """[B, n + T, H, ...] -> [N, G, past + L, ...], each chunk with the tokens before it."""
        begin = n + first - past
        if count == 1:
            return t[:, begin : begin + past + span].transpose(1, 2).flatten(0, 1).unsqueeze(0)
        # Not `unfold`: its gradient is a scatter, and Inductor's, for several threads of a CPU, may
        # write out of bounds (torch 2.13, pytorch/pytorch#191837). In eager both take as long.
        part = past % span
        parts = [chunks(t, n + first - back) for back in range(past - part, -1, -span)]
        if part:
            parts.insert(0, chunks(t, begin)[:, :, :, :part])
        return torch.cat(parts, 3).flatten(1, 2)

    q = q_raw = tokens(x.q_raw)
    k = k_raw = with_past(x.k_raw, extra)
    if feature_map is not None:
        q, k = tokens(x.q), with_past(x.k, extra)

    def kernel(a: Tensor, b: Tensor, a_raw: Tensor, b_raw: Tensor) -> Tensor:
        if isinstance(feature_map, PolynomialMap):  # cheaper than with its many features
            return feature_map.kernel(a_raw, b_raw)
        return a @ b.mT

    decay, abar = decay_matrix(tokens(x.alpha))
    window = weighed = window_matrix(tokens(x.gamma), extra)
    momentum = thbar = None
    if x.theta is not None:
        momentum, thbar = decay_matrix(tokens(x.theta))
        window = momentum @ window
    eta, discount = tokens(x.eta), None
    if x.writes is not None:
        so_far = slice(extra - place, None)
        rows, raw = k[..., so_far, :], k_raw[..., so_far, :]
        similarity, writes = kernel(rows, rows, raw, raw).abs(), with_past(x.writes, place)
        if rule.memory == "matrix":
            own = similarity.diagonal(dim1=-2, dim2=-1)[..., -span:]
            eta = discounted(eta, writes, similarity, own)
        else:
            squares = k.square().sum(-1)
            discount = Discount(similarity, squares, weighed > 0, writes, momentum)
    residual = MEMORIES[rule.memory].residual and x.q_raw.shape[-1] == x.v.shape[-1]
    target = with_past(x.v, extra)
    if residual and rule.objective == "l2":
        target = target - k_raw
    write = Write(
        k=k,
        target=target,
        eta=eta,
        abar=abar[..., -1:, :],
        decay=decay[..., -1:, :],
        thbar=thbar,
        thbar_last=None if thbar is None else thbar[..., -1:, :],
        window=window,
        window_last=window[..., -1:, :].mT,
        discount=discount,
        last=None,
    )
    if discount is None and rule.update == "gd":
        write = replace(write, last=write.last_coefficients(eta))
    dots = kernel(q, k, q_raw, k_raw)
    return write, Read(q, q_raw if residual else None, dots, abar, decay)


def decay_matrix(gate: Tensor) -> tuple[Tensor, Tensor]:
    """A[t, s] = prod_{r = s+1..t} gate_r for s <= t, else 0, and the running product.

    gate: [..., L] -> [..., L, L], [..., L, 1]. Products, not logarithms: exact at a gate of 0, and
    in its gradient there.
    """
    decay: Tensor = _Decay.apply(gate)  # pyright: ignore[reportAssignmentType]
    return decay, gate[..., :1, None] * decay[..., :1]


class _Decay(torch.autograd.Function):
    """The gradient of a cumulative product has a case for zeros, and takes many small steps."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        span = gate.shape[-1]
        after = torch.ones(span, span, dtype=torch.bool, device=gate.device).tril(-1)
        decay = torch.where(after, gate.unsqueeze(-1), 1.0).cumprod(-2).tril()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """A[t, s] = A[t, r] gate_r A[r-1, s] for s < r <= t."""
        (decay,) = ctx.saved_tensors
        through = F.pad((grad @ decay.mT)[..., :-1], (1, 0))  # sum_s dA[t, s] A[r-1, s]
        return (decay * through).sum(-2)


def window_matrix(gamma: Tensor, extra: int) -> Tensor:
    """Gam[t, i] = gamma[t, j] where key i is token t - j; keys begin `extra` before the chunk.

    gamma: [..., L, c] -> [..., L, extra + L].
    """
    span, window = gamma.shape[-2:]
    # Rows one longer than the matrix, laid end to end: each starts one place further right.
    width = extra + span
    rows = F.pad(gamma.flip(-1), (extra - (window - 1), span))
    return rows.flatten(-2)[..., : span * width].unflatten(-1, (span, width))


def discounted(eta: Tensor, writes: Tensor, kappa: Tensor, scale: Tensor) -> Tensor:
    """eta_t exp(-rho_t) / max(1, m_t scale_t), rho_t = sum_{s < t} m_s kappa(s, t)  (9b).

    eta, scale: [..., L] of the last L of the chunk's L' tokens so far; writes: m [..., L'];
    kappa: [..., L', L']. scale is kappa(t, t), or for a deep memory `running_scale`.
    """
    span = eta.shape[-1]
    rho = (kappa.tril(-1) @ writes.unsqueeze(-1)).squeeze(-1)
    return eta * torch.exp(-rho[..., -span:]) / (writes[..., -span:] * scale).clamp(min=1)


def running_scale(
    own: Tensor, held: Tensor, momentum: Tensor | None, thbar: Tensor | None, before: Tensor
) -> Tensor:
    """scale_t: the largest kappa(i, i) of what S_t still holds, G_t's whole window included.

        scale_t = max(max_{i in the window of t} kappa(i, i), theta_t scale_{t-1})

    Tokens of a deep memory differ in kappa(i, i), and a write of S_t writes earlier tokens too.
    own: kappa(i, i) [G, E]; held: [G, L, E]; momentum: Theta [G, L, L]; thbar: [G, L, 1]; before:
    [G]. -> [G, L].
    """
    scale = torch.where(held, own.unsqueeze(-2), 0.0).amax(-1)
    if momentum is None or thbar is None:
        return scale
    scale = (momentum * scale.unsqueeze(-2)).amax(-1)
    return torch.maximum(scale, thbar.squeeze(-1) * before.unsqueeze(-1))
