"""Blocks put into models of transformers and into plain modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import LIKE_LLAMA, language_model, model_config
from helpers import small_memory
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemory,
    DeepTransformerConfig,
    LSTMConfig,
    MemoryAsGateMixerConfig,
    SlidingWindowAttention,
    SlidingWindowAttentionConfig,
)
from atlas_blocks.recipes.surgery import load_converted, replace_layers, train_only_new

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")

KINDS = [*LIKE_LLAMA, "gpt2", "gpt_neox", "phi"]
MEMORY = small_memory(update="gd")
every_kind = pytest.mark.parametrize("kind", KINDS)
GREEDY: dict[str, Any] = {
    "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip


def draw_tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, length))


def padded() -> tuple[Tensor, Tensor]:
    tokens, mask = draw_tokens(), torch.ones(3, 9, dtype=torch.long)
    for row, count in enumerate((0, 3, 7)):
        mask[row, :count] = 0
    return tokens, mask


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 1e-5


def trained(model: Any, parameters: Any = None, steps: int = 12) -> list[float]:
    """Losses of AdamW on one batch."""
    tokens = torch.arange(24).repeat(2, 1).add(torch.arange(2)[:, None] * 3) % 64
    optimizer = torch.optim.AdamW(parameters or list(model.parameters()), 5e-3)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def assert_itself(model: Any, folder: Path) -> None:
    """Greedy with and without a cache, padded and alone, saved and loaded."""
    tokens, mask = padded()
    found = model.generate(tokens, attention_mask=mask, **GREEDY)
    for row in range(3):
        alone = tokens[[row]][:, mask[row].bool()]
        for options in ({}, {"use_cache": False}):
            assert torch.equal(model.generate(alone, **GREEDY, **options)[0, -6:], found[row, 9:])
    model.save_pretrained(folder)
    loaded = load_converted(folder)
    assert type(loaded) is type(model)
    assert loaded.config.atlas_layers == model.config.atlas_layers
    # A tied weight may lie otherwise in memory and round otherwise.
    close(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded.generate(tokens, attention_mask=mask, **GREEDY), found)


@every_kind
def test_from_attention_goes_on_as_it_did_and_learns(kind: str, tmp_path: Path) -> None:
    model = language_model(kind)
    converted, tokens = copy.deepcopy(model), draw_tokens(2, 40)
    names = replace_layers(converted, block=DeepTransformerConfig(window=3, gate_rank=4))
    assert len(names) == 2
    with torch.no_grad():
        close(converted(tokens).logits, model(tokens).logits)
        assert torch.equal(converted.generate(tokens, **GREEDY), model.generate(tokens, **GREEDY))
    losses = trained(converted)
    assert losses[-1] < 0.9 * losses[0]
    assert_itself(converted, tmp_path)


def sliding(kind: str) -> Any:
    """A model whose first layer sees 4 tokens, and its second too, but for qwen3's."""
    if kind == "gemma3":
        torch.manual_seed(0)
        small = model_config("gemma").to_dict() | {"sliding_window": 4, "model_type": "gemma3_text"}
        small["layer_types"] = 2 * ["sliding_attention"]
        small.pop("rope_parameters", None)
        config = transformers.Gemma3TextConfig(**small)
        return transformers.Gemma3ForCausalLM(config).eval()
    if kind == "mistral":
        return language_model(kind, sliding_window=4)
    kinds = ["sliding_attention", "full_attention" if kind == "qwen3" else "sliding_attention"]
    slides = {"sliding_window": 4, "use_sliding_window": True, "layer_types": kinds}
    return language_model(kind, **slides)


