"""Exact phi*: softmax attention where it must be, the token-by-token rule everywhere else."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, difference, draw
from torch import Tensor

from atlas_blocks.functional import KernelState, kernel_attention, kernel_attention_reference

NAMES = ("q", "k", "v", "alpha", "eta", "gamma")
PAIRS = list(itertools.product(("dot", "l2"), (True, False)))
SYSTEMS = [("dot", "chunk"), ("l2", "chunk"), ("l2", "online")]


def inputs(
    length: int, *, window: int = 1, batch: int = 2, heads: int = 2, width: int = 4
) -> dict[str, Tensor]:
    """Leaves in float64; every gate is 0 at some tokens and 1 at others (eta 0 only).

    Keys differ in length: where the limit of a write takes the largest of several, equal ones
    would leave its gradient to rounding.
    """
    size = (batch, length, heads)
    q, k = (F.normalize(draw(*size, width, seed=i), dim=-1) for i in (1, 2))
    g = torch.Generator().manual_seed(3)

    def gate(*more: int) -> Tensor:
        x = torch.rand(*size, *more, generator=g, dtype=torch.float64)
        return torch.where(x < 0.08, 0.0, x)

    alpha = gate()
    alpha = torch.where(alpha > 0.8, 1.0, torch.where(alpha > 0, 1 - 0.2 * alpha, 0.0))
    k = (0.8 + 0.4 * gate()[..., None]) * k
    found = q, k, draw(*size, 3, seed=4), alpha, 0.3 * gate(), gate(window) / window
    return {n: t.requires_grad_() for n, t in zip(NAMES, found, strict=True)}


def gradients(y: Tensor, x: dict[str, Tensor]) -> list[Tensor]:
    weight = draw(*y.shape, seed=9, dtype=y.dtype)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad((y * weight).sum(), list(x.values()), **options))


def in_pieces(x: dict[str, Tensor], pieces: list[int], **options: Any) -> tuple[Tensor, Any]:
    outputs, state, first = [], None, 0
    for n in pieces:
        part = {name: t[:, first : first + n] for name, t in x.items()}
        y, state = kernel_attention(**part, **options, state=state)
        outputs.append(y)
        first += n
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dot_normalised_without_gates_is_softmax_attention(dtype: torch.dtype, gates: bool) -> None:
    """As near to attention in float64 as attention in this dtype is, times two."""
    size, width = (2, 150, 3), 16
    exact = [3 * draw(*size, width, seed=i).to(dtype).double() for i in range(3)]
    ones = {n: torch.ones(size, dtype=dtype) for n in ("alpha", "eta")} if gates else {}

    def run(call: Any, kind: torch.dtype) -> list[Tensor]:
        x = [t.to(kind).requires_grad_() for t in exact]
        y = call(*x)
        return [y, *torch.autograd.grad((y * exact[0].to(kind).cos()).sum(), x)]

    def attention(*x: Tensor) -> Tensor:
        heads = (t.transpose(1, 2) for t in x)
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    true = run(attention, torch.float64)
    ours = run(lambda *x: kernel_attention(*x, **ones)[0], dtype)
    for name, a, b, c in zip("yqkv", ours, run(attention, dtype), true, strict=True):
        allowed = 2 * difference([b.double()], [c]) if dtype == torch.float32 else 1e-13
        assert difference([a.double()], [c]) <= allowed, name


def test_where_it_is_softmax_attention_sdpa_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **_: calls.append(1) or v
    )
    q, k, v = (draw(1, 5, 2, 4, seed=i) for i in range(3))
    kernel_attention(q, k, v)
    assert calls == [1]
    kernel_attention(q, k, v, objective="l2")
    kernel_attention(q, k, v, objective="l2", errors="online")
    kernel_attention(q, k, v, normalise=False)
    assert calls == [1]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("objective", "errors"), SYSTEMS)
@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_it_is_the_rule_token_by_token(
    chunk: int, window: int, objective: str, errors: str, normalise: bool
) -> None:
    # Strong writes, most of which the limit cuts, only where there is one.
    for length, strength in ((2, 1.0), (23, 1.0), (40, 8.0 if errors == "online" else 1.0)):
        x = inputs(length, window=window, batch=1)
        x["eta"] = (strength * x["eta"]).detach().requires_grad_()
        options: dict[str, Any] = {
            "objective": objective,
            "normalise": normalise,
            "chunk_size": chunk,
            "errors": errors,
            "scale": 1.5,
        }
        y, _ = kernel_attention(**x, **options)
        true = kernel_attention_reference(**x, **options)
        assert difference([y], [true]) < 1e-11
        for name, a, b in zip(NAMES, gradients(y, x), gradients(true, x), strict=True):
            assert (a - b).abs().max() < 1e-9 * b.abs().max().clamp(min=1e-2), name


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("objective", "errors"), SYSTEMS)
@pytest.mark.parametrize("pieces", [27 * [1], [0, 3, 5, 0, 12, 7], [8, 16, 3], [1, 26]], ids=str)
def test_any_split_equals_the_whole(
    pieces: list[int], objective: str, errors: str, normalise: bool, window: int
) -> None:
    x = inputs(27, window=window)
    options: dict[str, Any] = {
        "objective": objective,
        "normalise": normalise,
        "chunk_size": 8,
        "errors": errors,
    }
    whole, ours = kernel_attention(**x, **options), in_pieces(x, pieces, **options)
    assert_close(ours, whole, 1e-12)
    for name, a, b in zip(NAMES, gradients(ours[0], x), gradients(whole[0], x), strict=True):
        assert difference([a], [b]) < 1e-9, name
    assert difference(of_the_state(ours[1], x), of_the_state(whole[1], x)) < 1e-9


def of_the_state(state: KernelState, x: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of what a state holds."""
    total = sum((t * draw(*t.shape)).sum() for t in state.tensors() if t.requires_grad)
    assert isinstance(total, Tensor)
    stored = [x[name] for name in NAMES if name != "q"]
    return list(torch.autograd.grad(total, stored, retain_graph=True))


