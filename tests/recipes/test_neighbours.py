"""The examples with other libraries run, and give what there is without those libraries."""

from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atlas_blocks import AtlasMemory
from atlas_blocks.recipes import build

EXAMPLES = Path(__file__).parents[2] / "examples"
# What these libraries say of themselves and of machines without a GPU.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def example(name: str) -> Any:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def rows(count: int, length: int) -> Tensor:
    """Sequences that count on."""
    return (torch.arange(length) + 3 * torch.arange(count)[:, None]) % 97


def test_the_trainer_of_lightning_trains_as_a_loop_does(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    shown = example("with_lightning")
    torch.manual_seed(0)
    module = shown.LanguageModule("atlas-mag-tiny")
    model = copy.deepcopy(module.model)
    loader = torch.utils.data.DataLoader(rows(16, 24), batch_size=4)
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    run = lightning.Trainer(
        accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **dict.fromkeys(silent, False)
    )
    run.fit(module, loader)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for tokens in [*loader, *loader]:
        loss = shown.loss_of(model(tokens).logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert run.callback_metrics["loss"].item() == losses[-1]
    for found, true in zip(module.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, true)


def test_fabric_carries_the_memory_from_piece_to_piece() -> None:
    """Its output is walked: the state is a pytree, and comes back as it was."""
    pytest.importorskip("lightning")
    shown = example("with_lightning")
    texts = list(rows(8, 48).split(4))
    torch.manual_seed(0)
    found = shown.with_fabric("atlas-mag-tiny", texts, accelerator="cpu")
    torch.manual_seed(0)
    model = build("atlas-mag-tiny")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for tokens in texts:
        state = None
        for piece in tokens.split(16, 1):
            logits, state = model(piece, state)
            loss = shown.loss_of(logits, piece)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = state.detach()
            losses.append(loss.item())
    assert found == losses
    torch.manual_seed(0)
    mixed = shown.with_fabric("atlas-mag-tiny", texts, accelerator="cpu", precision="bf16-mixed")
    assert mixed == pytest.approx(losses, rel=0.05)


def test_a_memory_stands_in_the_layers_of_x_transformers() -> None:
    pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    model = example("with_x_transformers").language_model(97, 32, 4, 64)
    assert sum(isinstance(m, AtlasMemory) for m in model.modules()) == 1
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(15):
        loss = model(rows(8, 24))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    start = rows(2, 8)
    found, expected = model.generate(start, 6, temperature=0.0), start
    for _ in range(6):
        token = model.net(expected)[:, -1:].argmax(-1)
        expected = torch.cat([expected, token], 1)
    assert torch.equal(found, expected[:, 8:])


def test_fsdp2_by_hand_trains_as_one_process_does(tmp_path: Path) -> None:
    hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "with_fsdp2.py"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    said = [line.split() for line in done.stdout.splitlines()]
    torch.manual_seed(0)
    model = hugging_face.AtlasForCausalLM(hugging_face.AtlasConfig.from_recipe("atlas-mag-tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    tokens = torch.arange(24) + 5 * torch.arange(4)[:, None]
    for step in range(4):
        loss = model(tokens, labels=tokens).loss
        both = [float(value) for _, at, value in said if int(at) == step]
        assert len(both) == 2
        assert sum(both) / 2 == pytest.approx(loss.item(), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loaded = hugging_face.AtlasForCausalLM.from_pretrained(tmp_path / "model")
    found, true = loaded(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss
    torch.testing.assert_close(found, true, rtol=1e-3, atol=0)


def plain(linear: nn.Module) -> Tensor:
    """The weight that a quantised Linear stands for."""
    weight: Any = linear.weight
    if hasattr(weight, "dequantize") and not hasattr(weight, "quant_state"):
        return weight.dequantize()
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.dequantize_4bit(weight.data, weight.quant_state)


@torch.no_grad()
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_a_model_of_quantised_linears_is_that_of_their_weights(library: str) -> None:
    pytest.importorskip(library)
    hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")
    shown = example("with_quantised_linears")
    torch.manual_seed(0)
    config = hugging_face.AtlasConfig.from_recipe("atlas-mac-tiny")
    model, tokens = hugging_face.AtlasForCausalLM(config).eval(), torch.arange(30)[None]
    expected, names = copy.deepcopy(model), list(shown.linears(model))
    getattr(shown, f"by_{library}")(model)
    assert len(names) > 10
    changed = 0
    for name in names:
        linear, found = expected.get_submodule(name), plain(model.get_submodule(name))
        changed += not torch.equal(linear.weight, found)
        linear.weight.copy_(found)
    assert changed == len(names)
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-3, atol=1e-3)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **options), expected.generate(tokens, **options))
