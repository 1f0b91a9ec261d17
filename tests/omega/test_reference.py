"""The reference itself, against loops written here from section 2's four lines, by other means."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MEMORIES,
    OBJECTIVES,
    assert_close,
    difference,
    omega_rule,
    omega_rule_reference,
    rule_inputs,
)
from torch import Tensor
from torch.func import grad


def memory_of(name: str, w: list[Tensor], x: Tensor, same_width: bool) -> Tensor:
    """M(x) for one key x [Dk] (section 4)."""
    if name == "matrix":
        return w[0] @ x
    residual = x if same_width else 0
    if name == "mlp":
        return residual + w[0] @ F.gelu(w[1] @ x)
    return residual + w[0] @ (F.gelu(w[1] @ x) * (w[2] @ x))


def newton_schulz_literally(s: Tensor, steps: int = 5) -> Tensor:
    """Section 7 with its matrices as they stand: a X + b (X X^T) X + c (X X^T)^2 X."""
    x = s / (s.square().sum().sqrt() + 1e-7)
    if x.shape[0] > x.shape[1]:
        return newton_schulz_literally(s.T, steps).T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def by_hand(x: dict[str, Any], memory: str, objective: str, update: str, chunk: int) -> Any:
    """One sequence, one head: y [T, Dv] and the final M and S."""
    q, k, v, gamma = (x[n][0, :, 0] for n in ("q", "k", "v", "gamma"))
    alpha, eta, theta = (x[n][0, :, 0].tolist() for n in ("alpha", "eta", "theta"))
    same = q.shape[-1] == v.shape[-1]
    m = [w[0] for w in x["weights"]]
    s = [torch.zeros_like(w) for w in m]
    outputs = []
    for t in range(len(q)):
        if t % chunk == 0:
            m0 = m

        def window_loss(at: list[Tensor], t: int = t) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for i in range(max(0, t - gamma.shape[-1] + 1), t + 1):
                read = memory_of(memory, at, k[i], same)
                square = ((read - v[i]) ** 2).sum() / 2
                total = total + gamma[t, t - i] * (square if objective == "l2" else -(read @ v[i]))
            return total

        g = grad(window_loss)(m0)
        s = [theta[t] * old + new for old, new in zip(s, g, strict=True)]
        u = s if update == "gd" else [newton_schulz_literally(z) for z in s]
        m = [alpha[t] * old - eta[t] * step for old, step in zip(m, u, strict=True)]
        outputs.append(memory_of(memory, m, q[t], same))
    return torch.stack(outputs), m, s


@pytest.mark.parametrize("update", ["gd", "muon"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_equals_the_loop_written_by_hand(memory: str, objective: str, update: str) -> None:
    for chunk, window, value_width in ((1, 1, 3), (4, 3, 3), (4, 7, 2), (16, 2, 3)):
        # A window of 7 over chunks of 4: the halo reaches back over a whole chunk.
        x = rule_inputs(
            memory, length=13, heads=1, window=window, value_width=value_width, update=update
        )
        y, m, s = by_hand(x, memory, objective, update, chunk)
        settings = {
            "memory": memory,
            "objective": objective,
            "update": update,
            "chunk_size": chunk,
        }
        for rule in (omega_rule_reference, omega_rule):
            ours, state = rule(**x, **settings)
            gap = difference(
                [ours[0, :, 0], *(w[0, 0] for w in (*state.weights, *state.momentum))],
                [y, *m, *s],
            )
            assert gap < 1e-11, (rule.__name__, chunk, window)


def test_online_errors_of_a_matrix_are_those_of_the_newest_memory() -> None:
    """b = 1 by hand, a chunk of 5 by the reference; no own step is cut."""
    x = rule_inputs("matrix", length=13, heads=1, window=1, momentum=False)
    x["eta"] = x["eta"] / x["k"].square().sum(-1).clamp(min=1)
    y, state = omega_rule_reference(**x, chunk_size=5, errors="online")
    w = x["weights"][0][0].expand(x["q"].shape[0], -1, -1)
    outputs = []
    for t in range(13):
        q, k, v = (x[n][:, t, 0] for n in ("q", "k", "v"))
        alpha, eta, gamma = x["alpha"][:, t], x["eta"][:, t], x["gamma"][:, t, 0]
        error = torch.einsum("bij,bj->bi", w, k) - v
        step = (eta * gamma)[..., None] * error.unsqueeze(-1) * k.unsqueeze(-2)
        w = alpha[..., None] * w - step
        outputs.append(torch.einsum("bij,bj->bi", w, q))
    assert difference([y[:, :, 0]], [torch.stack(outputs, 1)]) < 1e-12
    assert difference([state.weights[0][:, 0]], [w]) < 1e-12


def test_matrix_with_a_window_of_one_is_the_delta_rule() -> None:
    """W <- alpha W - eta (W k - v) k^T."""
    x = rule_inputs("matrix", batch=2, length=20, window=1, momentum=False)
    x["gamma"] = torch.ones_like(x["gamma"])
    w = x["weights"][0].expand(2, -1, -1, -1)
    outputs = []
    for t in range(20):
        q, k, v = (x[n][:, t].unsqueeze(-1) for n in "qkv")  # [B, H, D, 1]
        alpha, eta = (x[n][:, t, :, None, None] for n in ("alpha", "eta"))
        w = alpha * w - eta * (w @ k - v) @ k.mT
        outputs.append((w @ q).squeeze(-1))
    for rule in (omega_rule_reference, omega_rule):
        y, state = rule(**x, chunk_size=1)
        assert difference([y, state.weights[0]], [torch.stack(outputs, 1), w]) < 1e-13


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_dot_with_a_window_of_one_is_linear_attention(chunk: int) -> None:
    """y_t = abar_t W_0 q_t + sum_{s <= t} (prod_{r > s} alpha_r) eta_s (k_s . q_t) v_s."""
    x = rule_inputs("matrix", batch=2, length=20, window=1, momentum=False, features="polynomial")
    x["gamma"] = torch.ones_like(x["gamma"])
    phi = x["feature_map"]
    alpha, eta = x["alpha"], x["eta"]
    y = torch.zeros(2, 20, 2, 3, dtype=torch.float64)
    for t in range(20):
        y[:, t] = alpha[:, : t + 1].prod(1)[..., None] * torch.einsum(
            "hoi,bhi->bho", x["weights"][0], phi(x["q"][:, t])
        )
        for s in range(t + 1):
            # The kernel itself, not its features: 1 + q.k + (q.k)^2 / 2.
            dot = (x["q"][:, t] * x["k"][:, s]).sum(-1)
            kernel = 1 + dot + dot**2 / 2
            kept = alpha[:, s + 1 : t + 1].prod(1) * eta[:, s] * kernel
            y[:, t] += kept[..., None] * x["v"][:, s]
    for rule in (omega_rule_reference, omega_rule):
        ours, _ = rule(**x, objective="dot", chunk_size=chunk)
        assert difference([ours], [y]) < 1e-12


def test_the_halo_is_taken_at_the_current_memory() -> None:
    """A window over the chunk's start is not one cut there, nor one that keeps old gradients."""
    x = rule_inputs("matrix", length=2, heads=1, window=2, momentum=False, exact_gates=False)
    x["gamma"] = torch.ones_like(x["gamma"])
    q, k, v = (x[n][0, :, 0] for n in "qkv")
    alpha, eta = (x[n][0, :, 0] for n in ("alpha", "eta"))
    w0 = x["weights"][0][0]
    w1 = alpha[0] * w0 - eta[0] * torch.outer(w0 @ k[0] - v[0], k[0])
    both = torch.outer(w1 @ k[1] - v[1], k[1]) + torch.outer(w1 @ k[0] - v[0], k[0])
    w2 = alpha[1] * w1 - eta[1] * both
    for rule in (omega_rule_reference, omega_rule):
        y, state = rule(**x, chunk_size=1)
        assert difference([y[0, 1, 0], state.weights[0][0, 0]], [w2 @ q[1], w2]) < 1e-13


