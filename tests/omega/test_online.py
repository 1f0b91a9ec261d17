"""Online errors: what they are equal to, and what they never become (specification 9b)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MEMORIES,
    OBJECTIVES,
    difference,
    leaves,
    named_leaves,
    omega_rule,
    omega_rule_reference,
    rule_inputs,
)
from marks import slow_as_it_is
from torch import Tensor

from atlas_blocks.functional import read_memory
from atlas_blocks.omega.memories import MEMORIES as STRUCTURES
from atlas_blocks.omega.memories import tangent_kernel, weight_shapes

# --- a matrix memory with a window of one: the rule at b = 1 itself ----------------------------


def uncut(inputs: dict[str, Any]) -> None:
    """Strengths at which no own step is limited: eta_t at most 0.9 of the largest that is not."""
    phi = inputs["feature_map"]
    k = inputs["k"] if phi is None else phi(inputs["k"])
    own = k.square().sum(-1)
    theta = inputs["theta"] if inputs["theta"] is not None else torch.zeros_like(own)
    window = inputs["gamma"][..., 0] * own
    scale, scales = torch.zeros_like(own[:, 0]), []
    for t in range(own.shape[1]):
        scale = theta[:, t] * scale + window[:, t]
        scales.append(scale)
    most = torch.maximum(
        (1 + theta) * torch.stack(scales, 1), window / (1 - theta.clamp(max=0.999))
    )
    inputs["eta"] = 9 * inputs["eta"].clamp(max=0.1) / most.clamp(min=1)


def outputs_and_gradients(inputs: dict[str, Any], **settings: Any) -> dict[str, Tensor]:
    """y, the last memory and momentum, and every gradient of a random functional of them."""
    x = leaves(inputs)
    y, state = omega_rule(**x, **settings)
    results = [y, *state.weights, *state.momentum]
    g = torch.Generator().manual_seed(1)
    total = sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in results)
    wanted = named_leaves(x)
    found = torch.autograd.grad(total, list(wanted.values()))
    named = {f"result {i}": t.detach() for i, t in enumerate(results)}
    return named | dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_matrix_at_any_chunk_is_the_delta_rule(momentum: bool, features: str) -> None:
    """To rounding, in value and gradient, at gates of exactly 0 and 1 too."""
    inputs = rule_inputs(
        batch=2, length=150, window=1, momentum=momentum, features=features, seed=3
    )
    for name in ("alpha", "theta", "gamma"):
        if inputs[name] is not None:
            assert {0.0, 1.0} <= set(inputs[name].flatten().tolist())
    uncut(inputs)
    true = outputs_and_gradients(inputs, chunk_size=1)
    for chunk in (2, 16, 64, 100):
        ours = outputs_and_gradients(inputs, chunk_size=chunk, errors="online")
        for name, t in true.items():
            gap = difference([ours[name]], [t])
            assert gap < 1e-12, f"{name} at {chunk}: {gap:.3g}"
    bare = outputs_and_gradients(inputs, chunk_size=16)
    assert difference([bare["result 0"]], [true["result 0"]]) > 0.1


# --- windows and momentum: the page itself, with its matrices as they stand ---------------------


def by_hand(x: dict[str, Any], chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Section 9b for one sequence and head of a matrix memory: y [T, Dv] and the last W and S."""
    q, k, v, gamma = (x[n][0, :, 0] for n in ("q", "k", "v", "gamma"))
    alpha, eta, theta = (x[n][0, :, 0] for n in ("alpha", "eta", "theta"))
    length, window = gamma.shape
    strength = eta / (1 - theta.clamp(max=0.999))
    mass = [[strength[i] * gamma[i, j:].sum() for j in range(window)] for i in range(length)]
    kappa = k @ k.T
    w = x["weights"][0][0]
    s, scale, outputs = torch.zeros_like(w), torch.tensor(0.0), []
    for t0 in range(0, length, chunk):
        own = range(t0, min(t0 + chunk, length))
        keys = range(max(0, t0 - window + 1), own.stop)

        def pending(t: int, i: int) -> Any:
            cap = max(1.0, float(mass[i][0] * kappa[i, i]))
            return mass[i][t - i] / cap if 1 <= t - i < window else 0.0

        # Row t of what has been written: B over the keys, abar and P thbar.
        written, seen, held = {}, {}, {}
        limited = {}
        abar, thbar, carried = torch.ones(()), torch.ones(()), torch.zeros(())
        b_row = {i: torch.zeros(()) for i in keys}
        c_row = {i: torch.zeros(()) for i in keys}
        errors: dict[int, Tensor] = {}
        for i in keys:
            if i < t0:
                errors[i] = w @ k[i] - v[i]
                for j in range(keys.start, i):
                    errors[i] = errors[i] - kappa[i, j] * pending(t0, j) * errors[j]
                continue
            e = abar * (w @ k[i]) - carried * (s @ k[i]) - v[i]
            for j in range(keys.start, i):
                e = e - kappa[i, j] * (b_row[j] + pending(i, j)) * errors[j]
            errors[i] = e
            weighed = {j: gamma[i, i - j] for j in keys if 0 <= i - j < window}
            most = gamma[i].sum() * max([kappa[j, j] for j, g in weighed.items() if g > 0] + [0.0])
            scale = theta[i] * scale + most
            most = max(float((1 + theta[i]) * scale), float(most / (1 - theta[i].clamp(max=0.999))))
            limited[i] = eta[i] / max(1.0, float(eta[i] * most))
            abar, thbar = alpha[i] * abar, theta[i] * thbar
            carried = alpha[i] * carried + limited[i] * thbar
            for j in keys:
                c_row[j] = theta[i] * c_row[j] + weighed.get(j, 0.0)
                b_row[j] = alpha[i] * b_row[j] + limited[i] * c_row[j]
            written[i], seen[i], held[i] = dict(b_row), (abar, thbar, carried), dict(c_row)
        for t in own:
            abar, thbar, carried = seen[t]
            now = abar * w - carried * s
            for j in keys:
                if j <= t:
                    now = now - written[t][j] * torch.outer(errors[j], k[j])
            outputs.append(now @ q[t])
        s = thbar * s + sum(held[t][j] * torch.outer(errors[j], k[j]) for j in keys)
        w = now
    return torch.stack(outputs), w, s


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("window", [1, 4])
def test_online_errors_are_the_page_s_own_lines(window: int, chunk: int) -> None:
    x = rule_inputs(length=12, heads=1, window=window)
    x["eta"] = 5 * x["eta"]  # some own steps are limited, others not
    y, w, s = by_hand(x, chunk)
    for rule in (omega_rule_reference, omega_rule):
        ours, state = rule(**x, chunk_size=chunk, errors="online")
        found = [ours[0, :, 0], state.weights[0][0, 0], state.momentum[0][0, 0]]
        assert difference(found, [y, w, s]) < 1e-12


