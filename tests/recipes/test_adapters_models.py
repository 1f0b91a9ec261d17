"""Models of Hugging Face transformers go on as before when blocks take their attention's place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign import LIKE_LLAMA, language_model
from helpers import small_memory
from torch import Tensor, nn

from atlas_blocks import (
    AtlasBlock,
    DeepTransformerConfig,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsGateMixerConfig,
    MemoryAsLayer,
    MemoryCachingConfig,
    SlidingWindowAttentionConfig,
    SwiGLU,
    TNTConfig,
)
from atlas_blocks.blocks.lstm import LSTMConfig
from atlas_blocks.recipes.surgery import load_converted, replace_attention

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")

every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2"])
GREEDY: dict[str, Any] = {
    "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip


def both(kind: str, **changes: Any) -> tuple[Any, Any]:
    """A model and its conversion."""
    model = language_model(kind, **changes)
    converted = copy.deepcopy(model)
    names = replace_attention(converted, gate_rank=4)
    assert len(names) == model.config.num_hidden_layers
    return model, converted


def draw_tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(1, 64, (rows, length))


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", *LIKE_LLAMA])
@torch.no_grad()
def test_a_model_keeps_its_logits_and_what_it_generates(kind: str) -> None:
    model, converted = both(kind)
    tokens = draw_tokens(2, 40)
    close(converted(tokens).logits, model(tokens).logits)
    for search in (
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
    ):
        texts = [m.generate(tokens[:, :9], **GREEDY, **search) for m in (model, converted)]
        assert torch.equal(*texts), search


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Tokens [3, 9] and their mask: rows of 9, 6 and 2 real tokens."""
    tokens, mask = draw_tokens(), torch.ones(3, 9, dtype=torch.long)
    for row, count in enumerate((0, 3, 7)):
        mask[row, slice(count) if side == "left" else slice(9 - count, None)] = 0
    return tokens, mask


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_stays_out_of_rows_and_of_their_memory(
    kind: str, side: str, attention: str
) -> None:
    model, converted = both(kind, attn_implementation=attention)
    tokens, mask = padded(side)
    real = mask.bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for options in ({}, {"use_cache": False}, {"position_ids": positions}):
        outputs = [m(tokens, attention_mask=mask, **options) for m in (model, converted)]
        close(outputs[1].logits[real], outputs[0].logits[real])
    # Every row goes on as if it had been alone.
    outputs = converted(tokens, attention_mask=mask, position_ids=positions)
    more = draw_tokens(3, 2)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    after = converted(
        more,
        attention_mask=mask,
        position_ids=mask.cumsum(1)[:, 9:] - 1,
        past_key_values=outputs.past_key_values,
    )
    with pytest.raises(ValueError, match=r"attention_mask: .* \(that in the cache too\)"):
        converted(more, past_key_values=outputs.past_key_values)
    for row in range(3):
        alone = torch.cat([tokens[row][real[row]], more[row]])[None]
        close(after.logits[row], model(alone).logits[0, -2:])


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_padding_may_lie_anywhere_and_come_in_any_pieces(seed: int) -> None:
    torch.manual_seed(seed)
    model, converted = both("llama")
    tokens, real = draw_tokens(4, 12), torch.rand(4, 12) < 0.6
    real[0, :6], real[1, 6:], real[2], real[3] = False, False, True, False
    real[3, int(torch.randint(12, ()))] = True
    positions = (real.cumsum(1) - 1).clamp(min=0)
    cache, outputs, first = None, [], 0
    for length in torch.randint(1, 6, (12,)).cumsum(0).clamp(max=12).unique().tolist():
        piece = slice(first, length)
        out = converted(
            tokens[:, piece],
            attention_mask=real[:, :length].long(),
            position_ids=positions[:, piece],
            past_key_values=cache,
            use_cache=True,
        )
        cache, first = out.past_key_values, length
        outputs.append(out.logits)
    logits = torch.cat(outputs, 1)
    for row in range(4):
        close(logits[row, real[row]], model(tokens[row][real[row]][None]).logits[0])


