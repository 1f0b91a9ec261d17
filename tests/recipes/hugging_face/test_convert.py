"""Checkpoints and folders of transformers, one from the other by a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atlas_blocks.recipes import checkpoint, registry
from atlas_blocks.recipes.data import train_tokenizer
from atlas_blocks.recipes.model import LanguageModel

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")
convert = pytest.importorskip("atlas_blocks.recipes.hugging_face.convert")

TEXTS = ["def f(x):\n    return 1", "naïve — 日本語 \x00 Ā", ""]


def model(**changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    return registry.build("atlas-mag-tiny", **changes).to(torch.bfloat16).eval()


def test_a_command_goes_there_and_back(run: Any, tmp_path: Path) -> None:
    saved, folder, back = (tmp_path / name for name in ("a.safetensors", "there", "b.safetensors"))
    true = model()
    checkpoint.save(saved, true)
    code, out, _ = run("convert", saved, "--out", folder)
    assert code == 0
    assert "there" in out
    there = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert there.dtype == torch.bfloat16
    tokens = torch.randint(0, 256, (1, 9))
    assert torch.equal(there(tokens).logits, true(tokens).logits)
    # Tied: the file holds the weights once.
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    coder = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert coder(text)["input_ids"] == list(text.encode())
        assert coder.decode(list(text.encode())) == text
    assert run("convert", folder, "--out", back)[0] == 0
    assert checkpoint.tokenizer(back) is None
    found = checkpoint.load(back)
    assert found.config == true.config
    for name, t in found.state_dict().items():
        assert torch.equal(t, true.state_dict()[name]), name


def test_a_tokenizer_goes_with_the_model(run: Any, tmp_path: Path) -> None:
    own = train_tokenizer([["def f(x): return x " * 20, "naïve 日本語"]], 300)
    saved, folder, back = (tmp_path / name for name in ("a.safetensors", "there", "b.safetensors"))
    checkpoint.save(saved, model(vocab_size=own.vocab_size), tokenizer=own.json)
    assert run("convert", saved, "--out", folder)[0] == 0
    coder = transformers.AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(TEXTS, own.encode(TEXTS), strict=True):
        assert coder(text)["input_ids"] == ids.tolist()
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.eos_token_id == coder.eos_token_id == own.end
    assert run("convert", folder, "--out", back)[0] == 0
    again = checkpoint.tokenizer(back)
    assert again is not None
    assert type(own)(again).encode(TEXTS)[0].tolist() == own.encode(TEXTS)[0].tolist()


def test_what_does_not_fit_is_told_in_one_line(run: Any, tmp_path: Path) -> None:
    saved, folder = tmp_path / "a.safetensors", tmp_path / "there"
    checkpoint.save(saved, model())
    (folder / "x").mkdir(parents=True)
    code, _, error = run("convert", saved, "--out", folder)
    assert (code, error) == (
        2,
        f"atlas-blocks: out: expected a new or empty folder, got {folder}\n",
    )
    code, _, error = run("convert", tmp_path / "no", "--out", tmp_path / "other")
    assert code == 2
    assert "cannot be read" in error
    from foreign import language_model

    llama = tmp_path / "llama"
    language_model("llama").save_pretrained(llama)
    code, _, error = run("convert", llama, "--out", tmp_path / "b.safetensors")
    assert code == 2
    assert "expected an AtlasForCausalLM" in error
    there = tmp_path / "good"
    convert.from_language_model(model()).save_pretrained(there)
    code, _, error = run("convert", there, "--out", tmp_path / "b.txt")
    assert (code, "ends in .safetensors" in error) == (2, True)


def test_sketch_tables_of_older_checkpoints_are_refused_by_name() -> None:
    old = registry.build("atlas-tiny")
    old.blocks[0].mixer.use_own_tables(True)
    with pytest.raises(ValueError, match=r"blocks.0.mixer.buckets: expected the sketch of its con"):
        convert.from_language_model(old)


def test_a_model_with_adapters_is_merged_first() -> None:
    there = convert.from_language_model(registry.build("atlas-tiny"))
    there.model.layers[0].block.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model: .*blocks.0.extra.weight"):
        convert.to_language_model(there)
    with pytest.raises(ValueError, match="model: expected an AtlasForCausalLM"):
        convert.to_language_model(registry.build("atlas-tiny"))