@pytest.mark.parametrize("memory", MEMORIES)
def test_muon_steps_only_where_ns_every_says(memory: str) -> None:
    """Between steps the memory only decays; the last token of a full chunk always steps."""
    x = rule_inputs(memory, length=10, window=2, update="muon", exact_gates=False)
    settings = {"memory": memory, "update": "muon", "chunk_size": 7, "ns_every": 3}
    for rule in (omega_rule_reference, omega_rule):
        before = [w[None] for w in x["weights"]]
        state, stepped = None, []
        for t in range(10):
            part = {n: z[:, t : t + 1] if isinstance(z, Tensor) else z for n, z in x.items()}
            _, state = rule(**part, **settings, state=state)
            kept = [x["alpha"][:, t, :, None, None] * w for w in before]
            stepped.append(difference(state.weights, kept) > 1e-6)
            before = list(state.weights)
        assert [t for t in range(10) if stepped[t]] == [2, 5, 6, 9]


def test_the_reference_streams() -> None:
    x = rule_inputs("mlp", batch=2, length=9, window=4)
    settings = {"memory": "mlp", "chunk_size": 4, "errors": "online"}
    whole = omega_rule_reference(**x, **settings)
    state, outputs = None, []
    for a, b in ((0, 1), (1, 6), (6, 6), (6, 9)):
        part = {n: z[:, a:b] if isinstance(z, Tensor) else z for n, z in x.items()}
        y, state = omega_rule_reference(**part, **settings, state=state)
        outputs.append(y)
    assert_close((torch.cat(outputs, 1), state), whole, 1e-13)