def whole_writes(length: int, window: int = 1) -> dict[str, Tensor]:
    """Inputs with writes of up to the strength that stores a key's value, and none above."""
    x = inputs(length, window=window)
    most = torch.exp(-x["k"].detach().square().sum(-1)) / x["gamma"].detach().sum(-1).clamp(min=0.1)
    eta = torch.rand(most.shape, generator=torch.Generator().manual_seed(8), dtype=most.dtype)
    return x | {"eta": (most * eta).requires_grad_()}


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("chunk", [2, 16, 64])
def test_online_errors_without_a_window_are_those_of_chunks_of_one(
    chunk: int, normalise: bool
) -> None:
    x = whole_writes(150)
    options: dict[str, Any] = {"objective": "l2", "normalise": normalise, "scale": 1.0}
    y, state = kernel_attention(**x, **options, chunk_size=chunk, errors="online")
    true, end = kernel_attention(**x, **options, chunk_size=1)
    assert difference([y, state.coefficients], [true, end.coefficients]) < 1e-10
    assert difference(gradients(y, x), gradients(true, x)) < 1e-10
    wide, _ = kernel_attention(**x, **options, chunk_size=chunk)
    assert difference([wide], [true]) > 0.1
    slow = kernel_attention_reference(**x, **options, chunk_size=1)
    assert difference([y], [slow]) < 1e-10


@pytest.mark.parametrize("window", [1, 5])
def test_every_token_of_a_chunk_changes_what_is_stored(window: int) -> None:
    """Keys nearly parallel, writes as strong as they may be."""
    x = {name: t.detach() for name, t in whole_writes(32, window).items()}
    x["k"] = F.normalize(x["k"] + 5.0, dim=-1)
    x["eta"] = torch.full_like(x["eta"], 100.0)
    x["alpha"], x["gamma"] = torch.full_like(x["alpha"], 0.99), torch.full_like(x["gamma"], 0.5)
    options: dict[str, Any] = {"objective": "l2", "chunk_size": 32, "errors": "online"}
    _, state = kernel_attention(**x, **options)
    for t in range(32):
        v = x["v"].clone()
        v[:, t] += 1.0
        _, other = kernel_attention(**(x | {"v": v}), **options)
        gap = (other.coefficients - state.coefficients)[..., :3].abs().amax((1, 3))
        assert (gap > 1e-3 * state.coefficients[..., :3].abs().max()).all(), t


def test_online_a_key_is_written_whole_and_no_more() -> None:
    k, v = (draw(1, 1, 1, 6, seed=i) for i in (1, 2))
    eta = torch.full((1, 1, 1), 1e6, dtype=torch.float64)
    options: dict[str, Any] = {"objective": "l2", "normalise": False, "errors": "online"}
    y, _ = kernel_attention(k, k, v, eta=eta, **options)
    assert difference([y], [v]) < 1e-13
    far, _ = kernel_attention(k, k, v, eta=eta, **options | {"errors": "chunk"})
    assert far.abs().max() > 1e5 * v.abs().max()


