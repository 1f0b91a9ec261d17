"""Recipes as models of transformers: the same functions, saved and loaded by its own classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import AtlasBlockConfig, MixtureOfExpertsConfig, SlidingWindowAttentionConfig
from atlas_blocks.blocks.feed_forward import balance_loss
from atlas_blocks.recipes import registry
from atlas_blocks.recipes.architectures import ARCHITECTURES
from atlas_blocks.recipes.model import LanguageModelConfig

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")
convert = pytest.importorskip("atlas_blocks.recipes.hugging_face.convert")

SOME = ("atlas", "atlas-hybrid")


def among(quick: Sequence[str], every: Sequence[str]) -> Any:
    """A parameter `name` of all, those that are not quick in the slow run."""
    slow = [pytest.param(n, marks=pytest.mark.slow) for n in every if n not in quick]
    return pytest.mark.parametrize("name", [*quick, *slow])


some = among(SOME, ["transformer", "atlas-mac"])


def made(name: str, **changes: Any) -> Any:
    """A tiny model, its weights moved away from where they start."""
    torch.manual_seed(0)
    config = hugging_face.AtlasConfig.from_recipe(f"{name}-tiny", **changes)
    model = hugging_face.AtlasForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 1e-4


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Tokens [3, 9] and their mask: rows of 9, 6 and 2 real tokens."""
    tokens, mask = torch.randint(1, 256, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    for row, count in enumerate((0, 3, 7)):
        mask[row, slice(count) if side == "left" else slice(9 - count, None)] = 0
    return tokens, mask


@among(("atlas-mag", "atlas-mac", "lstm", "transformer"), list(ARCHITECTURES))
@torch.no_grad()
def test_every_recipe_is_the_same_model_there_and_comes_back(name: str, tmp_path: Path) -> None:
    model = registry.build(f"{name}-tiny").eval()
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    tokens = torch.randint(0, 256, (2, 11))
    true = model(tokens).logits
    there = convert.from_language_model(model)
    assert torch.equal(there(tokens).logits, true)
    assert torch.equal(there(tokens, use_cache=False).logits, true)
    there.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is hugging_face.AtlasForCausalLM
    assert not loaded.training
    assert torch.equal(loaded(tokens).logits, true)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(tokens).last_hidden_state, loaded.model(tokens).last_hidden_state)
    back = convert.to_language_model(loaded)
    assert back.config == model.config
    assert torch.equal(back(tokens).logits, true)


def test_a_model_starts_as_a_language_model_does() -> None:
    config = hugging_face.AtlasConfig.from_recipe("atlas-mag-tiny")
    found = convert.to_language_model(hugging_face.AtlasForCausalLM(config)).state_dict()
    one, two = (registry.build("atlas-mag-tiny").state_dict() for _ in range(2))
    assert found.keys() == one.keys()
    for name, t in found.items():
        assert torch.equal(one[name], two[name]) == torch.equal(one[name], t), name
        if not torch.equal(one[name], two[name]):
            assert 0.7 < t.std() / one[name].std() < 1.4, name


