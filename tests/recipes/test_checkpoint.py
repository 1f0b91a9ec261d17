"""Checkpoints: nothing is lost, nothing half-written, and every bad file is named."""

import copy
import dataclasses
import json
import random
import signal

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from atlas_blocks import SlidingWindowAttention, keep_provider
from atlas_blocks.compile_passes.backend import compile as atlas_compile
from atlas_blocks.recipes import build, checkpoint, train
from atlas_blocks.recipes.training import TrainingConfig, TrainingState, make_optimizer

DATA = torch.arange(4096).mul(37).remainder(97).to(torch.uint8)
SETTINGS = TrainingConfig(steps=6, batch=2, length=16)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    model = build("atlas-mag-tiny")
    checkpoint.save(path, model)
    return path, model


@pytest.fixture
def trained(tmp_path):
    """A small model and a run of it after one of six steps, saved."""
    model = build("linear-attention-tiny", depth=1, dim=8, heads=2)
    optimizer = make_optimizer(model, SETTINGS)
    train(model, DATA, SETTINGS.replace(steps=1), optimizer=optimizer)
    path = tmp_path / "run.safetensors"
    checkpoint.save(path, model, checkpoint.Run(SETTINGS, optimizer, 1, "a text"))
    return path, model, optimizer


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def both(path):
    """Everything in a file: (tensors, metadata)."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def unchecked(path, tensors, metadata):
    """Write a file of the first format, which has no checksum: other checks must find what is
    wrong with it."""
    told = {k: v for k, v in metadata.items() if k != "checksum"}
    save_file(tensors, path, told | {"format": checkpoint.FIRST_FORMAT})
    return path


def load_both(path):
    model = checkpoint.load(path)
    return model, checkpoint.load_run(path, model)


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_round_trip(saved):
    path, model = saved
    loaded = checkpoint.load(path)
    assert loaded.config == model.config
    assert same(loaded, model)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # Whoever may read other files here may read it.
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_comes_back_in_its_dtype(tmp_path, dtype):
    model = build("atlas-mac-tiny", depth=1).to(dtype)
    checkpoint.save(tmp_path / "model", model)
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.embedding.weight.dtype == dtype
    assert same(loaded, model)


def test_a_file_without_a_checksum_still_loads(trained, tmp_path):
    path, model, optimizer = trained
    tensors, metadata = both(path)
    # Exactly what the first version wrote.
    told = {k: metadata[k] for k in ("version", "config", "training", "step")}
    old = unchecked(tmp_path / "old", tensors, told)
    loaded, run = load_both(old)
    assert same(loaded, model)
    assert (run.step, run.config, run.data) == (1, SETTINGS, "")
    ours, theirs = (o.state_dict()["state"] for o in (run.optimizer, optimizer))
    assert all(torch.equal(ours[i][slot], theirs[i][slot]) for i in theirs for slot in theirs[i])


def test_resuming_equals_never_stopping(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = build("transformer-tiny")
        return model, make_optimizer(model, SETTINGS)

    whole, optimizer = fresh()
    train(whole, DATA, SETTINGS, optimizer=optimizer)

    def stop(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)

    half, optimizer = fresh()
    result = train(half, DATA, SETTINGS, optimizer=optimizer, on_step=stop)
    assert result.interrupted
    assert result.step == 3
    path = tmp_path / "run.safetensors"
    checkpoint.save(path, half, checkpoint.Run(SETTINGS, optimizer, result.step))

    model, run = load_both(path)
    assert (run.step, run.config) == (3, SETTINGS)
    train(model, DATA, run.config, optimizer=run.optimizer, state=TrainingState(run.step))
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


# --- wrapped, sharded and changed models --------------------------------------------------------


def compiled_parts(model):
    """Its blocks compiled one by one, each in a wrapper."""
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        lambda m: atlas_compile(m, provider="definition"),
        compiled_parts,
        DistributedDataParallel,
        lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
        lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
    ],
)
def test_a_wrapped_model_is_saved_as_the_model_inside(tmp_path, one_rank, wrap):
    torch.manual_seed(3)
    plain = build("linear-attention-tiny", depth=2)
    torch.manual_seed(3)
    wrapped = wrap(build("linear-attention-tiny", depth=2))
    checkpoint.save(tmp_path / "model", wrapped)
    assert same(checkpoint.load(tmp_path / "model"), plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sharded_run_is_gathered_and_goes_on(tmp_path, one_rank, compiled):
    def shard(model):
        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)

    torch.manual_seed(0)
    plain = build("linear-attention-tiny", depth=2)
    optimizer = make_optimizer(plain, SETTINGS)
    train(plain, DATA, SETTINGS.replace(steps=2), optimizer=optimizer)
    torch.manual_seed(0)
    model = shard(build("linear-attention-tiny", depth=2))
    sharded = make_optimizer(model, SETTINGS)
    train(model, DATA, SETTINGS.replace(steps=2), optimizer=sharded)
    subject = torch.compile(model, backend="eager") if compiled else model
    checkpoint.save(tmp_path / "run", subject, checkpoint.Run(SETTINGS, sharded, 2))
    loaded, run = load_both(tmp_path / "run")
    assert same(loaded, plain)
    # It goes on sharded as it does alone.
    train(loaded, DATA, SETTINGS, optimizer=run.optimizer, state=TrainingState(2))
    again = shard(checkpoint.load(tmp_path / "run"))
    run = checkpoint.load_run(tmp_path / "run", again)
    train(again, DATA, SETTINGS, optimizer=run.optimizer, state=TrainingState(2))
    for a, b in zip(again.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-6, atol=1e-7)


class Louder(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_window(model):
    old = model.blocks[0].attention
    config = dataclasses.replace(old.config, window=old.config.window // 2)
    model.blocks[0].attention = SlidingWindowAttention(old.dim, old.heads, config)


def louder(model):
    part = model.blocks[0].mlp
    part.down = Louder(part.down.in_features, part.down.out_features, bias=False)


def normed(model):
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.down)


def other_eps(model):
    model.blocks[0].mlp_norm.eps = 0.1


def own_forward(model):
    part = model.blocks[1].mlp
    part.forward = lambda x: (torch.zeros_like(x), None)


def pruned(model):
    prune.l1_unstructured(model.blocks[0].mlp.down, "weight", 0.5)


def poisoned(model):
    with torch.no_grad():
        model.norm.weight[3] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_window, "blocks.0.attention has another config"),
        (louder, "blocks.0.mlp.down is Louder, not Linear"),
        (other_eps, r"blocks\.0\.mlp_norm has another eps"),
        (own_forward, r"blocks\.1\.mlp has a forward of its own"),
        (pruned, r"blocks\.0\.mlp\.down\.weight missing"),
        (normed, "blocks.0.mlp.down is ParametrizedLinear, not Linear"),
        (lambda m: m.blocks.append(nn.Identity()), "blocks.2 unknown"),
        (lambda m: m.blocks.__delitem__(1), r"blocks\.1 missing"),
        (lambda m: m.blocks[0].to(torch.bfloat16), r"is torch.bfloat16, expected torch.float32"),
        (poisoned, "expected finite numbers .* some in model.norm.weight"),
    ],
)
def test_what_load_would_refuse_is_not_written(tmp_path, change, words):
    model = build("atlas-mag-tiny")
    change(model)
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path / "model", model)
    assert list(tmp_path.iterdir()) == []


def test_hooks_are_no_part_of_what_is_saved(tmp_path):
    """They may steer, observe, keep a provider or move weights: none of them is a weight."""
    plain = build("linear-attention-tiny", depth=1)
    model = copy.deepcopy(plain)
    part, tokens = model.blocks[0].mlp, torch.arange(9)[None]
    part.register_forward_hook(lambda m, args, result: (2 * result[0], result[1]))
    part.register_forward_pre_hook(lambda m, args: None)
    part.register_full_backward_hook(lambda m, grads_in, grads_out: None)
    keep_provider(model.blocks[0], "definition")
    assert not torch.equal(model(tokens).logits, plain(tokens).logits)
    checkpoint.save(tmp_path / "model", model)
    loaded = checkpoint.load(tmp_path / "model")
    assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


def test_a_model_that_accelerate_moves_is_saved(tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("linear-attention-tiny", depth=1)
    hooks.add_hook_to_module(model.blocks[0].mlp, hooks.AlignDevicesHook("cpu"))
    checkpoint.save(tmp_path / "model", model)
    assert same(checkpoint.load(tmp_path / "model"), model)


def test_what_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model: expected a LanguageModel, got Linear"):
        checkpoint.save(tmp_path / "model", nn.Linear(2, 2))


def test_an_optimizer_that_load_run_does_not_make_is_refused(tmp_path):
    model = build("linear-attention-tiny", depth=1)
    for optimizer in (torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters())):
        with pytest.raises(ValueError, match="run: expected the optimizer that make_optimizer"):
            checkpoint.save(tmp_path / "run", model, checkpoint.Run(SETTINGS, optimizer, 0))


def test_numbers_that_are_not_finite_are_taken_where_asked_for(tmp_path):
    model = build("linear-attention-tiny", depth=1)
    poisoned(model)
    checkpoint.save(tmp_path / "model", model, allow_nonfinite=True)
    with pytest.raises(ValueError, match=r"expected finite numbers .* some in norm\.weight"):
        checkpoint.load(tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", allow_nonfinite=True)
    assert loaded.norm.weight.isnan().sum() == 1


# --- damaged files --------------------------------------------------------------------------------


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as error:
        load_both(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_flipped_bit_anywhere_is_refused(trained, tmp_path):
    path, _, _ = trained
    whole, bad = path.read_bytes(), tmp_path / "bad"
    draw = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [draw.randrange(header) for _ in range(100)]
    places += [draw.randrange(header, len(whole)) for _ in range(50)]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << draw.randrange(8)
        bad.write_bytes(broken)
        refusal(bad)


def test_bad_files_are_named(trained, tmp_path):
    path, _, _ = trained
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    foreign, garbage = tmp_path / "foreign", b"not a checkpoint" * 10
    save_file({"weight": torch.zeros(2)}, foreign)
    twice = b'{"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    twice += whole[9:header]
    contents = {
        "cut": (whole[: len(whole) // 2], "not fully covered"),
        "cut in its header": (whole[: header // 2], "invalid header length"),
        "cut in its length": (whole[:5], "header too small"),
        "empty": (b"", "header too small"),
        "garbage": (garbage, "header too large"),
        "huge header": ((2**40).to_bytes(8, "little") + whole[8:], "header too large"),
        "long header": (len(whole).to_bytes(8, "little") + whole[8:], "invalid header length"),
        "longer": (whole + b"more", "not fully covered"),
        "twice": (len(twice).to_bytes(8, "little") + twice + whole[header:], "norm.weight twice"),
    }
    for name, (content, words) in contents.items():
        (tmp_path / name).write_bytes(content)
        assert words in refusal(tmp_path / name)
    for place in (foreign, tmp_path / "missing", tmp_path):
        refusal(place)


def without(*names):
    return lambda tensors, told: [tensors.pop(n, told.pop(n, None)) for n in names]


def named(old, new):
    return lambda tensors, told: tensors.update({new: tensors.pop(old)})


def told(**changes):
    return lambda tensors, told: told.update(changes)


def with_field(key, **fields):
    return lambda tensors, told: told.update({key: json.dumps(json.loads(told[key]) | fields)})


def changed(name, change):
    return lambda tensors, told: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("config"), "expected a config ('config'), got none"),
        (told(config="{"), "config: expected JSON"),
        (told(config="[" * 100_000), "config: "),
        (with_field("config", heads="4"), "heads: expected an int >= 1, got '4'"),
        (with_field("config", depth=2), "blocks.1.mixer_norm.weight missing"),
        (with_field("training", seed="0"), "seed: expected an int"),
        (with_field("training", bf16="yes"), "bf16: expected True or False, got 'yes'"),
        (with_field("training", weight_decay=None), "weight_decay: expected a number"),
        (with_field("training", steps=0), "steps: expected an int >= 1, got 0"),
        (without("training"), "expected a training run to resume"),
        (without("step"), "step: expected an integer from 0 to 6, got ''"),
        (told(step="-1"), "step: expected an integer from 0 to 6, got '-1'"),
        (told(step="7"), "step: expected an integer from 0 to 6, got '7'"),
        (changed("model.norm.weight", lambda t: t[:3]), "norm.weight is [3], expected [8]"),
        (changed("model.norm.weight", torch.Tensor.double), "float64, expected torch.float32"),
        (changed("model.norm.weight", torch.Tensor.int), "int32, expected torch.float32"),
        (changed("model.norm.weight", lambda t: t * torch.inf), "some in norm.weight"),
        (without("model.norm.weight"), "norm.weight missing"),
        (named("model.norm.weight", "model.extra"), "norm.weight missing; extra unknown"),
        (named("model.norm.weight", "other.norm.weight"), "got other.norm.weight"),
        (named("optimizer.3.exp_avg", "optimizer.99.exp_avg"), "got optimizer.99.exp_avg"),
        (named("optimizer.3.exp_avg", "optimizer.x.exp_avg"), "got optimizer.x.exp_avg"),
        (named("optimizer.3.exp_avg", "optimizer.3.a.b"), "got optimizer.3.a.b"),
        (named("optimizer.3.exp_avg", "optimizer.exp_avg"), "got optimizer.exp_avg"),
        (named("optimizer.3.exp_avg", "optimizer.3.average"), "got optimizer.3.average"),
        (without("optimizer.3.exp_avg"), "expected optimizer.3.exp_avg, got none"),
        (changed("optimizer.1.exp_avg", torch.Tensor.t), "optimizer.1.exp_avg: expected [24, 8]"),
        (changed("optimizer.1.exp_avg", torch.Tensor.double), "got [24, 8] torch.float64"),
        (changed("optimizer.1.exp_avg", lambda t: t * torch.nan), "some in 1.exp_avg"),
    ],
)
def test_what_does_not_fit_is_named_without_a_checksum_too(trained, tmp_path, edit, words):
    tensors, metadata = both(trained[0])
    edit(tensors, metadata)
    bad = unchecked(tmp_path / "bad", tensors, metadata)
    assert words in refusal(bad)


def test_a_run_is_not_for_another_model(trained):
    with pytest.raises(ValueError, match="model: expected the model of"):
        checkpoint.load_run(trained[0], build("linear-attention-tiny"))


def test_a_model_alone_cannot_be_resumed(saved):
    path, model = saved
    with pytest.raises(ValueError, match="a training run to resume"):
        checkpoint.load_run(path, model)


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_save_leaves_the_old_file(saved, monkeypatch, kind):
    path, model = saved
    before = path.read_bytes()

    def fail(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise kind("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="cannot be written: disk full"):
        checkpoint.save(path, model)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
