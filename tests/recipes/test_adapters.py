"""Softmax attention becomes a DeepTransformer layer that computes the same, and can go back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from foreign import LIKE_LLAMA, attention_class, language_model, model_config
from helpers import difference, draw
from torch import Tensor, nn
from torch.nn.utils import prune

from atlas_blocks import AtlasMemory, SlidingWindowAttention, SlidingWindowAttentionConfig
from atlas_blocks.recipes.adapters import from_attention, to_attention
from atlas_blocks.recipes.surgery import replace_attention

DIM, HEADS = 16, 4


def attention(kind: str) -> tuple[nn.Module, Any]:
    """An attention module in float64, every bias random, and what it computes."""
    if kind.startswith("multihead"):
        m = nn.MultiheadAttention(DIM, HEADS, bias=kind == "multihead", batch_first=True)

        def run(m: Any, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return m(x, x, x, attn_mask=mask, need_weights=False)[0]
    elif kind.startswith("our"):
        config = SlidingWindowAttentionConfig(window=None, qk_norm=kind != "our-plain")
        if kind == "our-grouped":
            config = config.replace(kv_heads=2)
        m = SlidingWindowAttention(DIM, HEADS, config)

        def run(m: Any, x: Tensor) -> Tensor:
            return m(x)[0]
    else:
        pytest.importorskip("transformers")
        if kind == "gpt2":
            m = language_model("gpt2").get_submodule("transformer.h.1.attn")
        else:
            base, _, wide = kind.partition("-")
            changes = {"head_dim": 10, "attention_bias": True} if wide else {}
            config = model_config(base, attn_implementation="sdpa", **changes)
            m = attention_class(base)(config, 0)

        def run(m: Any, x: Tensor) -> Tensor:
            from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

            if kind == "gpt2":
                return m(x)[0]
            steps = torch.arange(x.shape[1])[None]
            cos_sin = LlamaRotaryEmbedding(m.config)(x, steps)
            return m(x, position_embeddings=cos_sin, attention_mask=None)[0]

    for name, p in m.named_parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=float("scale" in name or "norm" in name), std=0.3)
    return m.double(), run


KINDS = (
    "multihead", "multihead-plain", "our-own", "our-plain", "our-grouped", "llama", "llama-wide",
    "gpt2", "mistral", "qwen2", "qwen3", "gemma",
)  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("window", [1, 3])
def test_the_layer_computes_what_attention_computed_and_learns(kind: str, window: int) -> None:
    module, run = attention(kind)
    layer = from_attention(module, window=window, gate_rank=4)
    x = 2 * draw(2, 70, layer.dim)
    # transformers rotates by angles of float32.
    tolerance = 1e-5 if kind.split("-")[0] in LIKE_LLAMA else 1e-12
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

    def of_model(kind: str, **changes: Any) -> nn.Module:
        return attention_class(kind)(model_config(kind, **changes), 0)

    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    layers = 2 * ["sliding_attention"]
    sliding = {"sliding_window": 4, "use_sliding_window": True, "layer_types": layers}
    both_ways = of_model("llama")
    both_ways.config.is_causal = False
    other = SlidingWindowAttention(DIM, 2, SlidingWindowAttentionConfig(window=None))
    for module, message in (
        (nn.Linear(3, 3), "module: expected a MultiheadAttention, .* got Linear"),
        (AtlasMemory(16, 2), "module: .* got AtlasMemory"),
        (SlidingWindowAttention(16, 2), "module: expected .* window=None"),
        (nn.MultiheadAttention(16, 2, kdim=8), "module: expected keys and values"),
        (of_model("llama", rope_parameters=scaled), 'positions of type "default"'),
        (of_model("mistral", sliding_window=4), "module: expected .* without a sliding window"),
        (of_model("qwen2", **sliding), "module: expected .* without a sliding window"),
        (of_model("qwen3", rms_norm_eps=1e-5), "q_norm: expected an eps of 1e-06, got 1e-05"),
        (both_ways, "module: expected causal attention"),
    ):
        with pytest.raises(ValueError, match=message):
            from_attention(module)
    with pytest.raises(ValueError, match="like: expected dim, heads and settings"):
        to_attention(from_attention(other), attention("our-own")[0])
    with pytest.raises(ValueError, match="model: expected one with the attention of"):
        replace_attention(nn.Linear(3, 3))


def weight_norm(m: nn.Module, name: str) -> None:
    nn.utils.parametrizations.weight_norm(m, name)
    m.parametrizations[name].original0.data.mul_(1.5)


def pruned(m: nn.Module, name: str) -> None:
    prune.random_unstructured(m, name, 0.5)
    # The attribute that pruning leaves is stale until the next forward.
    m.get_parameter(f"{name}_orig").data.mul_(1.5)


@pytest.mark.parametrize("change", [weight_norm, pruned])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("multihead", "in_proj_weight"), ("multihead", "out_proj.weight"), ("our-own", "qkv.weight"),
     ("gpt2", "c_attn.weight"), ("llama-wide", "k_proj.weight"), ("llama-wide", "q_proj.bias")],
)  # fmt: skip
def test_parametrised_and_pruned_weights_are_converted_as_they_are_in_effect(
    kind: str, name: str, change: Any
) -> None:
    module, run = attention(kind)
    path, _, own = name.rpartition(".")
    before = from_attention(module, gate_rank=4)
    change(module.get_submodule(path), own)
    with torch.no_grad():
        layer = from_attention(module, gate_rank=4)
    x = 2 * draw(2, 20, layer.dim)
    assert difference([layer(x)[0]], [run(module, x)]) < 1e-5
    assert difference([before(x)[0]], [run(module, x)]) > 1e-2
    assert all(p.requires_grad for p in layer.parameters())
    with pytest.raises(ValueError, match=rf"like\.{own if not path else name}: .* a computed one"):
        to_attention(layer, module)


class LoRA(nn.Module):
    """As libraries of adapters wrap a Linear: `weight` is the base's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(m: nn.Module, name: str) -> None:
    old = m.get_submodule(name)
    m.set_submodule(name, Doubled(old.in_features, old.out_features, bias=False))


