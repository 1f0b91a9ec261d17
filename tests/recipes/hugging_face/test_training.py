"""Models of ours under other libraries' training: Trainer, PEFT, accelerate, and loops by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from atlas_blocks import AtlasMemory
from atlas_blocks.recipes import build
from atlas_blocks.recipes.surgery import load_converted, replace_layers, train_only_new

transformers = pytest.importorskip("transformers")
hugging_face = pytest.importorskip("atlas_blocks.recipes.hugging_face")
convert = pytest.importorskip("atlas_blocks.recipes.hugging_face.convert")

# What these libraries say of themselves and of machines without a GPU.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
FRESH = """
import sys, torch
import atlas_blocks.recipes.hugging_face
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
save_file({"logits": model(torch.arange(40)[None]).logits.detach().clone()}, sys.argv[2])
"""


def made(name: str = "atlas-mag") -> Any:
    torch.manual_seed(0)
    return hugging_face.AtlasForCausalLM(hugging_face.AtlasConfig.from_recipe(f"{name}-tiny"))


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    """Sequences that count on, some of them padded at the left."""
    found = []
    for i in range(count):
        tokens = (torch.arange(24) + 3 * i) % 97
        mask = torch.ones_like(tokens)
        mask[: i % 4] = 0
        labels = tokens.masked_fill(mask == 0, -100)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def trainer(model: Any, folder: Path, steps: int = 10, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=rows())


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.fixture
def _own_accelerator() -> Iterator[None]:
    """accelerate keeps what the first Accelerator of a process was told."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_accelerator")
@pytest.mark.parametrize("name", ["atlas-mag", "atlas-hybrid"])
def test_trainer_checkpoints_in_bfloat16_and_a_fresh_process_loads(
    name: str, tmp_path: Path
) -> None:
    model = made(name)
    run = trainer(model, tmp_path, bf16=True)
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    found = run.evaluate(rows(8))
    assert found["eval_loss"] < losses(run)[0]
    run.save_model(str(tmp_path / "saved"))
    out = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", FRESH, str(tmp_path / "saved"), str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    # Without the autocast that accelerate puts around it.
    plain = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    assert torch.equal(load_file(out)["logits"], plain(torch.arange(40)[None]).logits)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_accelerator")
def test_lora_trains_is_saved_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = made(), torch.arange(30)[None]
    start = {n: p.clone() for n, p in model.named_parameters()}
    options = peft.LoraConfig(r=4, target_modules=["qkv", "out"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, options)
    run = trainer(wrapped, tmp_path, 15)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    wrapped.eval()
    true = wrapped(tokens).logits
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "adapter").eval()
    assert torch.equal(again(tokens).logits, true)
    for name, p in wrapped.get_base_model().named_parameters():
        plain = name.replace(".base_layer", "")
        if plain in start:
            assert torch.equal(p, start[plain]), name
    merged = wrapped.merge_and_unload()
    assert (merged(tokens).logits - true).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(tokens).logits, merged(tokens).logits)
    assert torch.equal(convert.to_language_model(loaded)(tokens).logits, loaded(tokens).logits)