@every_kind
@torch.no_grad()
def test_generate_takes_unequal_prompts_padded_at_the_left(kind: str) -> None:
    model, converted = both(kind)
    tokens, mask = padded("left")
    options = {"attention_mask": mask, **GREEDY}
    for search in ({"num_beams": 3}, {"prefill_chunk_size": 4}, {}):
        texts = [m.generate(tokens, **options, **search) for m in (model, converted)]
        assert torch.equal(*texts), search
    for row in range(3):
        alone = model.generate(tokens[[row]][:, mask[row].bool()], **GREEDY)
        assert torch.equal(texts[1][row, 9:], alone[0, -6:])


@every_kind
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_position_ids_run_documents_apart(kind: str, attention: str) -> None:
    model, converted = both(kind, attn_implementation=attention)
    tokens = draw_tokens(2, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 0, 1, 2]])
    out = converted(tokens, position_ids=positions, use_cache=False).logits
    close(out, model(tokens, position_ids=positions, use_cache=False).logits)
    close(out[0, 4:], model(tokens[:1, 4:]).logits[0])
    changed = tokens.clone()
    changed[0, 0] += 1
    other = converted(changed, position_ids=positions, use_cache=False).logits
    assert torch.equal(other[0, 4:], out[0, 4:])
    grads = []
    for m in (model, converted):
        m(tokens, position_ids=positions, use_cache=False).logits.square().sum().backward()
        grads.append(m.get_input_embeddings().weight.grad)
    assert (grads[1] - grads[0]).abs().max() < 1e-4 * grads[0].abs().max()
    # With a cache transformers itself lets packed documents see each other.
    with pytest.raises(ValueError, match=r"position_ids: .* packed documents need use_cache=False"):
        converted(tokens, position_ids=positions, use_cache=True)