@pytest.mark.parametrize("length", [400, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [1, 16])
def test_one_key_again_and_again_stays_bounded_and_is_still_written(
    window: int, length: int
) -> None:
    """What is read of it is never further than its values, and turns to a new one at once."""
    k = F.normalize(draw(1, 1, 1, 4, dtype=torch.float32), dim=-1).expand(1, length, 1, 4)
    v = draw(1, length, 1, 3, seed=2, dtype=torch.float32).clamp(-2, 2)
    v[:, -window:] = torch.tensor([3.0, -3.0, 3.0])
    eta = torch.full((1, length, 1), 1e3)
    gamma = torch.ones(1, length, 1, window)
    with torch.no_grad():
        y, _ = kernel_attention(
            k, k, v, eta=eta, gamma=gamma, objective="l2", normalise=False, errors="online"
        )
    assert y.abs().max() < 4
    before, after = (v[:, -1] - y[:, i] for i in (-window - 1, -1))
    assert after.abs().max() < 0.6 * before.abs().max()


def test_a_softmax_prefill_goes_on_with_gates() -> None:
    x = inputs(20)
    plain = {n: x[n] for n in "qkv"}
    ones = torch.ones(2, 20, 2, dtype=torch.float64)
    options = {"alpha": ones, "eta": ones}
    whole = kernel_attention(**plain, **options)
    y, state = kernel_attention(**{n: t[:, :12] for n, t in plain.items()})
    rest = {n: t[:, 12:] for n, t in (plain | options).items()}
    z, state = kernel_attention(**rest, state=state)
    assert_close((torch.cat([y, z], 1), state), whole, 1e-13)


def test_constant_values_are_read_back_as_they_are() -> None:
    x = inputs(40, window=3)
    for objective in ("dot", "l2"):
        x["v"] = torch.full_like(x["v"], 7.0)
        y, _ = kernel_attention(**x, objective=objective, chunk_size=4)
        stored = y != 0
        assert stored[:, 3:].float().mean() > 0.9
        assert (y[stored] - 7).abs().max() < 1e-10


def test_l2_replaces_what_dot_averages() -> None:
    """One key with two values: l2 at full strength reads the second, dot their mean."""
    k = F.normalize(draw(1, 1, 1, 6), dim=-1).expand(1, 2, 1, 6)
    v = torch.tensor([[[[1.0, 5.0]], [[3.0, -5.0]]]], dtype=torch.float64)
    own = torch.full((1, 2, 1), -1.0, dtype=torch.float64).exp()  # 1 / exp(k . k)
    for normalise in (True, False):
        options: dict[str, Any] = {"eta": own, "scale": 1.0, "normalise": normalise}
        replaced, _ = kernel_attention(k, k, v, **options, objective="l2", chunk_size=1)
        assert difference([replaced], [v]) < 1e-13
        added, _ = kernel_attention(k, k, v, **options)
        assert difference([added[:, 1]], [v.mean(1) if normalise else v.sum(1)]) < 1e-13


def test_no_score_overflows_a_normalised_read() -> None:
    q, k, v = (draw(1, 30, 1, 4, seed=i, dtype=torch.float32) for i in range(3))
    eta = torch.rand(1, 30, 1)
    q, k = (t.requires_grad_() for t in (40 * q, 40 * k))
    y, _ = kernel_attention(q, k, v, eta=eta)
    true, _ = kernel_attention(q.double(), k.double(), v.double(), eta=eta.double())
    assert difference([y.double()], [true]) < 1e-3
    y.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    for options in ({"normalise": False}, {"objective": "l2", "chunk_size": 1}):
        with pytest.raises(FloatingPointError, match="the exponential kernel overflows"):
            kernel_attention(q, k, v, **options)
    v[0, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="an argument is not finite"):
        kernel_attention(q, k, v, normalise=False)


def test_a_key_that_is_not_written_hides_no_other_however_near_it_lies() -> None:
    q = torch.full((1, 2, 1, 4), 10.0)
    k = torch.stack([-q[:, 0], q[:, 1]], 1)  # scores of -200 and 200
    v = torch.tensor([[[[2.0]], [[5.0]]]])
    eta = torch.tensor([[[1.0], [0.0]]], requires_grad=True)
    y, _ = kernel_attention(q, k, v, eta=eta)
    assert y[0, 1].item() == pytest.approx(2.0)
    y.sum().backward()
    assert eta.grad is not None
    assert not eta.grad.isnan().any()


def test_wrong_arguments_are_named() -> None:
    x = {n: t.detach() for n, t in inputs(5, window=2).items()}
    _, state = kernel_attention(**x)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"q": x["q"][0]}, r"q: expected shape \[B, T, H, D\]"),
        ({"k": x["k"][:, 1:]}, r"k: expected shape .* \[2, 5, 2, 4\], got \[2, 4, 2, 4\]"),
        ({"v": x["v"].long()}, "v: expected dtype"),
        ({"alpha": x["eta"][..., None]}, r"alpha: expected shape \[B, T, H\]"),
        ({"eta": 1.0}, r"eta: expected a tensor \[B, T, H\], got float"),
        ({"gamma": x["eta"]}, r"gamma: expected shape \[B, T, H, c\]"),
        ({"objective": "huber"}, "objective: expected one of dot, l2, got 'huber'"),
        ({"scale": -1.0}, "scale: expected a number in"),
        ({"normalise": 1}, "normalise: expected True or False"),
        ({"chunk_size": 0}, "chunk_size: expected an int >= 1"),
        ({"errors": None}, "errors: expected one of chunk, online, got None"),
        ({"state": 3}, "state: expected a KernelState or None, got int"),
        ({"state": state, "normalise": False}, r"state.coefficients: expected shape"),
        ({"state": state, "objective": "l2"}, r"state.chunk_start: expected shapes"),
        ({"state": state, "objective": "l2", "errors": "online"}, "state.pending: expected shape"),
        ({"state": state, "gamma": x["gamma"][..., :1]}, "state.values: expected shape"),
        ({"state": state, "gamma": x["gamma"].repeat(1, 1, 1, 4)}, "state.keys: expected at least"),
        ({"state": state[:1]}, r"state.keys: expected shape"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            kernel_attention(**(x | changes))