def test_a_config_takes_patterns_and_goes_through_json(tmp_path: Path) -> None:
    config = hugging_face.AtlasConfig(layers="3*atlas+transformer", vocab_size=300)
    assert config.num_hidden_layers == 4
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "atlas"
    assert all(layer["type"] == "AtlasBlockConfig" for layer in stored["layers"])
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.language_model() == config.language_model()
    whole = LanguageModelConfig("", 300, 64, 4, layers="3*atlas+transformer")
    assert config.language_model() == whole
    assert hugging_face.AtlasConfig.of(whole).language_model() == whole
    # Files do not lean on the defaults of today.
    hugging_face.AtlasConfig().save_pretrained(tmp_path / "default")
    stored = json.loads((tmp_path / "default" / "config.json").read_text())
    names = {"layers", "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}
    assert names <= stored.keys()
    deeper = hugging_face.AtlasConfig(layers="atlas", num_hidden_layers=3)
    assert len(deeper.layers) == 1
    assert len(deeper.language_model().layers) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "atlsa"}, "layers: .*did you mean atlas"),
        ({"hidden_size": 63}, "heads: expected a divisor"),
        ({"layers": [{"type": "Nothing"}]}, "config type"),
        ({"layers": "atlas+lstm", "num_hidden_layers": 1}, "depth: expected at least 2"),
    ],
)
def test_configs_that_are_none_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hugging_face.AtlasConfig(**options)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_heads_tied_or_not_are_saved_in_shards_and_in_half_precision(
    tied: bool, tmp_path: Path
) -> None:
    model, tokens = made("atlas-mag", tie_embeddings=tied), torch.randint(0, 256, (1, 7))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half(tokens).logits - model(tokens).logits).abs().max() < 0.1
    true = model.to(torch.bfloat16)
    assert torch.equal(half(tokens).logits, true(tokens).logits)


@some
def test_the_loss_is_that_of_every_next_token(name: str) -> None:
    model = made(name)
    tokens, mask = padded("right")
    labels = tokens.masked_fill(mask == 0, -100)
    out = model(tokens, attention_mask=mask, labels=labels)
    rows = [t[m.bool()] for t, m in zip(tokens, mask, strict=True)]
    logits = torch.cat([model(r[None]).logits[0, :-1] for r in rows])
    true = F.cross_entropy(logits, torch.cat([r[1:] for r in rows]))
    close(out.loss, true)
    twice = model(tokens, attention_mask=mask, labels=labels, num_items_in_batch=28)
    close(twice.loss, true / 2)


@some
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_stays_out_of_rows_and_of_their_memory(name: str, side: str) -> None:
    model = made(name).double()  # Newton-Schulz magnifies what float32 rounds
    tokens, mask = padded(side)
    more = torch.randint(1, 256, (3, 2))
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    for options in ({}, {"use_cache": False}, {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
        out = model(tokens, attention_mask=mask, output_hidden_states=True, **options)
        for row, real in enumerate(mask.bool()):
            alone = model(tokens[row][real][None], output_hidden_states=True)
            close(out.logits[row][real], alone.logits[0])
            for ours, true in zip(out.hidden_states, alone.hidden_states, strict=True):
                close(ours[row][real], true[0])
    after = model(
        more, attention_mask=longer, past_key_values=model(tokens, mask).past_key_values
    ).logits
    for row, real in enumerate(mask.bool()):
        close(after[row], model(torch.cat([tokens[row][real], more[row]])[None]).logits[0, -2:])
    with pytest.raises(ValueError, match=r"attention_mask: expected .*that in the cache too"):
        model(more, past_key_values=model(tokens, mask).past_key_values)


@some
def test_padding_gets_no_gradient(name: str) -> None:
    model = made(name)
    tokens, mask = padded("left")
    x = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=x, attention_mask=mask).logits[mask.bool()].sum().backward()
    assert not x.grad[mask == 0].any()
    assert x.grad[mask == 1].any()


@some
@torch.no_grad()
def test_packed_position_ids_run_documents_apart(name: str) -> None:
    model, tokens = made(name), torch.randint(0, 256, (2, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 0, 1, 2]])
    out = model(tokens, position_ids=positions, use_cache=False).logits
    close(out[0, 4:], model(tokens[:1, 4:]).logits[0])
    close(out[1, 2:5], model(tokens[1:, 2:5]).logits[0])
    with pytest.raises(ValueError, match=r"position_ids: .*need use_cache=False"):
        model(tokens, position_ids=positions, use_cache=True)


