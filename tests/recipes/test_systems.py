"""Every named system is its own paper's recurrence, written here in a few lines, in float64.

T tokens, H heads, D head width, c window. The recurrences run on one sequence: q, k, v [T, H, D].
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, draw, unit
from torch import Tensor, nn

from atlas_blocks import AtlasMemory, AtlasMemoryConfig
from atlas_blocks.blocks.gates import Gate
from atlas_blocks.recipes import registry

DIM, HEADS, LENGTH = 12, 3, 21


def layer_of(architecture: str, **changes) -> AtlasMemory:
    """The memory layer of a recipe, small, its gates dependent on the token as after training."""
    torch.manual_seed(0)
    block = registry.config(f"{architecture}-tiny").layers[0]
    config = block.mixer if hasattr(block, "mixer") else block.memory
    assert isinstance(config, AtlasMemoryConfig)
    layer = config.replace(**changes).build(DIM, HEADS)
    for module in layer.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module[1].weight, std=0.5)
    return layer.double()


def agree(layer: AtlasMemory, recurrence: Callable[..., Tensor], tolerance: float = 1e-11) -> None:
    """layer(x) is the recurrence on its q, k, v, within its own output norm and gate."""
    x = draw(1, LENGTH, DIM)
    with torch.no_grad():
        qkv = F.silu(layer.conv(layer.qkv(x))[0])[0].unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.unbind(1)
        q, k = unit(q), unit(k)
    y = recurrence(q, k, v, x)
    y = layer.norm(y[None]).flatten(-2) * F.silu(layer.gate(x))
    assert difference([layer(x)[0]], [layer.out(y)]) < tolerance


def outer(v: Tensor, k: Tensor) -> Tensor:
    return v.unsqueeze(-1) * k.unsqueeze(-2)


def read(s: Tensor, q: Tensor) -> Tensor:
    return (s @ q.unsqueeze(-1)).squeeze(-1)


def test_linear_attention_sums_outer_products():
    def recurrence(q, k, v, x):
        s, outputs = torch.zeros(HEADS, 4, 4).double(), []
        for t in range(LENGTH):
            s = s + outer(v[t], k[t])
            outputs.append(read(s, q[t]))
        return torch.stack(outputs)

    agree(layer_of("linear-attention", chunk_size=8), recurrence)


def test_linear_attention_is_attention_without_softmax():
    def attention(q, k, v, x):
        scores = torch.einsum("thd,shd->hts", q, k).tril()
        return torch.einsum("hts,shd->thd", scores, v)

    agree(layer_of("linear-attention"), attention)


def test_retnet_decays_by_head():
    def recurrence(q, k, v, x):
        # Sun et al. 2023 as published: log(1 - exp(linspace(log 1/32, log 1/512, H))).
        spread = torch.linspace(math.log(1 / 32), math.log(1 / 512), HEADS, dtype=torch.float64)
        decay = (1 - spread.exp())[:, None, None]
        s, outputs = torch.zeros(HEADS, 4, 4).double(), []
        for t in range(LENGTH):
            s = decay * s + outer(v[t], k[t])
            outputs.append(read(s, q[t]))
        return torch.stack(outputs)

    agree(layer_of("retnet", chunk_size=8), recurrence)


def test_deltanet_is_the_delta_rule():
    """In chunks: online errors are those of the newest memory."""
    layer = layer_of("deltanet")
    assert layer.config.chunk_size == 64

    def recurrence(q, k, v, x):
        beta = layer.eta(x)[0]
        s, outputs = torch.zeros(HEADS, 4, 4).double(), []
        for t in range(LENGTH):
            wrong = v[t] - read(s, k[t])
            s = s + beta[t, :, None, None] * outer(wrong, k[t])
            outputs.append(read(s, q[t]))
        return torch.stack(outputs)

    agree(layer, recurrence)


def test_gated_deltanet_with_its_own_strength_and_value():
    """S = a S (I - b k k^T) + b v k^T of Yang et al. 2025 with b = eta / alpha, v = alpha v."""
    layer = layer_of("gated-deltanet")

    def recurrence(q, k, v, x):
        alpha, eta = layer.alpha(x)[0][..., None, None], layer.eta(x)[0][..., None, None]
        s, outputs = torch.zeros(HEADS, 4, 4).double(), []
        for t in range(LENGTH):
            a, b, u = alpha[t], eta[t] / alpha[t], alpha[t, ..., 0] * v[t]
            s = a * s @ (torch.eye(4).double() - b * outer(k[t], k[t])) + b * outer(u, k[t])
            outputs.append(read(s, q[t]))
        return torch.stack(outputs)

    agree(layer, recurrence)


def test_samba_has_the_recurrence_of_mamba_2():
    layer = layer_of("samba", chunk_size=8)

    def recurrence(q, k, v, x):
        alpha, step = layer.alpha(x)[0][..., None, None], layer.eta(x)[0][..., None, None]
        s, outputs = torch.zeros(HEADS, 4, 4).double(), []
        for t in range(LENGTH):
            s = alpha[t] * s + step[t] * outer(v[t], k[t])
            outputs.append(read(s, q[t]))
        return torch.stack(outputs)

    agree(layer, recurrence)


def test_swla_writes_a_window_of_polynomial_features():
    layer = layer_of("swla", feature_map="polynomial", window=5, chunk_size=8)

    def recurrence(q, k, v, x):
        # Features are never formed: y_t = sum over all writes of (a + b q.k + c (q.k)^2) v.
        a, b, c = layer.feature_map().coefficients
        alpha, eta = layer.alpha(x)[0], layer.eta(x)[0]
        gamma = layer.gamma(x)[0].unflatten(-1, (HEADS, 5))
        strength, outputs = torch.zeros(LENGTH, HEADS).double(), []
        for t in range(LENGTH):
            strength = alpha[t] * strength
            for j in range(min(5, t + 1)):
                strength[t - j] += eta[t] * gamma[t, :, j]
            dots = (q[t] * k).sum(-1)
            weight = strength * (a + b * dots + c * dots**2)
            outputs.append((weight[..., None] * v).sum(0))
        return torch.stack(outputs)

    agree(layer, recurrence)


def mlp(w1: Tensor, w2: Tensor, features: Tensor, x: Tensor) -> Tensor:
    return x + read(w1, F.gelu(read(w2, features)))


def slopes(w: list[Tensor], loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in w]
    with torch.enable_grad():
        return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("chunk", [1, 8])
def test_titans_is_its_long_term_memory_module(chunk):
    """Eq. 9 and 10 of Behrouz et al. 2024: surprise S = theta S - eta grad, M = alpha M + S."""
    layer = layer_of("titans", chunk_size=chunk, errors="chunk", decay_to="zero")

    @torch.no_grad()
    def recurrence(q, k, v, x):
        alpha, theta = layer.alpha(x)[0], layer.theta(x)[0]
        eta = layer.gamma(x)[0]  # the strength of a write, within the momentum
        w = [m.detach() for m in layer.memory()]
        s, start, outputs = [torch.zeros_like(m) for m in w], w, []
        for t in range(LENGTH):
            start = w if t % chunk == 0 else start
            grad = slopes(
                start, lambda a, b, t=t: 0.5 * (mlp(a, b, k[t], k[t]) - v[t]).square().sum()
            )
            s = [
                theta[t, :, None, None] * m - eta[t, :, None, None] * g
                for m, g in zip(s, grad, strict=True)
            ]
            w = [alpha[t, :, None, None] * m + d for m, d in zip(w, s, strict=True)]
            outputs.append(mlp(*w, q[t], q[t]))
        return torch.stack(outputs)

    agree(layer, recurrence)


def test_ttt_steps_by_mini_batches():
    """Sun et al. 2024: W_t = W' - sum over the batch so far of eta grad(W'), W' before it."""
    layer = layer_of("ttt", errors="chunk")
    assert layer.config.chunk_size == 16

    @torch.no_grad()
    def recurrence(q, k, v, x):
        eta, outputs = layer.eta(x)[0], []
        w = start = [m.detach() for m in layer.memory()]
        for t in range(LENGTH):
            start = w if t % 16 == 0 else start
            grad = slopes(
                start, lambda a, b, t=t: 0.5 * (mlp(a, b, k[t], k[t]) - v[t]).square().sum()
            )
            w = [m - eta[t, :, None, None] * g for m, g in zip(w, grad, strict=True)]
            outputs.append(mlp(*w, q[t], q[t]))
        return torch.stack(outputs)

    agree(layer, recurrence)