@pytest.mark.parametrize("init", ["fresh", "parallel"])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_a_memory_takes_a_sliding_window_s_place_and_sees_further(
    kind: str, init: str, tmp_path: Path
) -> None:
    model, tokens = sliding(kind), draw_tokens(2, 40)
    before = model(tokens).logits
    (name,) = replace_layers(model, layers=0, block=MEMORY, init=init)
    if init == "parallel":
        close(model(tokens).logits, before)
        nn.init.normal_(model.get_parameter(f"{name}.gate"))
    assert_itself(model, tmp_path)
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 7) % 64
    with torch.no_grad():
        out, other = (model(t, use_cache=False).logits for t in (tokens, changed))
        assert (other[:, -1] - out[:, -1]).abs().max() > 1e-6
        # Documents longer than the window, and none shorter than it.
        positions = torch.cat([torch.arange(n) for n in (13, 2, 25)])[None]
        packed = model(tokens[:1], position_ids=positions, use_cache=False).logits
        for part, alone in zip(
            packed.split([13, 2, 25], 1), tokens[:1].split([13, 2, 25], 1), strict=True
        ):
            close(part, model(alone, use_cache=False).logits)
        # In pieces, whose masks know only what the window has kept.
        cache = model(tokens[:, :11], use_cache=True).past_key_values
        for part in tokens[:, 11:].split([1, 9, 19], 1):
            piece = model(part, past_key_values=cache, use_cache=True)
        close(piece.logits, out[:, -19:])


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_a_sliding_window_is_taken_over(kind: str, tmp_path: Path) -> None:
    model, tokens = sliding(kind), draw_tokens(2, 40)
    before = model(tokens).logits
    block = SlidingWindowAttentionConfig(window=4, sink_tokens=0)
    replace_layers(model, layers=0, block=block)
    close(model(tokens).logits, before)
    assert_itself(model, tmp_path)


def test_a_mask_of_another_window_is_refused() -> None:
    model = sliding("mistral")
    replace_layers(model, block=MEMORY, init="fresh")
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    for band in (3, 5, 9):
        mask = (causal & ~causal.tril(-band)).expand(2, 1, 9, 9)
        with pytest.raises(ValueError, match=r"attention_mask: .*, within the window of 4, got an"):
            model(draw_tokens(2), attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="window: expected an int >= 2, got 1"):
        hugging_face.HuggingFaceAttention(MEMORY.build(32, 4), 0, window=1)


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        *((kind, MEMORY) for kind in ("llama", "gpt2", "gpt_neox")),
        *(
            pytest.param(kind, MEMORY, marks=pytest.mark.slow)
            for kind in KINDS
            if kind not in ("llama", "gpt2", "gpt_neox")
        ),
        ("llama", SlidingWindowAttentionConfig(window=5)),
        ("gpt_neox", LSTMConfig()),
        ("gpt2", MemoryAsGateMixerConfig(MEMORY, SlidingWindowAttentionConfig(window=5))),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_block_beside_the_attention_starts_as_nothing_and_learns(
    kind: str, block: Any, tmp_path: Path
) -> None:
    model = language_model(kind)
    true, tokens = copy.deepcopy(model), draw_tokens(2, 12)
    replace_layers(model, block=block, init="parallel")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, true(tokens).logits)
    names = train_only_new(model)
    assert all(".layer." in n or n.endswith(".gate") for n in names)
    new = [p for p in model.parameters() if p.requires_grad]
    assert 0 < len(new) == len(names)
    losses = trained(model, new, 6)
    assert losses[-1] < losses[0]
    for (name, p), (_, before) in zip(
        (
            (n.replace(".attention.", ".", 1), p)
            for n, p in model.named_parameters()
            if n not in names
        ),
        true.named_parameters(),
        strict=True,
    ):
        assert torch.equal(p, before), name
    assert_itself(model, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("block", [MEMORY, SlidingWindowAttentionConfig(window=5)], ids=type)
def test_a_fresh_block_in_some_layers(kind: str, block: Any, tmp_path: Path) -> None:
    model = language_model(kind)
    (name,) = replace_layers(model, 1, block=block, init="fresh")
    assert "1" in name
    part = model.get_submodule(name)
    assert isinstance(part, hugging_face.HuggingFaceAttention)
    assert set(train_only_new(model)) == {f"{name}.{n}" for n, _ in part.named_parameters()}
    losses = trained(model, [p for p in model.parameters() if p.requires_grad])
    assert losses[-1] < losses[0]
    assert_itself(model, tmp_path)


def test_mixers_of_our_own_models_are_replaced_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hugging_face.AtlasConfig.from_recipe("atlas-hybrid-tiny", vocab_size=64)
    model = hugging_face.AtlasForCausalLM(config).eval()
    place = "model.layers.0.block.mixer"
    replace_layers(model, place, block=SlidingWindowAttentionConfig(window=4), init="fresh")
    assert_itself(model, tmp_path)


def test_of_attention_that_was_taken_over_the_gates_alone_are_new() -> None:
    model = language_model("qwen3")
    replace_layers(model, [1])
    assert all(n.startswith("model.layers.1.self_attn.layer.gates.") for n in train_only_new(model))


def test_a_memory_takes_over_projections_and_a_window_the_whole_function(tmp_path: Path) -> None:
    model = language_model("llama")
    old = copy.deepcopy(model.model.layers[0].self_attn)
    (name,) = replace_layers(model, "model.layers.0.self_attn", block=MEMORY)
    memory = model.get_submodule(name).layer
    assert type(memory) is AtlasMemory
    q, k, v = memory.qkv.weight.split(32)
    assert torch.equal(q, old.q_proj.weight)
    for ours, theirs in ((k, old.k_proj), (v, old.v_proj)):
        heads = theirs.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0)
        assert torch.equal(ours, heads.flatten(0, 1))
    assert torch.equal(memory.out.weight, old.o_proj.weight)
    names = train_only_new(model)
    assert f"{name}.layer.gate.weight" in names
    assert f"{name}.layer.qkv.weight" not in names
    assert_itself(model, tmp_path / "memory")

    for kind in ("llama", "qwen3", "mistral"):
        model = language_model(kind)
        true, tokens = copy.deepcopy(model), draw_tokens(2, 9)
        replace_layers(model, block=SlidingWindowAttentionConfig(window=9))
        close(model(tokens).logits, true(tokens).logits)
        assert_itself(model, tmp_path / kind)


