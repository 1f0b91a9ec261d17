"""Tiny recipes as language models: training, streaming, packing, generation."""

import pytest
import torch

from atlas_blocks import State
from atlas_blocks.recipes import build, generate, names, prefill, registry, stream
from atlas_blocks.recipes.generate import pick
from atlas_blocks.recipes.training import next_byte_loss

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


def test_generation_depends_on_the_seed_alone():
    model, prompt = tiny("transformer-tiny"), tokens(3, 5)
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    first = generate(model, prompt, seed=1, **options)
    assert first.shape == (3, 11)
    assert torch.equal(first, generate(model, prompt, seed=1, **options))
    assert not torch.equal(first, generate(model, prompt, seed=2, **options))


def test_generation_reads_the_prompt_once():
    model, lengths = tiny("transformer-tiny"), []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    list(stream(model, tokens(1, 9), max_new_tokens=4))
    assert lengths == [9, 1, 1, 1]


def test_a_long_prompt_is_read_in_pieces():
    model, lengths = tiny("linear-attention-tiny"), []
    hook = lambda _, arguments: lengths.append(arguments[0].shape[1])  # noqa: E731
    model.register_forward_pre_hook(hook)
    list(stream(model, tokens(1, 5000), max_new_tokens=2))
    assert lengths == [2048, 2048, 904, 1]


@pytest.mark.parametrize("name", ["atlas-mag-tiny", "atlas-mac-tiny", "transformer-tiny"])
def test_pieces_and_a_state_given_change_nothing(name):
    model, text = tiny(name).double(), tokens(2, 75)
    with torch.no_grad():
        whole = model(text)
    logits, _ = prefill(model, text, piece=7)
    torch.testing.assert_close(logits, whole.logits[:, -1], atol=1e-6, rtol=1e-6)
    options = {"max_new_tokens": 6, "temperature": 0.8, "seed": 3}
    true = generate(model, text, **options)
    _, half = prefill(model, text[:, :40])
    before = [t.clone() for t in half.tensors()]
    for _ in range(2):
        rest = generate(model, text[:, 40:], state=half, piece=9, **options)
        assert torch.equal(rest, true[:, 40:])
    assert all(map(torch.equal, half.tensors(), before))
    # And on from where a continuation ended: all but its last token have been read.
    following = generate(model, rest[:, -1:], state=prefill(model, true[:, :-1])[1], **options)
    assert torch.equal(following, generate(model, true, **options)[:, -7:])


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(500, 4)
    seen = set(pick(logits, 1.0, 0.7, torch.Generator().manual_seed(0)).tolist())
    assert seen == {0, 1}
    assert set(pick(logits, 1.0, 0.0, torch.Generator().manual_seed(0)).tolist()) == {0}


@pytest.mark.parametrize(
    ("prompt", "options", "word"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "prompt"),
        (torch.zeros(4, dtype=torch.int64), {}, "prompt"),
        (torch.full((1, 2), 256), {}, "prompt"),
        (torch.zeros(1, 1, dtype=torch.int64), {"piece": 0}, "piece"),
        (torch.zeros(1, 1, dtype=torch.int64), {"state": "no"}, "state"),
        (torch.zeros(1, 1, dtype=torch.int64), {"temperature": -1.0}, "temperature"),
        (torch.zeros(1, 1, dtype=torch.int64), {"top_p": 1.5}, "top_p"),
        (torch.zeros(1, 1, dtype=torch.int64), {"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_bad_generation_arguments_are_named(prompt, options, word):
    options = {"max_new_tokens": 1, **options}
    with pytest.raises(ValueError, match=word):
        generate(tiny("transformer-tiny"), prompt, **options)
    # At once, not at the first token.
    with pytest.raises(ValueError, match=word):
        stream(tiny("transformer-tiny"), prompt, **options)


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
