"""Exact phi*: softmax attention where it must be, the token-by-token rule everywhere else."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, difference, draw
from torch import Tensor

from atlas_blocks.functional import kernel_attention, kernel_attention_reference

NAMES = ("q", "k", "v", "alpha", "eta", "gamma")
PAIRS = list(itertools.product(("dot", "l2"), (True, False)))


def inputs(
    length: int, *, window: int = 1, batch: int = 2, heads: int = 2, width: int = 4
) -> dict[str, Tensor]:
    """Leaves in float64; every gate is 0 at some tokens and 1 at others (eta 0 only)."""
    size = (batch, length, heads)
    q, k = (F.normalize(draw(*size, width, seed=i), dim=-1) for i in (1, 2))
    g = torch.Generator().manual_seed(3)

    def gate(*more: int) -> Tensor:
        x = torch.rand(*size, *more, generator=g, dtype=torch.float64)
        return torch.where(x < 0.08, 0.0, x)

    alpha = gate()
    alpha = torch.where(alpha > 0.8, 1.0, torch.where(alpha > 0, 1 - 0.2 * alpha, 0.0))
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
    kernel_attention(q, k, v, normalise=False)
    assert calls == [1]


@pytest.mark.parametrize(("objective", "normalise"), PAIRS)
@pytest.mark.parametrize("discount", [False, True])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_it_is_the_rule_token_by_token(
    chunk: int, window: int, discount: bool, objective: str, normalise: bool
) -> None:
    for length in (2, 23, 70) if chunk == 1 and window == 1 else (2, 23):
        x = inputs(length, window=window, batch=1)
        options: dict[str, Any] = {
            "objective": objective,
            "normalise": normalise,
            "chunk_size": chunk,
            "write_discount": discount,
            "scale": 1.5,
        }
        y, _ = kernel_attention(**x, **options)
        true = kernel_attention_reference(**x, **options)
        assert difference([y], [true]) < 1e-11
        for name, a, b in zip(NAMES, gradients(y, x), gradients(true, x), strict=True):
            assert (a - b).abs().max() < 1e-9 * b.abs().max().clamp(min=1e-2), name


@pytest.mark.parametrize(("objective", "normalise"), PAIRS)
@pytest.mark.parametrize("discount", [False, True])
@pytest.mark.parametrize("pieces", [27 * [1], [0, 3, 5, 0, 12, 7], [8, 16, 3]], ids=len)
def test_any_split_equals_the_whole(
    pieces: list[int], discount: bool, objective: str, normalise: bool
) -> None:
    x = inputs(27, window=3)
    options: dict[str, Any] = {
        "objective": objective,
        "normalise": normalise,
        "chunk_size": 8,
        "write_discount": discount,
    }
    whole, ours = kernel_attention(**x, **options), in_pieces(x, pieces, **options)
    assert_close(ours, whole, 1e-12)
    for name, a, b in zip(NAMES, gradients(ours[0], x), gradients(whole[0], x), strict=True):
        assert difference([a], [b]) < 1e-9, name

    def of_the_state(state: Any) -> list[Tensor]:
        total = sum((t * draw(*t.shape)).sum() for t in state.tensors() if t.requires_grad)
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, [x["k"], x["v"], x["alpha"], x["eta"], x["gamma"]]))

    assert difference(of_the_state(ours[1]), of_the_state(whole[1])) < 1e-9


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
        ({"write_discount": None}, "write_discount: expected True or False"),
        ({"state": 3}, "state: expected a KernelState or None, got int"),
        ({"state": state, "normalise": False}, r"state.coefficients: expected shape"),
        ({"state": state, "objective": "l2"}, r"state.chunk_start: expected shapes"),
        ({"state": state, "gamma": x["gamma"][..., :1]}, "state.values: expected shape"),
        ({"state": state, "gamma": x["gamma"].repeat(1, 1, 1, 4)}, "state.keys: expected at least"),
        ({"state": state[:1]}, r"state.keys: expected shape"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            kernel_attention(**(x | changes))
