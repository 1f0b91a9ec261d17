"""Softmax attention becomes a DeepTransformer layer that computes the same, and can go back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, draw
from torch import Tensor, nn

from atlas_blocks import AtlasMemory, SlidingWindowAttention, SlidingWindowAttentionConfig
from atlas_blocks.recipes.adapters import from_attention, replace_attention, to_attention

DIM, HEADS = 16, 4


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
    }
    return LlamaConfig(**(small | changes))


def language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(llama_config()).eval()
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0, scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def attention(kind: str) -> tuple[nn.Module, Any]:
    """An attention module in float64, every bias random, and what it computes."""
    if kind.startswith("multihead"):
        m = nn.MultiheadAttention(DIM, HEADS, bias=kind == "multihead", batch_first=True)

        def run(m: Any, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return m(x, x, x, attn_mask=mask, need_weights=False)[0]
    elif kind.startswith("our"):
        config = SlidingWindowAttentionConfig(window=None, qk_norm=kind == "our-own")
        m = SlidingWindowAttention(DIM, HEADS, config)

        def run(m: Any, x: Tensor) -> Tensor:
            return m(x)[0]
    else:
        pytest.importorskip("transformers")
        if kind == "gpt2":
            m = language_model("gpt2").get_submodule("transformer.h.1.attn")
        else:
            from transformers.models.llama.modeling_llama import LlamaAttention

            wide = {"head_dim": 10, "attention_bias": True} if kind == "llama-wide" else {}
            m = LlamaAttention(llama_config(_attn_implementation="sdpa", **wide), 0)

        def run(m: Any, x: Tensor) -> Tensor:
            from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

            if kind == "gpt2":
                return m(x)[0]
            steps = torch.arange(x.shape[1])[None]
            return m(x, position_embeddings=LlamaRotaryEmbedding(m.config)(x, steps))[0]

    for name, p in m.named_parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=float("scale" in name), std=0.3)
    return m.double(), run


KINDS = ("multihead", "multihead-plain", "our-own", "our-plain", "llama", "llama-wide", "gpt2")
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("window", [1, 3])
def test_the_layer_computes_what_attention_computed_and_learns(kind: str, window: int) -> None:
    module, run = attention(kind)
    layer = from_attention(module, window=window, gate_rank=4)
    x = 2 * draw(2, 70, layer.dim)
    # transformers rotates by angles of float32.
    tolerance = 1e-5 if kind.startswith("llama") else 1e-12
    true = run(module, x)
    assert difference([layer(x)[0]], [true]) < tolerance
    y, state = layer(x[:, :33])
    assert difference([y, layer(x[:, 33:], state)[0]], [true[:, :33], true[:, 33:]]) < tolerance

    first = next(p for p in module.parameters() if p.ndim == 2)
    grads = [
        torch.autograd.grad((f(x) * draw(*x.shape, seed=2)).sum(), weight)[0]
        for f, weight in ((lambda x: run(module, x), first),
                          (lambda x: layer(x)[0], layer.qkv.weight))
    ]  # fmt: skip
    theirs = grads[0].mT if kind == "gpt2" else grads[0]
    assert difference([grads[1][: len(theirs)]], [theirs]) < 10 * tolerance
    # The gates are neutral, not dead.
    (layer(x)[0] * draw(*x.shape, seed=2)).sum().backward()
    new = [layer.gates.decay.weight, layer.gates.eta[1].weight]
    new += [layer.gates.reach.weight] if window > 1 else []
    for p in new:
        assert p.grad.isfinite().all()
        assert (p.grad != 0).all()


@every_kind
def test_there_and_back_is_the_same_module(kind: str) -> None:
    module, run = attention(kind)
    layer = from_attention(module)
    with torch.no_grad():
        for p in (layer.qkv.weight, layer.out.weight):  # trained, but not its gates
            p.add_(0.01 * draw(*p.shape))
    other = to_attention(layer, module)
    x = draw(1, 20, layer.dim)
    assert difference([run(other, x)], [layer(x)[0]]) < 1e-5
    assert difference([run(module, x)], [layer(x)[0]]) > 1e-3  # copied, not changed
    same = to_attention(from_attention(module), module)
    for a, b in zip(same.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        layer.gates.decay.weight[1] = 1e-3
    with pytest.raises(ValueError, match="layer: expected gates that are still neutral"):
        to_attention(layer, module)


def test_what_is_not_causal_softmax_attention_is_refused() -> None:
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaAttention

    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    other = SlidingWindowAttention(DIM, 2, SlidingWindowAttentionConfig(window=None))
    for module, message in (
        (nn.Linear(3, 3), "module: expected a MultiheadAttention, .* got Linear"),
        (AtlasMemory(16, 2), "module: .* got AtlasMemory"),
        (SlidingWindowAttention(16, 2), "module: expected .* window=None"),
        (nn.MultiheadAttention(16, 2, kdim=8), "module: expected keys and values"),
        (LlamaAttention(llama_config(rope_parameters=scaled), 0), 'positions of type "default"'),
    ):
        with pytest.raises(ValueError, match=message):
            from_attention(module)
    with pytest.raises(ValueError, match="like: expected dim, heads and settings"):
        to_attention(from_attention(other), attention("our-own")[0])
    with pytest.raises(ValueError, match="model: expected one with Llama or GPT-2 attention"):
        replace_attention(nn.Linear(3, 3))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_keeps_its_logits_and_what_it_generates(kind: str) -> None:
    model = language_model(kind)
    tokens = torch.randint(64, (2, 40))
    options: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        true = model(tokens).logits
        searches = ({"do_sample": False}, {"do_sample": False, "num_beams": 3})
        texts = [model.generate(tokens[:, :9], **options, **s) for s in searches]
        names = replace_attention(model, gate_rank=4)
        assert len(names) == 2
        assert (model(tokens).logits - true).abs().max() < 1e-5
        for text, search in zip(texts, searches, strict=True):
            assert torch.equal(model.generate(tokens[:, :9], **options, **search), text)
        padded = torch.ones_like(tokens)
        padded[0, :3] = 0
        with pytest.raises(ValueError, match=r"attention_mask|position_ids"):
            model(tokens, attention_mask=padded)


def test_a_llama_trains_onward_after_it_was_converted() -> None:
    model = language_model("llama").train()
    tokens = torch.arange(48).repeat(4, 1).add(torch.arange(4)[:, None] * 3) % 64

    def train(steps: int) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        losses = []
        for _ in range(steps):
            logits = model(tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    before = train(10)
    replace_attention(model, gate_rank=4)
    after = train(15)
    assert after[0] < before[0]
    assert after[-1] < 0.7 * after[0]
    gates = model.get_submodule("model.layers.0.self_attn.layer.gates")
    assert not gates.untouched()
