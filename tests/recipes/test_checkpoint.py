"""Checkpoints: nothing is lost, nothing half-written, and every bad file is named."""

import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas_blocks.recipes import build, checkpoint, train
from atlas_blocks.recipes.training import TrainingConfig, make_optimizer

DATA = torch.arange(4096).mul(37).remainder(97).to(torch.uint8)
SETTINGS = TrainingConfig(steps=6, batch=2, length=16)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    model = build("atlas-mag-tiny")
    checkpoint.save(path, model)
    return path, model


def test_round_trip(saved):
    path, model = saved
    loaded = checkpoint.load(path)
    assert loaded.config == model.config
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


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

    model = checkpoint.load(path)
    run = checkpoint.load_run(path, model)
    assert (run.step, run.config) == (3, SETTINGS)
    train(model, DATA, run.config, optimizer=run.optimizer, start=run.step)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_files_are_named(saved, tmp_path):
    path, _ = saved
    whole = path.read_bytes()
    truncated, garbage = tmp_path / "truncated", tmp_path / "garbage"
    truncated.write_bytes(whole[: len(whole) // 2])
    garbage.write_bytes(b"not a checkpoint" * 10)
    foreign, empty = tmp_path / "foreign", tmp_path / "empty"
    save_file({"weight": torch.zeros(2)}, foreign)
    empty.write_bytes(b"")
    for bad in (truncated, garbage, foreign, empty, tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="checkpoint") as error:
            checkpoint.load(bad)
        assert str(bad) in str(error.value)


def test_tensors_that_do_not_fit_are_named(saved, tmp_path):
    path, model = saved
    bad = tmp_path / "bad"
    metadata = {"format": checkpoint.FORMAT, "config": model.config.to_json()}
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": torch.zeros(3)}, bad, metadata)
    with pytest.raises(ValueError, match=r"norm\.weight is \[3\], expected \[64\]"):
        checkpoint.load(bad)
    tensors.pop("model.norm.weight")
    save_file({**tensors, "model.extra": torch.zeros(3)}, bad, metadata)
    with pytest.raises(ValueError, match=r"norm\.weight missing; extra unknown"):
        checkpoint.load(bad)
    save_file(tensors, bad, {**metadata, "config": "{"})
    with pytest.raises(ValueError, match="expected JSON"):
        checkpoint.load(bad)


def test_a_model_alone_cannot_be_resumed(saved):
    path, model = saved
    with pytest.raises(ValueError, match="a training run to resume"):
        checkpoint.load_run(path, model)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, model)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