def test_dla_writes_values_into_a_deep_memory():
    bare = {"errors": "chunk", "decay_to": "zero"}
    layer = layer_of("dla", chunk_size=1, feature_map="polynomial", **bare)

    @torch.no_grad()
    def recurrence(q, k, v, x):
        alpha, eta = layer.alpha(x)[0], layer.eta(x)[0] * layer.gamma(x)[0]
        phi, w, outputs = layer.feature_map(), [m.detach() for m in layer.memory()], []
        for t in range(LENGTH):
            grad = slopes(w, lambda a, b, t=t: -(mlp(a, b, phi(k[t]), k[t]) * v[t]).sum())
            w = [
                alpha[t, :, None, None] * m - eta[t, :, None, None] * g
                for m, g in zip(w, grad, strict=True)
            ]
            outputs.append(mlp(*w, phi(q[t]), q[t]))
        return torch.stack(outputs)

    agree(layer, recurrence)


@pytest.mark.parametrize("architecture", ["deep-transformer", "swdt", "dot"])
def test_the_truncated_exponential_is_an_exponential(architecture):
    """phi* cut at degree 4, coefficients fixed: with all its features, exp(q.k) to e / 5!."""
    layer = layer_of(architecture, feature_map="polynomial")
    assert not any("coefficients" in name for name, _ in layer.named_parameters())
    assert layer.config.degree == 4
    q, k = F.normalize(draw(50, 4), dim=-1), F.normalize(draw(50, 4, seed=2), dim=-1)
    phi = layer.feature_map()
    assert (phi(q) @ phi(k).mT - (q @ k.mT).exp()).abs().max() < math.e / math.factorial(5)


