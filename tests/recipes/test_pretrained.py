"""Blocks inside models of transformers, which are built without weights and filled from a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import language_model
from helpers import BLOCKS, HEADS, draw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atlas_blocks.recipes.surgery import load_converted, replace_attention

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")

some_blocks = pytest.mark.parametrize(
    "name",
    ["memory-mlp-gd-sketch", "memory-fixed-gates", "attention-neutral", "as-context", "block-lstm"],
)


def with_block(name: str, where: str = "") -> Any:
    """A class of models like Llama that have a block beside their layers, or inside of the model
    (a PreTrainedModel too) that it is the head of."""

    class WithBlock(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.get_submodule(where).block = BLOCKS[name](config.hidden_size, HEADS)
            hugging_face.start_blocks(self)
            self.post_init()

    return WithBlock


def tensors(block: nn.Module) -> dict[str, Tensor]:
    return dict(block.named_parameters()) | dict(block.named_buffers())


def assert_fresh(found: nn.Module, name: str) -> None:
    """What a block starts with that does not depend on draws, and as large as it where it does."""
    one, two = (tensors(BLOCKS[name](32, HEADS)) for _ in range(2))
    for key, t in tensors(found).items():
        assert t.isfinite().all(), key
        assert torch.equal(one[key], two[key]) == torch.equal(one[key], t), key
        if not torch.equal(one[key], t):
            assert 0.5 < t.std() / one[key].std() < 2, key


@some_blocks
@pytest.mark.parametrize("where", ["", "model"])
def test_a_block_that_a_checkpoint_does_not_have_starts_as_it_does_alone(
    name: str, where: str, tmp_path: Path
) -> None:
    plain, kind = language_model("llama"), with_block(name, where)
    plain.save_pretrained(tmp_path)
    model = copy.deepcopy(kind.from_pretrained(tmp_path))
    for made in (model, kind(plain.config)):
        assert_fresh(made.get_submodule(where).block, name)
    tokens = torch.arange(9)[None]
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


@some_blocks
def test_a_block_that_a_checkpoint_has_comes_back(name: str, tmp_path: Path) -> None:
    model = with_block(name)(language_model("llama").config)
    with torch.no_grad():
        for p in model.block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    loaded = with_block(name).from_pretrained(tmp_path)
    x = draw(1, 9, 32, dtype=torch.float32)
    assert torch.equal(loaded.block(x)[0], model.block(x)[0])


def test_of_a_module_that_a_checkpoint_has_in_part_the_rest_is_filled(tmp_path: Path) -> None:
    kind = with_block("memory-mlp-gd-sketch")
    model, fresh = (kind(language_model("llama").config) for _ in range(2))
    with torch.no_grad():
        for p in model.block.parameters():
            p.fill_(0.25)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    lost = {"block.alpha.1.weight", "block.eta.1.bias", "block.memory.1"}
    save_file({n: t for n, t in load_file(file).items() if n not in lost}, file, {"format": "pt"})
    for n, t in kind.from_pretrained(tmp_path).named_parameters():
        if n in lost and n != "block.memory.1":
            assert torch.equal(t, fresh.get_parameter(n)), n
        elif n.startswith("block."):
            assert (t == 0.25).all() == (n not in lost), n


def test_gates_that_a_converted_checkpoint_lacks_are_neutral(tmp_path: Path) -> None:
    model = language_model("llama")
    tokens = torch.arange(1, 9)[None]
    true = model(tokens).logits
    replace_attention(model, gate_rank=4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if ".gates." not in n}
    save_file(kept, file, {"format": "pt"})
    found = load_converted(tmp_path)(tokens).logits
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