@pytest.mark.parametrize("memory", MEMORIES)
def test_kappa_is_how_far_a_unit_step_moves_the_read(memory: str) -> None:
    """kappa(i, i) |e_i|^2 is the squared gradient of all weights, that of two keys their product
    where errors and factors point the same way."""
    x = rule_inputs(memory, length=6, heads=1, exact_gates=False)
    k, v = x["k"][0, :, 0], x["v"][0, :, 0]
    k = torch.cat([k, 0.5 * k[-1:]])
    weights = [w[0].requires_grad_() for w in x["weights"]]
    at = STRUCTURES[memory].linearise(weights, k)
    e = (at.read - torch.cat([v, v[-1:]])).detach()
    kappa, own = tangent_kernel(at.factors(e), e, k.square().sum(-1), k @ k.mT)
    assert kappa is not None
    for i in range(len(k)):
        gradients = torch.autograd.grad((at.read[i] * e[i]).sum(), weights, retain_graph=True)
        size = sum(g.square().sum() for g in gradients) / e[i].square().sum()
        torch.testing.assert_close(kappa[i, i], size, rtol=1e-8, atol=1e-10)
        assert own[i] >= kappa[i, i] * (1 - 1e-12)
    assert torch.linalg.eigvalsh(kappa).min() > -1e-9  # a kernel
    torch.testing.assert_close(kappa, kappa.mT)


