"""Sliding-window attention against full-mask attention in float64, and rotary positions.

B batch, T queries, S keys (C = S - T of them cached), H heads, D head width, P sink tokens.
"""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_blocks.attention.definition import choose_backend, rotary, sliding_window_attention
from atlas_blocks.attention.providers import TILE, _tiles


def naive(q, k, v, *, window, valid=None, sink_q=None, sink_k=None, sink_v=None) -> Tensor:
    """The definition with one mask over every pair, in the dtype it is given."""
    B, T, _, D = q.shape
    C = k.shape[1] - T
    i = torch.arange(T)[:, None]
    j = torch.arange(-C, T)
    seen = (j <= i) & (j > i - (window or C + T + 1))
    seen = seen.expand(B, 1, T, C + T)
    if valid is not None:
        seen = seen & (j >= -valid[:, None, None, None])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    v = v.transpose(1, 2)
    if sink_k is not None:
        sink_scores = torch.einsum("bihd,hpd->bhip", q if sink_q is None else sink_q, sink_k)
        scores = torch.cat([sink_scores * D**-0.5, scores], dim=-1)
        v = torch.cat([sink_v.expand(B, -1, -1, -1), v], dim=2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def make(T, C=0, B=2, H=2, D=4, P=0, Dv=None, own_q=True, dtype=torch.float64, seed=0):
    """q, k, v and the sinks of a call."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    Dv = Dv or D
    tensors = [draw(B, T, H, D), draw(B, C + T, H, D), draw(B, C + T, H, Dv)]
    if P == 0:
        return tensors, {}
    sinks = {"sink_k": draw(H, P, D), "sink_v": draw(H, P, Dv)}
    return tensors, {"sink_q": draw(B, T, H, D), **sinks} if own_q else sinks


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("window", [1, 2, 16, 64, 100, 1000, None])
@pytest.mark.parametrize("T", [0, 1, 5, 64, 200])
def test_equals_the_full_mask(T: int, window: int | None, P: int) -> None:
    for C in (0, 7, 80):
        tensors, sinks = make(T, C, P=P)
        for valid in (None, torch.tensor([C, C // 2]), torch.tensor([C // 3, C // 3])):
            options = {"window": window, "valid": valid, **sinks}
            y = sliding_window_attention(*tensors, **options)
            torch.testing.assert_close(y, naive(*tensors, **options))


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(0, 160),
    C=st.integers(0, 90),
    window=st.integers(1, 100),
    valid=st.lists(st.integers(0, 90), min_size=2, max_size=2),
    P=st.integers(0, 2),
    Dv=st.sampled_from([2, 4, 10]),
    own_q=st.booleans(),
)
def test_equals_the_full_mask_at_any_size(T, C, window, valid, P, Dv, own_q) -> None:
    tensors, sinks = make(T, C, P=P, Dv=Dv, own_q=own_q)
    options = {"window": window, "valid": torch.tensor(valid).clamp(max=C), **sinks}
    y = sliding_window_attention(*tensors, **options)
    torch.testing.assert_close(y, naive(*tensors, **options))


@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize(("T", "C", "window"), [(150, 20, 16), (150, 70, 70), (9, 4, None)])
def test_gradients_equal_autograd_of_the_full_mask(T, C, window, P) -> None:
    tensors, sinks = make(T, C, P=P)
    leaves = [t.requires_grad_() for t in (*tensors, *sinks.values())]
    options = {"window": window, "valid": torch.tensor([C, 1]), **sinks}
    weight = make(T, seed=1)[0][0]
    ours = torch.autograd.grad(
        (sliding_window_attention(*tensors, **options) * weight).sum(), leaves
    )
    true = torch.autograd.grad((naive(*tensors, **options) * weight).sum(), leaves)
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    (q, k, v), sinks = make(66, 1, B=1, H=1, D=2, P=1)
    leaves = [t.requires_grad_() for t in (q, k, v, *sinks.values())]

    def f(q, k, v, sink_q, sink_k, sink_v):
        options = {"sink_q": sink_q, "sink_k": sink_k, "sink_v": sink_v}
        return sliding_window_attention(q, k, v, window=2, **options)[:, ::13]

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [16, None])
def test_low_precision_is_as_good_as_the_full_mask_in_it(dtype, window) -> None:
    tensors, sinks = make(200, 15, D=16, P=2, dtype=dtype)
    exact = naive(
        *(t.double() for t in tensors), window=window, **{n: t.double() for n, t in sinks.items()}
    )
    y = sliding_window_attention(*tensors, window=window, **sinks)
    assert y.dtype == dtype
    plain = naive(*tensors, window=window, **sinks)
    error, allowed = ((t.double() - exact).abs().max() for t in (y, plain))
    assert error <= 2 * allowed


def test_rows_do_not_see_each_other() -> None:
    (q, k, v), _ = make(90, 30, B=4)
    valid = torch.tensor([30, 0, 7, 12])
    y = sliding_window_attention(q, k, v, window=24, valid=valid)
    rows = torch.tensor([2, 0, 3, 1])
    again = sliding_window_attention(q[rows], k[rows], v[rows], window=24, valid=valid[rows])
    torch.testing.assert_close(again, y[rows])
    for b in range(4):
        one = slice(b, b + 1)
        alone = sliding_window_attention(q[one], k[one], v[one], window=24, valid=valid[one])
        torch.testing.assert_close(alone, y[one])


def test_masked_cache_may_hold_anything() -> None:
    (q, k, v), _ = make(70, 20)
    valid = torch.tensor([20, 5])
    y = sliding_window_attention(q, k, v, window=32, valid=valid)
    k[1, :15], v[1, :15] = 1e6, -1e6
    torch.testing.assert_close(sliding_window_attention(q, k, v, window=32, valid=valid), y)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize("P", [0, 4])
@pytest.mark.parametrize("window", [16, None])
def test_no_tensor_grows_with_the_square_of_the_length(window: int | None, P: int) -> None:
    if window is None:
        tensors, sinks = make(3000, B=1, H=1, P=P, dtype=torch.float32)
    else:
        tensors, sinks = make(20_000, C=window, B=1, H=1, P=P, dtype=torch.float32)
    for t in tensors:
        t.requires_grad_()
    with LargestTensor() as seen:
        sliding_window_attention(*tensors, window=window, **sinks).sum().backward()
    # Sinks double the width of 4, and a block of 64 queries copies 64 + 16 + P keys.
    assert seen.elements <= 3 * 4 * tensors[1].shape[1]


@pytest.mark.parametrize(
    ("T", "P", "C", "window"),
    [(300, 0, 0, 16), (129, 0, 700, 300), (400, 3, 20, 64), (700, 130, 5, 1), (200, 9, 90, None)],
)
def test_flex_visits_the_tiles_with_a_visible_pair_and_no_other(T, P, C, window) -> None:
    mask = _tiles(T, P, C, window, lambda b, h, i, j: i >= j, torch.device("cpu"))
    i, j = torch.arange(T)[:, None], torch.arange(P + C + T) - P - C
    seen = ((j <= i) & (j > i - (window or P + C + T))) | (j < -C)
    n_q, n_k = -(-T // TILE), -(-(P + C + T) // TILE)
    seen = F.pad(seen, (0, n_k * TILE - P - C - T, 0, n_q * TILE - T))
    needed = seen.unflatten(1, (n_k, TILE)).unflatten(0, (n_q, TILE)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)


# Inductor itself warns when it is imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_flex_equals_the_definition() -> None:
    tensors, sinks = make(300, 150, P=3, D=16, dtype=torch.float32)
    options = {"window": 140, "valid": torch.tensor([100, 3]), **sinks}
    with torch.no_grad():
        y = sliding_window_attention(*tensors, **options, backend="flex")
        torch.testing.assert_close(y, sliding_window_attention(*tensors, **options))
    tensors, sinks = make(300, P=3, D=16, dtype=torch.float32)
    options = {"window": 140, "first": first_of([0, 1, 30, 290, 300]), **sinks}
    with torch.no_grad():
        y = sliding_window_attention(*tensors, **options, backend="flex")
        torch.testing.assert_close(y, sliding_window_attention(*tensors, **options))


def first_of(bounds: list[int]) -> Tensor:
    """Where the document of every token begins."""
    return torch.cat([torch.full((b - a,), a) for a, b in itertools.pairwise(bounds)])


@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize("window", [1, 16, 100, None])
@pytest.mark.parametrize("bounds", [[0, 1], [0, 1, 9, 64, 65, 200], [0, 150, 200]])
def test_packed_documents_equal_each_alone(bounds, window, P) -> None:
    tensors, sinks = make(bounds[-1], P=P)
    y = sliding_window_attention(*tensors, window=window, first=first_of(bounds), **sinks)
    for a, b in itertools.pairwise(bounds):
        alone = {n: t[:, a:b] if n == "sink_q" else t for n, t in sinks.items()}
        true = naive(*(t[:, a:b] for t in tensors), window=window, **alone)
        torch.testing.assert_close(y[:, a:b], true)


@pytest.mark.parametrize("backend", ["flash", "xformers"])
def test_refusal_of_the_gpu_packages_on_a_cpu(backend: str) -> None:
    (q, k, v), _ = make(8)
    with pytest.raises(ValueError, match=r"backend: .* needs a CUDA device, and q is on cpu"):
        sliding_window_attention(q, k, v, window=4, backend=backend)


def test_refusal_of_flex() -> None:
    (q, k, v), _ = make(8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"backend: .*no backward on a CPU"):
        sliding_window_attention(q.requires_grad_(), k, v, window=4, backend="flex")
    with pytest.raises(ValueError, match=r"backend: .*float64"):
        sliding_window_attention(
            q.detach().double(), k.double(), v.double(), window=4, backend="flex"
        )


def test_auto_says_what_it_takes_and_why() -> None:
    (q, k, v), _ = make(8)
    assert choose_backend(q, k, v, window=4) == (
        "sdpa",
        "the others are fast on a GPU only, and q is on cpu",
    )
    assert choose_backend(q, k, v, window=4, backend="sdpa") == ("sdpa", "asked for")


@pytest.mark.parametrize("backend", ["auto", "flash", "xformers", "flex"])
@pytest.mark.parametrize("P", [0, 2])
@pytest.mark.parametrize("valid", [None, torch.tensor([40, 3])])
@pytest.mark.parametrize(("T", "C"), [(1, 100), (500, 0), (500, 100)])
@pytest.mark.gpu
def test_backends_equal_the_definition_on_a_gpu(backend, P, valid, T, C) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if valid is not None and C == 0:
        pytest.skip("no cache to mask")
    tensors, sinks = make(T, C, D=64, P=P)
    options = {"window": 64, "valid": valid}
    exact_leaves = [t.clone().requires_grad_() for t in (*tensors, *sinks.values())]
    exact = naive(*exact_leaves[:3], **options, **dict(zip(sinks, exact_leaves[3:], strict=True)))
    exact_grads = torch.autograd.grad(exact.square().sum(), exact_leaves)

    def run(name: str) -> list[Tensor]:
        leaves = [t.cuda().bfloat16().requires_grad_() for t in exact_leaves]
        named = dict(zip(sinks, leaves[3:], strict=True))
        try:
            y = sliding_window_attention(*leaves[:3], **options, **named, backend=name)
        except ValueError as refusal:
            pytest.skip(str(refusal))
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    for ours, plain, true in zip(run(backend), run("sdpa"), [exact, *exact_grads], strict=True):
        error, allowed = ((t.double().cpu() - true).abs().max() for t in (ours, plain))
        assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 2)}, r"q: expected shape \[B, T, H, D\]"),
        ({"q": torch.zeros(2, 5, 2, 4, dtype=torch.int64)}, "q: expected dtype"),
        ({"k": torch.zeros(2, 5, 3, 4)}, r"k: expected shape \[B, S, H, D\]"),
        ({"k": torch.zeros(2, 4, 2, 4), "v": torch.zeros(2, 4, 2, 4)}, "k: expected at least"),
        ({"k": torch.zeros(2, 5, 2, 4).double()}, "k: expected dtype torch.float32"),
        ({"v": torch.zeros(2, 6, 2, 4)}, r"v: expected shape \[B, S, H, Dv\]"),
        ({"window": 0}, "window: expected an int >= 1, got 0"),
        ({"window": 2.0}, "window: expected an int >= 1"),
        ({"valid": torch.zeros(3, dtype=torch.int64)}, r"valid: expected shape \[B\]"),
        ({"valid": torch.tensor([0, 1])}, "valid: expected counts of cached keys, 0 to S - T = 0"),
        ({"valid": torch.zeros(2)}, "valid: expected dtype"),
        ({"first": torch.zeros(4, dtype=torch.int64)}, r"first: expected shape \[T\]"),
        (
            {"k": torch.zeros(2, 6, 2, 4), "v": torch.zeros(2, 6, 2, 4), "first": torch.arange(5)},
            "first: expected None with S - T = 1 cached keys",
        ),
        ({"sink_k": torch.zeros(2, 1, 4)}, "sink_v: expected sink_k and sink_v both"),
        ({"sink_q": torch.zeros(2, 5, 2, 4)}, "sink_q: expected None without"),
        (
            {"sink_k": torch.zeros(2, 1, 4), "sink_v": torch.zeros(2, 2, 4)},
            r"sink_v: expected shape \[H, P, Dv\]",
        ),
        ({"backend": "cuda"}, "backend: expected one of auto, flash, flex, sdpa, xformers"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    good = {name: torch.zeros(2, 5, 2, 4) for name in ("q", "k", "v")}
    arguments = {**good, "window": 4, **change}
    q, k, v = (arguments.pop(name) for name in ("q", "k", "v"))
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(q, k, v, **arguments)


def test_rotary_turns_each_pair_by_its_angle() -> None:
    x = make(3, B=1, H=1, D=6)[0][0]
    pairs = torch.complex(x[..., :3], x[..., 3:])
    p = torch.tensor([0, 5, 123])
    angle = p.double()[:, None] * 100.0 ** (-torch.arange(3).double() / 3)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    y = rotary(x, p, base=100.0)
    torch.testing.assert_close(y, torch.cat([turned.real, turned.imag], dim=-1))
    torch.testing.assert_close(rotary(x, p[None], base=100.0), y)


@pytest.mark.parametrize("far", [1000, 10_000_000, 10**11])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_depend_on_the_distance_alone(far: int, dtype: torch.dtype) -> None:
    (q, k, _), _ = make(50, D=64, dtype=dtype)

    def scores(start: int) -> Tensor:
        p = torch.arange(start, start + 50)
        return torch.einsum("bihd,bjhd->bhij", rotary(q, p), rotary(k, p))

    # An angle is exact to 1e-16 of its position; the rest is rounding of scores of about 30.
    atol = 256 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float64).eps * far
    torch.testing.assert_close(scores(far), scores(0), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_keeps_dtype_and_gradient(dtype: torch.dtype) -> None:
    x = make(3, dtype=dtype)[0][0].requires_grad_()
    y = rotary(x, torch.arange(3))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    # A rotation keeps lengths, so the gradient of the squared length is 2 x.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize(
    ("x", "positions", "message"),
    [
        (torch.zeros(2, 3, 2, 5), torch.arange(3), "x: expected an even last axis D, got 5"),
        (torch.zeros(2, 3, 4), torch.arange(3), r"x: expected shape \[B, T, H, D\]"),
        (torch.zeros(2, 3, 2, 4), torch.arange(4), r"positions: expected shape \[T\]"),
        (torch.zeros(2, 3, 2, 4), torch.zeros(3, 2).long(), r"positions: expected shape \[B, T\]"),
        (torch.zeros(2, 3, 2, 4), torch.zeros(3), "positions: expected dtype"),
    ],
)
def test_rotary_names_wrong_arguments(x: Tensor, positions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(x, positions)