def test_every_linear_can_have_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model, tokens = made("atlas-mac").eval(), torch.arange(30)[None]
    true = model(tokens).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).eval()
    assert torch.equal(wrapped(tokens).logits, true)
    adapted = {n.rpartition(".")[2] for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert {"qkv", "out", "gate", "up", "down"} <= adapted
    assert "lm_head" not in adapted


@pytest.mark.slow
@pytest.mark.usefixtures("_own_accelerator")
def test_trainer_trains_what_surgery_has_added(tmp_path: Path) -> None:
    from foreign import language_model
    from helpers import small_memory

    model = language_model("llama", vocab_size=97)
    replace_layers(model, 1, block=small_memory(update="gd"), init="parallel")
    names = train_only_new(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    run = trainer(model, tmp_path)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= set(names)
    run.save_model(str(tmp_path / "saved"))
    tokens = torch.arange(30)[None]
    loaded = load_converted(tmp_path / "saved")
    assert torch.allclose(loaded(tokens).logits, model.eval()(tokens).logits, atol=1e-5)


class Quantised(nn.Module):
    """As libraries that quantise replace a Linear: integers and a scale, no `weight` of floats."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("integers", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.integers * self.scale, self.bias)


@torch.no_grad()
def test_linears_may_be_replaced_by_quantised_ones() -> None:
    model, tokens = made("atlas-mac").eval(), torch.arange(30)[None]
    true = model(tokens).logits
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        if name != "lm_head":
            model.set_submodule(name, Quantised(linear))
    assert (model(tokens).logits - true).abs().max() < 0.1 * true.abs().max()
    assert model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (
        1,
        33,
    )


@pytest.mark.usefixtures("_own_accelerator")
def test_accelerate_prepares_a_model_and_a_loop(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    loader = torch.utils.data.DataLoader(rows(16), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for _ in range(3):
        for batch in loader:
            loss = model(**batch).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    # A state goes through its pytrees: what a memory holds stays float32.
    out = accelerator.unwrap_model(model)(torch.arange(8)[None], use_cache=True)
    states = accelerate.utils.send_to_device([p.state for p in out.past_key_values.layers], "cpu")
    assert all(state.tensors() for state in states)


@pytest.mark.slow
def test_a_loop_by_hand_as_nano_gpt_has_it() -> None:
    """Blocks in a Transformer of somebody's, `x + mixer(norm(x))`, with a plain training loop."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mixer = nn.LayerNorm(32), AtlasMemory(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mixer(self.norm(x))[0]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(97, 32), Layer(), Layer(), nn.Linear(32, 97))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = torch.stack([row["input_ids"] for row in rows(8)])
    found = []
    for _ in range(12):
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]


def test_an_average_of_weights_is_a_model() -> None:
    model, tokens = build("atlas-mag-tiny"), torch.arange(20)[None]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    average.update_parameters(model)
    middle = copy.deepcopy(model)
    with torch.no_grad():
        for p in middle.parameters():
            p.sub_(0.05)
    found, true = average(tokens).logits, middle(tokens).logits
    torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3)


def test_gradients_of_every_example_by_torch_func() -> None:
    model = build("omeganet-tiny", depth=1).double()
    tokens = torch.randint(0, 256, (3, 9))
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (row[None, :-1],)).logits[0]
        return nn.functional.cross_entropy(logits, row[1:])

    each = vmap(grad(loss), (None, 0))(parameters, tokens)
    for i, row in enumerate(tokens):
        alone = grad(loss)(parameters, row)
        for name, g in alone.items():
            torch.testing.assert_close(each[name][i], g)


DDP = """
import sys, torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from atlas_blocks.recipes.hugging_face import AtlasConfig, AtlasForCausalLM

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
store = f"file://{folder}/store"
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
torch.manual_seed(0)
model = DistributedDataParallel(AtlasForCausalLM(AtlasConfig.from_recipe("atlas-mag-tiny")))
tokens = (torch.arange(24) + 5 * torch.arange(4)[:, None]) % 97
part = tokens[2 * rank : 2 * rank + 2]
model(part, labels=part).loss.backward()
grads = {n: p.grad.clone() for n, p in model.module.named_parameters()}
save_file(grads, f"{folder}/{rank}.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_of_ddp_are_one_batch(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", DDP, str(rank), str(tmp_path)] for rank in range(2)]
    started = [subprocess.Popen(command, cwd=tmp_path) for command in commands]
    assert [process.wait(120) for process in started] == [0, 0]
    model = made()
    tokens = (torch.arange(24) + 5 * torch.arange(4)[:, None]) % 97
    model(tokens, labels=tokens).loss.backward()
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, p in model.named_parameters():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], p.grad, rtol=1e-3, atol=1e-5)
