"""Tiny recipes as language models: training, streaming, packing, generation."""

import pytest
import torch

from atlas_blocks import State
from atlas_blocks.recipes import build, generate, names, registry
from atlas_blocks.recipes.losses import next_byte_loss

TINY = [name for name in names() if name.endswith("-tiny")]


def tiny(name: str):
    torch.manual_seed(0)
    return build(name)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TINY)
def test_a_step_gives_every_parameter_a_finite_gradient(name):
    model = tiny(name)
    next_byte_loss(model, tokens(2, 71)).backward()
    for part, p in model.named_parameters():
        assert p.grad is not None, part
        assert torch.isfinite(p.grad).all(), part


@pytest.mark.parametrize("name", TINY)
def test_greedy_streaming_equals_reading_everything_again(name):
    model, prompt = tiny(name).double(), tokens(2, 61)
    streamed = generate(model, prompt, max_new_tokens=8, temperature=0)
    text = prompt
    with torch.no_grad():
        for _ in range(8):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(streamed, text)


@pytest.mark.parametrize("name", TINY)
def test_logits_of_any_split_equal_the_whole(name):
    # float64: Newton-Schulz magnifies float32 rounding, and this is about the function.
    model, text = tiny(name).double(), tokens(2, 90)
    with torch.no_grad():
        whole = model(text)
        state, parts = None, []
        for piece in text.split([1, 63, 0, 5, 21], 1):
            logits, state = model(piece, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, atol=1e-7, rtol=1e-7)
    restored = State.from_dict(whole.state.to_dict())
    assert restored.nbytes == whole.state.nbytes


@pytest.mark.parametrize("name", ["atlas-mag-tiny", "transformer-tiny", "atlas-hybrid-tiny"])
def test_packed_documents_equal_documents_alone(name):
    model, text = tiny(name).double(), tokens(1, 40)
    with torch.no_grad():
        packed = model(text, cu_seqlens=torch.tensor([0, 15, 40])).logits
        alone = torch.cat([model(part).logits for part in text.split([15, 25], 1)], 1)
    torch.testing.assert_close(packed, alone, atol=1e-7, rtol=1e-7)


def test_bad_model_inputs_are_named():
    model = tiny("omeganet-tiny")
    with pytest.raises(ValueError, match="tokens"):
        model(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="state"):
        model(tokens(1, 3), state="no")
    other = registry.build("omeganet-tiny", depth=1)
    with pytest.raises(ValueError, match="state"):
        model(tokens(1, 3), other(tokens(1, 3)).state)


def test_untied_head_and_odd_vocabulary():
    model = build("transformer-tiny", tie_embeddings=False, vocab_size=11)
    assert model(tokens(2, 4) % 11).logits.shape == (2, 4, 11)
    assert "head.weight" in model.state_dict()


@pytest.mark.parametrize(
    "recipe", ["omeganet-tiny", "titans-tiny", "atlas-mac-tiny", "transformer-tiny"]
)
def test_a_whole_model_runs_on_meta(recipe: str) -> None:
    """Shapes alone, without memory: what tools that plan for large models do."""
    with torch.device("meta"):
        logits, state = build(recipe)(torch.zeros(2, 70, dtype=torch.int64))
    assert logits.is_meta
    assert logits.shape == (2, 70, 256)
    assert state.nbytes > 0
