"""`generate` of transformers over states: every search, padding, and a cache that goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import language_model
from torch import Tensor

from atlas_blocks.recipes.generate import generate
from atlas_blocks.recipes.surgery import replace_attention

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")
convert = pytest.importorskip("atlas_blocks.recipes.hugging_face.convert")

GREEDY: dict[str, Any] = {
    "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("atlas-mac", "transformer")]
every_model = pytest.mark.parametrize("name", ["atlas", "atlas-hybrid", "converted llama", *SLOW])
ours = pytest.mark.parametrize("name", ["atlas-hybrid", *SLOW])


def made(name: str) -> Any:
    if name.startswith("converted"):
        model = language_model(name.split()[1]).double()
        replace_attention(model, gate_rank=4)
        return model
    torch.manual_seed(0)
    config = hugging_face.AtlasConfig.from_recipe(f"{name}-tiny", vocab_size=64)
    return hugging_face.AtlasForCausalLM(config).double().eval()


def prompts() -> list[Tensor]:
    return [torch.randint(1, 64, (n,)) for n in (3, 5, 9, 12, 7)]


def together(rows: list[Tensor], side: str, length: int = 12) -> tuple[Tensor, Tensor]:
    tokens, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


@every_model
def test_unequal_prompts_give_what_each_gives_alone(name: str) -> None:
    model, rows = made(name), prompts()
    true = torch.stack([model.generate(r[None], **GREEDY)[0, len(r) :] for r in rows])
    uncached = [model.generate(r[None], use_cache=False, **GREEDY)[0, len(r) :] for r in rows]
    assert torch.equal(true, torch.stack(uncached))
    # transformers' own models take padding at the left alone.
    for side in ("left",) if name.startswith("converted") else ("left", "right"):
        tokens, mask = together(rows, side)
        for options in ({}, {"prefill_chunk_size": 4}):
            found = model.generate(tokens, attention_mask=mask, **options, **GREEDY)
            assert torch.equal(found[:, 12:], true), (side, options)


@ours
def test_it_is_what_our_own_generate_gives(name: str) -> None:
    model, rows = made(name), prompts()
    tokens, mask = together(rows, "left")
    found = model.generate(tokens, attention_mask=mask, **GREEDY)[:, 12:]
    own = generate(convert.to_language_model(model), rows, max_new_tokens=6, temperature=0)
    assert [own[i, len(r) : len(r) + 6].tolist() for i, r in enumerate(rows)] == found.tolist()


@every_model
@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        pytest.param(
            {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"do_sample": True, "num_beams": 2, "temperature": 0.7}, marks=pytest.mark.slow
        ),
    ],
    ids=["beam", "samples", "beams", "sampled beams"],
)
def test_searches_with_a_cache_are_those_without_one(name: str, search: dict[str, Any]) -> None:
    model, rows = made(name), prompts()
    tokens, mask = together(rows, "left")
    found = []
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        torch.manual_seed(3)
        whole = {"attention_mask": mask, **GREEDY, **search, **options}
        found.append(model.generate(tokens, **whole))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    if "do_sample" not in search:
        each = len(found[0]) // len(rows)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], **GREEDY | search)
            assert torch.equal(found[0][i * each : (i + 1) * each, 12:], alone[:, len(row) :])


@every_model
def test_a_cache_goes_on_and_what_ended_is_left(name: str) -> None:
    model, rows = made(name), prompts()
    tokens, mask = together(rows, "left")
    whole = model.generate(tokens, attention_mask=mask, **GREEDY)
    short = GREEDY | {"max_new_tokens": 3}
    first = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **short)
    longer = torch.cat([mask, torch.ones(5, 3, dtype=torch.long)], 1)
    rest = model.generate(
        first.sequences, attention_mask=longer, past_key_values=first.past_key_values, **short
    )
    assert torch.equal(rest, whole)
    # A row that has come to its end changes nothing for the others.
    ends = GREEDY | {"eos_token_id": int(whole[2, 13])}
    found = model.generate(tokens, attention_mask=mask, **ends)
    for row, true in zip(found[:, 12:], whole[:, 12:], strict=True):
        stop = (true == ends["eos_token_id"]).nonzero().flatten().tolist()
        last = stop[0] + 1 if stop else 6
        assert torch.equal(row[:last], true[:last])
        assert not row[last:].any()


@ours
def test_embeddings_and_nothing_are_continued_too_in_any_mode(name: str) -> None:
    model, rows = made(name), prompts()
    tokens, mask = together(rows, "left")
    true = model.generate(tokens, attention_mask=mask, **GREEDY)[:, 12:]
    x = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=x, attention_mask=mask, **GREEDY), true)
    start = torch.tensor([[5]])
    assert torch.equal(model.generate(bos_token_id=5, **GREEDY), model.generate(start, **GREEDY))
    out = model.generate(
        tokens,
        attention_mask=mask,
        output_hidden_states=True,
        output_logits=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    count = model.config.num_hidden_layers + 1
    assert [len(step) for step in out.hidden_states] == 6 * [count]
    assert out.hidden_states[0][0].shape == (5, 12, 64)
    assert torch.equal(torch.stack(out.logits).argmax(-1).T, true)
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.activation_checkpointing_enable()
        assert torch.equal(model.generate(tokens, attention_mask=mask, **GREEDY)[:, 12:], true)


class Streamed:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_a_streamer_is_told_every_token() -> None:
    model, streamed = made("atlas"), Streamed()
    found = model.generate(prompts()[0][None], streamer=streamed, **GREEDY)
    assert streamed.tokens == [*found[0].tolist(), -1]


@every_model
def test_what_a_memory_cannot_do_is_refused_by_name(name: str) -> None:
    model, row = made(name), prompts()[2][None]
    with pytest.raises(ValueError, match=r"past_key_values: expected a DynamicCache"):
        model.generate(row, cache_implementation="static", disable_compile=True, **GREEDY)
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": copy.deepcopy(model)}):
        with pytest.raises(ValueError, match=r"assisted generation .* stateful models, such as"):
            model.generate(row, **options, **GREEDY)
    if not name.startswith("converted"):
        with pytest.raises(ValueError, match="generate_batch: expected a model of keys and values"):
            model.generate_batch([row[0].tolist()])
    cache = model(row, use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match="crop: expected 0"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="past_key_values: expected a cache of 2 rows, got 1"):
        model(torch.cat([row, row]), past_key_values=cache)
    assert not cache.is_croppable
    assert not cache.is_compileable


@ours
@torch.no_grad()
def test_rows_of_a_cache_are_repeated_chosen_and_ordered(name: str) -> None:
    model, rows = made(name), prompts()
    tokens, mask = together(rows, "left")
    step = torch.randint(1, 64, (5, 1))
    after = torch.cat([mask, torch.ones_like(step)], 1)
    true = model(step, after, past_key_values=model(tokens, mask).past_key_values).logits
    for change, order in (
        (lambda c: c.reorder_cache(torch.tensor([4, 0, 0, 2, 1])), [4, 0, 0, 2, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    ):
        cache = model(tokens, mask).past_key_values
        change(cache)
        found = model(step[order], after[order], past_key_values=cache).logits
        torch.testing.assert_close(found, true[order])
    cache.reset()
    found = model(tokens, mask, past_key_values=cache).logits
    torch.testing.assert_close(found, model(tokens, mask).logits)


@every_model
@torch.no_grad()
def test_a_cache_may_be_offloaded_and_comes_back(name: str) -> None:
    model, row = made(name), prompts()[3][None]
    cache = model(row[:, :5], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    found = model(row[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(row).logits[:, 5:])
    found = model.generate(row, cache_implementation="offloaded", **GREEDY)
    assert torch.equal(found, model.generate(row, **GREEDY))


def test_pipelines_take_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hugging_face.AtlasConfig.from_recipe("atlas-tiny")
    model = hugging_face.AtlasForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    convert.tokenizer_of(None).save_pretrained(tmp_path)
    writer = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = writer(["def f", "é"], return_full_text=False, **options)
    for text, out in zip(("def f", "é"), found, strict=True):
        tokens = torch.tensor([list(text.encode())])
        new = model.generate(tokens, **options)[0, tokens.shape[1] :]
        assert out[0]["generated_text"] == bytes(new.tolist()).decode(errors="replace")