@pytest.mark.parametrize(
    ("kind", "block", "words"),
    [
        ("llama", DeepTransformerConfig(objective="l2"), 'block: expected objective="dot"'),
        ("llama", AtlasBlockConfig(), "block: expected DeepTransformerConfig, Sliding"),
        ("gpt2", MEMORY, "module: expected heads that make up the width, and no biases"),
        ("gpt2", SlidingWindowAttentionConfig(), "module: expected plain attention with rotary"),
        ("phi", SlidingWindowAttentionConfig(), "module: expected plain attention with rotary"),
    ],
)
def test_a_block_that_cannot_take_over_is_refused(kind: str, block: Any, words: str) -> None:
    model = language_model(kind)
    parts = list(model.modules())
    with pytest.raises(ValueError, match=words):
        replace_layers(model, block=block)
    assert all(a is b for a, b in zip(model.modules(), parts, strict=True))
    assert not hasattr(model.config, "atlas_layers")


def test_soft_caps_and_norms_that_the_rule_does_not_have_are_refused() -> None:
    small = model_config("gemma").to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip
    small = {key: small[key] for key in keys}
    gemma2 = transformers.Gemma2Config(**small, layer_types=2 * ["full_attention"])
    with pytest.raises(ValueError, match=r"self_attn: attn_logit_softcapping: expected None"):
        replace_layers(transformers.Gemma2ForCausalLM(gemma2))
    gemma2.attn_logit_softcapping = None
    model = transformers.Gemma2ForCausalLM(gemma2).eval()
    tokens = draw_tokens()
    true = model(tokens).logits
    replace_layers(model)
    close(model(tokens).logits, true)
    gemma2.layer_types = 2 * ["sliding_attention"]
    with pytest.raises(ValueError, match="attention without a sliding window"):
        replace_layers(transformers.Gemma2ForCausalLM(gemma2))
    with pytest.raises(ValueError, match="qk_layernorm: expected False"):
        replace_layers(language_model("phi", qk_layernorm=True))


@pytest.mark.parametrize("kind", KINDS)
def test_linears_in_wrappers_give_what_is_in_effect_or_their_name(kind: str) -> None:
    model = language_model(kind)
    attention = next(m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config"))
    name = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}.get(kind, "q_proj")
    if kind != "gpt2":  # whose Conv1D torch's weight_norm takes by its own dimension
        parametrizations.weight_norm(attention.get_submodule(name))
        with torch.no_grad():
            attention.get_submodule(name).parametrizations.weight.original0.mul_(1.5)
    tokens = draw_tokens()
    true = model(tokens).logits
    converted = copy.deepcopy(model)
    replace_layers(converted)
    close(converted(tokens).logits, true)
    attention.set_submodule(name, nn.Sequential(attention.get_submodule(name)))
    with pytest.raises(ValueError, match=rf"{name}\.weight: expected the parameter of a plain lay"):
        replace_layers(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_is_named_until_it_is_merged() -> None:
    peft = pytest.importorskip("peft")
    model, tokens = language_model("llama"), draw_tokens()
    options = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, options).eval()
    true = wrapped(tokens).logits
    with pytest.raises(ValueError, match=r"self_attn: q_proj\.weight: expected the parameter of a"):
        replace_layers(wrapped)
    merged = wrapped.merge_and_unload()
    replace_layers(merged)
    close(merged(tokens).logits, true)