def test_masks_and_positions_of_other_kinds_are_refused() -> None:
    _, converted = both("llama")
    tokens = draw_tokens(2, 9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    window = causal & ~causal.tril(-3)
    holes = causal.clone()
    holes[8, 2] = False
    for wrong in (torch.ones_like(causal), window, holes):
        with pytest.raises(ValueError, match="attention_mask: expected a causal mask with padding"):
            converted(tokens, attention_mask=wrong.expand(2, 1, 9, 9), use_cache=False)
    with pytest.raises(ValueError, match="attention_mask: expected None or a tensor"):
        converted(tokens, attention_mask=causal.expand(2, 4, 9, 9))
    for use_cache in (True, False):
        for steps in ([0, 1, 2, 3, 5, 6, 7, 8, 9], [0, 2, 4, 6, 8, 10, 12, 14, 16]):
            mask = causal.expand(2, 1, 9, 9)
            positions = torch.tensor([steps])
            options = {"position_ids": positions, "use_cache": use_cache}
            with pytest.raises(ValueError, match="position_ids: expected counting on by 1"):
                converted(tokens, attention_mask=mask, **options)


@torch.no_grad()
def test_only_a_cache_that_grows_and_that_the_model_filled_is_taken() -> None:
    model, converted = both("llama")
    tokens = draw_tokens()
    with pytest.raises(ValueError, match=r"past_key_values: expected a DynamicCache, .* StaticLay"):
        converted.generate(tokens, cache_implementation="static", disable_compile=True, **GREEDY)
    plain = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: expected a cache that this model fill"):
        converted(tokens[:, :1], past_key_values=plain)
    cache = converted(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: expected a cache of 2 rows, got 3 rows"):
        converted(tokens[:2, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop: expected 0 .*, got -2"):
        cache.crop(-2)


@torch.no_grad()
def test_a_cache_can_be_copied_repeated_chosen_from_and_reset() -> None:
    model, converted = both("llama")
    prefix, more = draw_tokens(2, 5), draw_tokens(4, 3)
    cache = converted(prefix).past_key_values
    saved = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 0, 1, 1])
    true = model(torch.cat([prefix[rows], more], 1)).logits[:, 5:]
    close(converted(more, past_key_values=cache).logits, true)
    cache = copy.deepcopy(saved)
    cache.batch_select_indices(torch.tensor([1]))
    close(converted(more[2:3], past_key_values=cache).logits, true[2:3])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(converted(prefix, past_key_values=cache).logits, model(prefix).logits)
    close(converted(more[[0, 2]], past_key_values=saved).logits, true[[0, 2]])


def test_a_cache_carries_gradients_as_that_of_the_model_does() -> None:
    tokens, grads = draw_tokens(), []
    for m in both("llama"):
        cache = m(tokens[:, :6], use_cache=True).past_key_values
        m(tokens[:, 6:], past_key_values=cache).logits.square().sum().backward()
        grads.append(m.get_input_embeddings().weight.grad)
    assert (grads[1] - grads[0]).abs().max() < 1e-4 * grads[0].abs().max()


BLOCKS = {
    "memory": lambda: small_memory().build(32, 4),
    "memory-gd": lambda: small_memory(update="gd").build(32, 4),
    "attention": lambda: SlidingWindowAttentionConfig(window=4, sink_tokens=1).build(32, 4),
    "attention-whole": lambda: SlidingWindowAttentionConfig(window=None).build(32, 4),
    "swdt": lambda: DeepTransformerConfig(window=3, gate_rank=4).build(32, 4),
    "dot": lambda: DeepTransformerConfig(objective="l2", window=3, gate_rank=4).build(32, 4),
    "lstm": lambda: LSTMConfig().build(32, 4),
    "caching": lambda: MemoryCachingConfig(small_memory(update="gd"), segment=5).build(32, 4),
    "gate-mixer": lambda: MemoryAsGateMixerConfig(
        small_memory(), SlidingWindowAttentionConfig(window=4)
    ).build(32, 4),
    "tnt": lambda: TNTConfig(small_memory(), (small_memory(),), span=8).build(32, 4),
}


@every_kind
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_every_block_with_a_state_generates_in_the_place_of_an_attention(
    kind: str, name: str
) -> None:
    model = language_model(kind)
    attentions = [n for n, _ in model.named_modules() if n.endswith(("self_attn", ".attn"))]
    for index, attention in enumerate(attentions):
        block = hugging_face.HuggingFaceAttention(BLOCKS[name](), index)
        model.set_submodule(attention, block)
    model.eval()
    tokens, mask = padded("left")
    for search in ({}, {"num_beams": 3}):
        kept = model.generate(tokens, **GREEDY, **search)
        # Without a cache, every step reads the whole sequence again.
        assert torch.equal(model.generate(tokens, use_cache=False, **GREEDY, **search), kept)
        texts = model.generate(tokens, attention_mask=mask, **GREEDY, **search)
        for row in range(3):
            alone = model.generate(tokens[[row]][:, mask[row].bool()], **GREEDY, **search)
            assert torch.equal(texts[row, 9:], alone[0, -6:])


@pytest.mark.parametrize("kind", [AtlasBlock, MemoryAsContext, MemoryAsGate, MemoryAsLayer])
def test_a_block_with_a_residual_of_its_own_is_no_attention(kind: Any) -> None:
    message = f"layer: .*, without a residual of its own, got {kind.__name__}"
    with pytest.raises(ValueError, match=message):
        hugging_face.HuggingFaceAttention(kind(32, 4), 0)


@pytest.mark.parametrize("layer", [SwiGLU(32), nn.Identity()], ids=["stateless", "no-block"])
def test_what_has_no_state_is_no_attention(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="layer: expected a block with a state"):
        hugging_face.HuggingFaceAttention(layer, 0)


def test_a_model_that_cannot_be_converted_is_left_as_it_was() -> None:
    model = language_model("llama")
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.v_proj.register_forward_hook(lambda mod, args, y: 1.5 * y)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn: v_proj\.weight: expected"):
        replace_attention(model)
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model.config, "atlas_layers")


def stretched(rotary: Any) -> None:
    rotary.inv_freq[-1] *= 1.001


def scaled(rotary: Any) -> None:
    rotary.attention_scaling = 1.1


def steered(rotary: Any) -> None:
    rotary.register_forward_hook(lambda mod, args, y: (y[0], -y[1]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (stretched, r"rotary_emb\.inv_freq: expected the frequencies of rope_theta = 500\.0"),
        (scaled, r"rotary_emb\.attention_scaling: expected 1, got 1\.1"),
        (steered, "rotary_emb: expected a module without hooks"),
    ],
)
def test_rotary_positions_that_were_edited_are_refused(edit: Any, message: str) -> None:
    """A layer takes its positions from the config."""
    model = language_model("llama")
    edit(model.model.rotary_emb)
    with pytest.raises(ValueError, match=message):
        replace_attention(model)
    assert not hasattr(model.config, "atlas_layers")


def test_a_rotary_embedding_of_ones_own_is_refused() -> None:
    model = language_model("llama")

    class Mine(type(model.model.rotary_emb)):
        pass

    model.model.rotary_emb = Mine(model.config)
    with pytest.raises(ValueError, match=r"rotary_emb: expected .*modeling_llama, got Mine"):
        replace_attention(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LIKE_LLAMA)
def test_frequencies_that_a_cast_has_rounded_are_taken(kind: str, dtype: torch.dtype) -> None:
    model = language_model(kind, rope_theta=1e6).to(dtype)
    assert replace_attention(model)


@every_kind
@torch.no_grad()
def test_a_converted_model_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    _, converted = both(kind)
    for p in converted.parameters():  # trained, its gates too
        p.add_(0.05 * torch.randn_like(p))
    converted.save_pretrained(tmp_path)
    loaded = load_converted(tmp_path)
    assert type(loaded) is type(converted)
    tokens = draw_tokens()
    assert torch.equal(loaded(tokens).logits, converted(tokens).logits)
    assert torch.equal(loaded.generate(tokens, **GREEDY), converted.generate(tokens, **GREEDY))
    assert load_converted(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    plain = tmp_path / "plain"
    language_model(kind).save_pretrained(plain)
    with pytest.raises(ValueError, match="path: expected a model saved after replace_layers"):
        load_converted(plain)


@every_kind
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "gates"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, frozen: bool) -> None:
    tokens, found = draw_tokens(2, 9), []
    for checkpointed in (False, True):
        model = language_model(kind)
        if frozen:
            model.requires_grad_(False)
        replace_attention(model, gate_rank=4)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointed:
            model.activation_checkpointing_enable()
            if frozen:
                model.enable_input_require_grads()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all("gates" in name for name in found[0]) == frozen
    assert any("gates" in name for name in found[0])
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-4, atol=1e-7), name