# --- what it does at both ends of the strengths -------------------------------------------------


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_where_little_is_written_both_kinds_of_errors_agree(
    memory: str, objective: str, momentum: bool
) -> None:
    """The change of the memory differs by a share that falls with the strength."""
    x = rule_inputs(memory, length=20, window=3, momentum=momentum, exact_gates=False)
    x["alpha"] = torch.ones_like(x["alpha"])
    shares = []
    for strength in (1e-3, 1e-5):
        moved = []
        for errors in ("chunk", "online"):
            y = x | {"eta": strength * torch.ones_like(x["eta"])}
            settings = {"memory": memory, "objective": objective, "chunk_size": 16}
            _, state = omega_rule(**y, **settings, errors=errors)
            moved.append([w - w0 for w, w0 in zip(state.weights, x["weights"], strict=True)])
        shares.append(difference(moved[1], moved[0]))
    assert shares[0] < 0.5
    assert shares[1] < max(0.02 * shares[0], 1e-9)


@pytest.mark.parametrize("decay_to", ["zero", "initial"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_no_errors_and_no_keys_are_finite_and_write_nothing(
    memory: str, momentum: bool, decay_to: str
) -> None:
    x = rule_inputs(memory, length=20, window=3, momentum=momentum, exact_gates=False)
    x["alpha"] = torch.ones_like(x["alpha"])
    width = x["v"].shape[-1]
    nothing = {
        "zero keys": {"k": torch.zeros_like(x["k"])},
        "no error": {
            "v": read_memory(x["k"], [w[None] for w in x["weights"]], memory=memory),
        },
        "no error at all": {
            "v": torch.zeros(1, 20, 2, 2, dtype=torch.float64),
            "weights": [torch.zeros_like(x["weights"][0][:, : width - 1]), *x["weights"][1:]],
        },
        "all zero": {
            "k": torch.zeros_like(x["k"]),
            "v": torch.zeros_like(x["v"]),
            "weights": [torch.zeros_like(w) for w in x["weights"]],
        },
    }
    settings = {"memory": memory, "chunk_size": 8, "errors": "online", "decay_to": decay_to}
    for case, changes in nothing.items():
        found = outputs_and_gradients(x | changes, **settings)
        for name, t in found.items():
            assert t.isfinite().all(), (case, name)
        first = (x | changes)["weights"]
        for i, w in enumerate(first):
            assert (found[f"result {i + 1}"] - w).abs().max() < 1e-12, case


def read_back(memory: str, window: int, momentum: bool, eta: float, **settings: Any) -> float:
    """Mean relative error of what is read after one pass over 8 pairs of unit length, D = 32, in
    16 memories."""
    heads, width, pairs = 16, 32, 8
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    k, v = (F.normalize(normal(1, pairs, heads, width), dim=-1) for _ in range(2))
    one = torch.ones(1, pairs, heads, dtype=torch.float64)
    gamma = 0.02 * torch.ones(1, pairs, heads, window, dtype=torch.float64)
    gamma[..., 0] = 1.0
    shapes = weight_shapes(memory, width, width, 4 * width)
    weights = [normal(heads, *shape) / shape[-1] ** 0.5 for shape in shapes]
    if memory == "matrix":
        weights = [torch.zeros_like(weights[0])]
    _, state = omega_rule(
        k, k, v, alpha=one, eta=eta * one, theta=0.5 * one if momentum else None, gamma=gamma,
        weights=weights, memory=memory, **settings,
    )  # fmt: skip
    error = read_memory(k, state.weights, memory=memory) - v
    return (error.norm(dim=-1) / v.norm(dim=-1)).mean().item()


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("window", [1, 16])
@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_a_chunk_writes_as_much_as_its_tokens_one_by_one(
    memory: str, window: int, momentum: bool
) -> None:
    """A bound alone would be kept by a memory that writes nothing."""
    for eta in (0.1, 0.5, 1.0):
        case = (memory, window, momentum, eta)
        ours = read_back(*case, chunk_size=64, errors="online")
        assert ours < 1.05 * read_back(*case, chunk_size=1, errors="online"), eta
    bare = read_back(memory, 1, False, 0.5, chunk_size=1)
    assert read_back(memory, 1, False, 0.5, chunk_size=64, errors="online") < 1.05 * bare
    assert bare < 0.7


# --- bounds of the rule itself; layers' are in blocks/test_extreme_streams.py -------------------


def repeated(tokens: int, window: int, momentum: bool, alpha: float | None) -> dict[str, Any]:
    """A thousand of so many distinct tokens in 64 memories, each token with gates of its own, most
    of them 0 or 1; alpha: of all, None for its own too."""
    heads, length, width = 64, 1000, 4
    g = torch.Generator().manual_seed(0)
    order = torch.randint(tokens, (length,), generator=g)

    def normal(*shape: int) -> Tensor:
        table = torch.randn(1, tokens, heads, *shape, generator=g, dtype=torch.float64)
        return table[:, order]

    k, v = (F.normalize(normal(width), dim=-1) for _ in range(2))
    retention, eta, theta = (torch.sigmoid(30 * normal()) for _ in range(3))
    return {
        "q": k,
        "k": k,
        "v": v,
        "alpha": retention if alpha is None else torch.full_like(retention, alpha),
        "eta": eta,
        "theta": 0.99 * theta if momentum else None,
        "gamma": torch.sigmoid(30 * normal(window)),
        "weights": [torch.zeros(heads, width, width, dtype=torch.float64)],
    }


def largest_reads(inputs: dict[str, Any], chunk: int) -> Tensor:
    """The largest |y| of every memory, of values of length 1."""
    y, _ = omega_rule(**inputs, chunk_size=chunk, errors="online")
    return y.norm(dim=-1).amax((0, 1))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("chunk", [slow_as_it_is(1), 64])
def test_one_token_over_and_over_is_bounded_at_any_retention_and_window(
    chunk: int, alpha: float | None, momentum: bool
) -> None:
    """Uneven windows too: what is still to be written does not fade before it is."""
    sizes = largest_reads(repeated(1, 16, momentum, alpha), chunk)
    assert sizes.max() < 20, sizes.topk(5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 3, 4, 64])
def test_tokens_with_gates_of_their_own_are_bounded(tokens: int) -> None:
    """Without momentum. (With it they are not always, see docs/limits.md.)"""
    sizes = largest_reads(repeated(tokens, 16, False, None), 64)
    assert sizes.max() < 20, sizes.topk(5)


# --- limits: gates that switch in turn, and what a limit leaves --------------------------------


@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("window", [1, 16])
@pytest.mark.parametrize("memory", MEMORIES)
def test_gates_that_switch_leave_a_memory_bounded(memory: str, window: int, chunk: int) -> None:
    """A write stands in S when its momentum's gate opens. A limit by the largest kappa that S
    holds, and not by all of it, let an MLP memory grow beyond any number here."""
    g = torch.Generator().manual_seed(0)
    rows, length, heads, width = 2, 600, 2, 8

    def drawn(*shape: int) -> Tensor:
        return torch.randn(rows, length, heads, *shape, generator=g, dtype=torch.float64)

    def switched(*shape: int) -> Tensor:
        return (drawn(*shape) < 0).double()

    _, state = omega_rule(
        drawn(width),
        F.silu(drawn(width)),
        drawn(width),
        alpha=switched().clamp(min=0.9),
        eta=switched(),
        theta=0.99 * switched(),
        gamma=switched(window),
        weights=[
            0.3 * torch.randn(heads, *shape, generator=g, dtype=torch.float64)
            for shape in weight_shapes(memory, width, width, width)
        ],
        memory=memory,
        chunk_size=chunk,
        errors="online",
    )
    assert max(w.abs().max() for w in state.weights) < 30


@pytest.mark.parametrize(("theta", "left"), [(None, 0.1), (0.5, 0.2), (0.9, 0.35)])
@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_a_limit_leaves_what_is_written_to_be_read(
    memory: str, theta: float | None, left: float
) -> None:
    """Eight pairs, shown four times with open gates."""
    g = torch.Generator().manual_seed(0)
    width = 32
    pairs = F.normalize(torch.randn(2, 8, 1, width, generator=g, dtype=torch.float64), dim=-1)
    k, v = pairs.repeat(1, 4, 1, 1).unsqueeze(1)
    one = k.new_ones(1, 32, 1)
    weights = [
        size * torch.randn(1, *shape, generator=g, dtype=torch.float64)
        for size, shape in zip(
            {"matrix": [0.0], "mlp": [0.05, width**-0.5]}[memory],
            weight_shapes(memory, width, width, 4 * width),
            strict=True,
        )
    ]
    _, state = omega_rule(
        k,
        k,
        v,
        alpha=one,
        eta=one,
        theta=None if theta is None else theta * one,
        gamma=one.unsqueeze(-1),
        weights=weights,
        memory=memory,
        chunk_size=16,
        errors="online",
    )
    read = read_memory(k[:, :8], state.weights, memory=memory)
    assert (read - v[:, :8]).norm() < left * v[:, :8].norm()