def test_what_a_module_was_is_taken_over() -> None:
    model = language_model("llama").double()
    model.requires_grad_(False)
    shared = model.model.layers[0].self_attn
    model.model.layers[1].self_attn = shared
    seen: list[tuple[int, ...]] = []
    shared.register_forward_hook(lambda m, args, out: seen.append(tuple(out[0].shape)))
    names = replace_layers(model, 0, block=DeepTransformerConfig(gate_rank=4))
    assert names == [f"model.layers.{i}.self_attn" for i in range(2)]
    part = model.model.layers[0].self_attn
    assert model.model.layers[1].self_attn is part
    assert {p.dtype for p in part.parameters()} == {torch.float64}
    assert not part.training
    frozen = {n for n, p in part.named_parameters() if not p.requires_grad}
    assert frozen == {"layer.qkv.weight", "layer.out.weight"}
    model(draw_tokens(1, 4), use_cache=False)
    assert seen == 2 * [(1, 4, 32)]


class Mixing(nn.Module):
    """A decoder of somebody's, around causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.GELU())

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y, _ = self.attention(x, x, x, attn_mask=mask, key_padding_mask=padding, is_causal=True)
        return x + self.mlp(x + y)


@torch.no_grad()
def test_plain_modules_are_found_by_path_or_predicate() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Mixing(), Mixing()), torch.randn(2, 9, 16)
    true = model(x)
    found = copy.deepcopy(model)
    assert replace_layers(found) == ["0.attention", "1.attention"]
    close(found(x), true)
    # Padding at the left, of which torch itself makes NaN, gives what the row gives alone.
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :4] = True
    close(found[0](x, padding)[0, 4:], model[0](x[:1, 4:])[0])

    for layers in ("1.mlp.0", lambda name, m: name == "1.mlp.0"):
        fresh = copy.deepcopy(model)
        assert replace_layers(fresh, layers, block=MEMORY, init="fresh", heads=2) == ["1.mlp.0"]
        assert fresh(x).shape == x.shape
        assert all(n.startswith("1.mlp.0.layer.") for n in train_only_new(fresh))
    beside = copy.deepcopy(model)
    replace_layers(beside, ["0.attention", "1.mlp"], block=MEMORY, init="parallel", heads=2)
    assert torch.equal(beside(x), true)
    beside[0].attention.gate.fill_(0.5)
    assert not torch.allclose(beside(x), true)

    blocks = nn.ModuleList([SlidingWindowAttention(16, 2, SlidingWindowAttentionConfig(None))])
    y, _ = blocks[0](x)
    replace_layers(blocks, "0")
    close(blocks[0](x)[0], y)


@pytest.mark.parametrize(
    ("layers", "options", "words"),
    [
        ("model.nothing", {}, "layers: expected paths of modules, got 'model.nothing'"),
        (7, {}, "layers: expected numbers of layers with an attention of transformers, got 7"),
        ([], {}, "layers: expected at least one"),
        (lambda n, m: False, {}, "layers: expected a predicate that chooses a module"),
        (None, {"init": "random"}, "init: expected one of"),
        (None, {"init": "fresh"}, "block: expected the config of a block"),
        (None, {"block": 3}, "block: expected the config of a block, got int"),
        (None, {"block": AtlasBlockConfig(), "init": "fresh"}, "without a residual of its own"),
        (None, {"block": MEMORY, "init": "fresh", "heads": 5}, "heads: expected a divisor of dim"),
    ],
)
def test_what_is_not_there_is_refused(layers: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace_layers(language_model("llama"), layers, **options)


def test_modules_that_are_asked_for_something_else_say_so() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)])
    with pytest.raises(ValueError, match="model: expected one with layers of replace_layers"):
        train_only_new(model)
    with pytest.raises(ValueError, match="model: expected one with the attention of Gemma"):
        replace_layers(nn.Linear(2, 2))
    replace_layers(model)
    x = torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="key: expected the query itself"):
        model[0](x, x.clone(), x)
    with pytest.raises(ValueError, match="attn_mask: expected a causal mask"):
        model[0](x, x, x)
    with pytest.raises(ValueError, match=r"1\.mlp: heads: expected how many"):
        replace_layers(nn.Sequential(Mixing(), Mixing()), "1.mlp", block=MEMORY, init="fresh")