DEEP = ("dla", "deep-transformer", "swdt", "dot", "titans", "ttt")
MATRIX = ("gated-deltanet", "deltanet")


@pytest.mark.parametrize("logit", [None, 30.0])
@pytest.mark.parametrize("architecture", [*DEEP, *MATRIX])
def test_repetition_leaves_every_memory_bounded(architecture, logit):
    """Gates as they start and wide open; rows of 1, 2 and 16 distinct tokens. A plain sum of outer
    products grows with the text, as it must: it is not among these. With retention wide open a
    deep memory of "dot" is a sum too, whose steps its own size limits: it grows as the root of the
    text's length, 12 after 800 tokens, 27 after 4,000, 122 after 80,000."""
    layer = layer_of(architecture).float()
    for gate in layer.modules():
        if isinstance(gate, Gate):
            nn.init.zeros_(gate[1].weight)
            nn.init.constant_(gate[1].bias, logit or 0.0)
    table = draw(16, DIM, dtype=torch.float32)
    length = 3200
    x = torch.stack([table[torch.randint(n, (length,))] for n in (1, 2, 16)])
    with torch.no_grad():
        y, state = layer(x)
    assert y.abs().max() < 20
    hebbian = layer.config.objective == "dot" and logit is not None
    # Titans, with momentum at its end too, comes to 11 to 18 and stays there.
    assert max(w.abs().max() for w in state.rule.weights) < (0.5 * length**0.5 if hebbian else 25)