@some
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    model, tokens = made(name).train(), torch.randint(0, 256, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    true = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    out = model(tokens, labels=tokens, use_cache=True)
    assert out.past_key_values is None
    out.loss.backward()
    for n, p in model.named_parameters():
        assert (p.grad - true[n]).abs().max() <= 1e-6 * (1 + true[n].abs().max()), n
    cache = model.eval()(tokens).past_key_values
    with pytest.raises(ValueError, match="past_key_values: expected none with gradient"):
        model.train()(tokens, past_key_values=cache)


def with_experts(balance: float) -> Any:
    """A model whose experts are far from being used alike."""
    torch.manual_seed(0)
    experts = AtlasBlockConfig(
        SlidingWindowAttentionConfig(8), 16, MixtureOfExpertsConfig(4, 2, balance)
    )
    config = LanguageModelConfig("experts", 256, 32, 2, 2, layers=(experts,))
    model = hugging_face.AtlasForCausalLM(hugging_face.AtlasConfig.of(config)).train()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.block.mlp.router.weight)
    return model


def test_the_balance_loss_of_experts_is_part_of_the_loss() -> None:
    model, tokens = with_experts(0.5), torch.randint(0, 256, (2, 9))
    model(tokens)  # a loss that nobody asks for is not that of the next call
    loss = model(tokens, labels=tokens).loss
    plain = with_experts(0.0)(tokens, labels=tokens).loss
    model(tokens)
    balance, mean = balance_loss(model)
    assert mean > 1.05
    torch.testing.assert_close(loss, plain + balance)
    # Of one micro-batch among others: its share of their tokens, so that all make up one.
    third = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(48)).loss
    torch.testing.assert_close(third, loss / 3)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens, labels=tokens).loss, plain)


def test_checkpointing_that_loses_the_balance_loss_is_refused() -> None:
    model, tokens = with_experts(0.5), torch.randint(0, 256, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    true = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(tokens, labels=tokens).loss.backward()
    for p, grad in zip(model.parameters(), true, strict=True):
        torch.testing.assert_close(p.grad, grad)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="balance: expected use_reentrant=False"):
        model(tokens, labels=tokens)
    model.zero_grad()
    unweighed = with_experts(0.0)
    unweighed.activation_checkpointing_enable({"use_reentrant": True})
    unweighed(tokens, labels=tokens).loss.backward()


def test_a_model_in_training_keeps_no_cache_unless_asked() -> None:
    model, tokens = made("atlas").train(), torch.randint(0, 256, (1, 5))
    assert model(tokens).past_key_values is None
    assert model(tokens, use_cache=True).past_key_values.get_seq_length() == 5
    assert isinstance(model(tokens, return_dict=False), tuple)


@torch.no_grad()
def test_more_tokens_can_be_added() -> None:
    model, tokens = made("atlas-mag"), torch.randint(0, 256, (1, 7))
    true = model(tokens).logits
    model.resize_token_embeddings(260)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model(tokens).logits[..., :256], true)
    assert convert.to_language_model(model).config.vocab_size == 260


def test_one_of_tokens_and_embeddings_is_given() -> None:
    with pytest.raises(ValueError, match="input_ids: expected them or inputs_embeds"):
        made("atlas")()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_compiled_model_takes_batches_without_padding() -> None:
    torch._dynamo.reset()
    model = made("transformer")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens, mask = padded("left")
    whole = torch.ones_like(mask)
    close(compiled(tokens, attention_mask=whole, use_cache=False).logits, model(tokens).logits)
    with pytest.raises(RuntimeError, match="takes neither padding nor packed documents"):
        compiled(tokens, attention_mask=mask, use_cache=False)


@pytest.mark.slow
@among((), ["atlas-mac", "atlas-hybrid"])
@torch.no_grad()
def test_layers_may_lie_on_the_disk(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, tokens = made(name), torch.randint(0, 256, (2, 40))
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    for i in range(len(model.model.layers)):
        places[f"model.layers.{i}"] = "disk" if i else "cpu"
    kind = transformers.AutoModelForCausalLM
    for where in ("auto", places):
        loaded = kind.from_pretrained(
            tmp_path / "model", device_map=where, offload_folder=tmp_path / "disk"
        )
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