def hooked(m: nn.Module, name: str) -> None:
    m.get_submodule(name).register_forward_hook(lambda mod, args, y: 1.5 * y)


def hooked_before(m: nn.Module, name: str) -> None:
    m.get_submodule(name).register_forward_pre_hook(lambda mod, args: (1.5 * args[0],))


def hooked_backward(m: nn.Module, name: str) -> None:
    m.get_submodule(name).register_full_backward_hook(lambda mod, into, out: (2 * into[0],))


def patched(m: nn.Module, name: str) -> None:
    old = m.get_submodule(name)
    old.forward = Doubled.forward.__get__(old)


def sharded(m: nn.Module, name: str) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    linear = m.get_submodule(name)
    linear.weight = nn.Parameter(TwoTensor(linear.weight.data, linear.weight.data))


def offloaded(m: nn.Module, name: str) -> None:
    linear = m.get_submodule(name).to("meta")
    linear._hf_hook = "as accelerate leaves it"


def of_integers(m: nn.Module, name: str) -> None:
    linear = m.get_submodule(name)
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)


def wrapped(m: nn.Module, name: str) -> None:
    m.set_submodule(name, LoRA(m.get_submodule(name)))


HOOKS = (hooked, hooked_before, hooked_backward, patched)
CHANGES = [
    *itertools.product(
        (wrapped, replaced, sharded, offloaded, of_integers), ("q_proj", "v_proj", "o_proj")
    ),
    *itertools.product(HOOKS, ("q_proj", "o_proj", "")),
]


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_what_stands_before_a_projection_is_refused_by_its_name(change: Any, name: str) -> None:
    module, _ = attention("llama")
    layer = from_attention(module)
    change(module, name)
    with pytest.raises(ValueError, match=f"^{name or 'module'}.*: expected "):
        from_attention(module)
    with pytest.raises(ValueError, match=f"^{name or 'module'}.*: expected "):
        to_attention(layer, module)


def test_a_class_of_ones_own_is_not_taken_for_the_one_it_inherits_from() -> None:
    class Mine(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)[0], None

    with pytest.raises(ValueError, match=r"module: expected a MultiheadAttention, .* got Mine"):
        from_attention(Mine(16, 2))


def test_what_a_layer_has_learnt_through_a_wrapper_is_not_lost_on_the_way_back() -> None:
    module, _ = attention("multihead")
    layer = from_attention(module)
    layer.qkv = LoRA(layer.qkv)
    with pytest.raises(ValueError, match=r"qkv\.weight: expected the parameter of a plain layer"):
        to_attention(layer, module)
    layer = from_attention(module)
    layer.register_forward_hook(lambda mod, args, out: (1.5 * out[0], out[1]))
    with pytest.raises(ValueError, match="layer: expected a module without hooks"):
        to_attention(layer, module)
    with pytest.raises(ValueError, match="layer: expected a DeepTransformerLayer, got AtlasMemory"):
        to_attention(AtlasMemory(16, 2), module)


def test_only_biases_may_be_absent_and_all_of_one_kind() -> None:
    module, _ = attention("llama-wide")
    module.k_proj.bias = None
    with pytest.raises(ValueError, match=r"k_proj\.bias: expected a bias, as others of q_proj"):
        from_attention(module)
    module, _ = attention("llama")
    module.k_proj.weight = None
    with pytest.raises(ValueError, match=r"k_proj\.weight: expected a plain tensor of floats"):
        from_attention(module)
    module, _ = attention("llama")
    module.k_proj.bfloat16()
    with pytest.raises(ValueError, match=r"k_proj\.weight: expected the dtype of the others"):
        from_attention(module)
    module, _ = attention("llama")
    module.o_proj.bfloat16()
    with pytest.raises(ValueError, match=r"o_proj\.weight: expected the dtype of the others"):
        from_attention(module)
    module, _ = attention("llama")
    module.k_proj = nn.Linear(32, 8, bias=False).double()  # heads cut off
    with pytest.raises(ValueError, match=r"q_proj\.weight and k_proj\.weight and v_proj"):
        from_attention(module)


def test_a_frozen_attention_stays_frozen_and_its_gates_learn() -> None:
    module, _ = attention("llama-wide")
    module.requires_grad_(False)
    layer = from_attention(module, gate_rank=4)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {f"gates.{name}" for name, _ in layer.gates.named_parameters()}
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    x = draw(2, 20, layer.dim).requires_grad_()
    (layer(x)[0] * draw(2, 20, layer.dim, seed=2)).sum().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], 0.1).step()
    assert (x.grad != 0).any()
    changed = {n for n, p in layer.named_parameters() if not torch.equal(p, before[n])}
    assert {"gates.decay.weight"} <= changed <= trained

    module.q_proj.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"k_proj\.weight: expected the requires_grad of the others"
    ):
        from_attention(module)