def graphs_of(model: Any, run: Any) -> int:
    """How many graphs Dynamo makes of the model's forward."""
    count = 0

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return module.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend)
    run(model)
    return count


@every_kind
@torch.no_grad()
def test_a_converted_model_compiles_to_one_graph(kind: str) -> None:
    tokens = draw_tokens(2, 9)
    _, converted = both(kind)
    true = converted(tokens).logits
    torch._dynamo.reset()
    whole = torch.compile(converted, backend="eager", fullgraph=True)
    close(whole(tokens, use_cache=False).logits, true)


@pytest.mark.slow(compile_nodes=False)
@torch.no_grad()
def test_compiled_generation_takes_no_more_graphs_than_before() -> None:
    tokens, counts, texts = draw_tokens(2, 9), [], []
    for model in both("llama", num_hidden_layers=1):
        counts.append(graphs_of(model, lambda m: texts.append(m.generate(tokens, **GREEDY))))
    assert counts[1] <= counts[0]
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_compiled_model_refuses_what_it_cannot_look_at() -> None:
    _, converted = both("llama")
    tokens, mask = padded("right")
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="eager")
    real = mask.bool()
    true = converted(tokens, attention_mask=mask).logits[real]
    close(compiled(tokens, attention_mask=mask, use_cache=False).logits[real], true)
    wrong = mask.flip(1)
    with pytest.raises(RuntimeError, match="a compiled model takes neither padding nor packed"):
        compiled(tokens, attention_mask=wrong, use_cache=False)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(RuntimeError, match="a compiled model takes neither padding nor packed"):
        compiled(tokens, position_ids=packed, use_cache=False)


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
