"""What can be known before step 1 is said before it."""

import sys

import pytest
import torch
from train_command import NAME, SMALL, flat

from atlas_blocks.recipes import build, training
from atlas_blocks.recipes.training import TrainingConfig


@pytest.mark.parametrize("place", ["words.txt/model", "/proc/no/model", "words.txt"])
def test_a_place_that_cannot_be_written_is_named_first(run, tmp_path, data, no_step, place):
    out = tmp_path / place
    code, printed, err = run("train", NAME, "--data", data, "--out", out, *SMALL)
    assert (code, printed) == (2, "")
    assert err.startswith(f"atlas-blocks: out: cannot write in {out}")


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "ablate",
        "capacity",
        "separation",
        "bench SwiGLU",
        "bench kernels --device cpu",
    ],
)
def test_every_command_tries_its_place_first(run, tmp_path, data, no_step, command):
    code, printed, err = run(*command.split(), "--out", data / "results")
    assert (code, printed) == (2, "")
    assert err.startswith(f"atlas-blocks: out: cannot write in {data}")


def test_an_export_tries_its_place_first(run, data):
    code, printed, err = run("export", NAME, "--out", data / "step.pt2")
    assert (code, printed) == (2, "")
    assert err.startswith(f"atlas-blocks: out: cannot write in {data}")


def test_a_full_disk_is_named_first(run, tmp_path, data, no_step, monkeypatch):
    usage = type("Usage", (), {"free": 4_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    code, _, err = run("train", NAME, "--data", data, "--out", tmp_path / "model", *SMALL)
    assert code == 2
    assert "out: expected a disk with" in err
    assert "4.00 MB" in err


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (100, "at least 128 predicted tokens to train on, got 94"),
        (1500, "at least 128 predicted tokens to hold out, got 74"),
    ],
)
def test_a_text_too_short_is_named_first(run, tmp_path, no_step, size, words):
    file = tmp_path / "small.txt"
    file.write_text("x" * size)
    code, _, err = run("train", NAME, "--data", file, "--out", tmp_path / "model", "--no-compile")
    assert code == 2
    assert f"atlas-blocks: data: expected {words} in small.txt" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "none"), "data: expected a folder or a file, got none (not found)"),
        (("--tokenizer", "none.json"), "tokenizer: cannot read none.json"),
        (("--tokenizer", 10), "size: expected an int >= 257"),
        (("--held-out", 0), "held_out: expected a number in [0.001, 0.5]"),
        (("--device", "abacus"), "device: cannot use 'abacus'"),
        (("--save-every", 0), "save-every: expected an int >= 1"),
        (("--keep", 0), "keep: expected an int >= 1"),
        (("--optimizer", "sgd"), "optimizer: expected one of adamw, muon"),
        (("--schedule", "flat"), "schedule: expected one of cosine, wsd"),
        (
            ("--wandb", "project"),
            "wandb: expected the library wandb, got none (pip install 'atlas-blocks[wandb]')",
        ),
    ],
)
def test_what_is_wrong_is_named_first(run, tmp_path, data, no_step, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "wandb", None)
    command = ("train", NAME, "--data", data, "--out", tmp_path / "out", *SMALL)
    code, _, err = run(*command, *flags)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert f"atlas-blocks: {words}" in flat(err)
    assert not (tmp_path / "out").exists()


def test_a_machine_without_a_compiler_is_named_first(run, tmp_path, data, no_step, monkeypatch):
    def compiled(function):
        raise RuntimeError("No working C++ compiler found\nin any place")

    monkeypatch.setattr(torch, "compile", compiled)
    command = ("train", NAME, "--data", data, "--out", tmp_path / "out")
    code, printed, err = run(*command)
    assert (code, printed) == (2, "")
    assert "compile: nothing can be compiled here" in err
    assert "(--no-compile trains without): No working C++ compiler found" in err


def test_a_vocabulary_beyond_the_models_is_named_first(run, tmp_path, data, no_step):
    config = build(NAME).config.replace(vocab_size=280)
    (tmp_path / "model.json").write_text(config.to_json())
    command = ("train", tmp_path / "model.json", "--data", data, *SMALL, "--tokenizer", 300)
    code, _, err = run(*command, "--out", tmp_path / "out")
    assert code == 2
    assert "data: expected tokens below the model's 280, got a vocabulary of 300" in flat(err)


def test_a_state_that_grows_is_not_carried(run, tmp_path, data, no_step):
    command = ("train", "transformer-tiny", "--data", data, "--out", tmp_path / "out", *SMALL)
    code, _, err = run(*command, "--carry")
    assert code == 2
    assert "carry: expected a model whose state does not grow with the text" in flat(err)


def test_one_of_several_ranks_is_refused(run, tmp_path, data, no_step, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (("demo",), ("ablate",), ("separation",)):
        code, printed, err = run(*command, "--out", tmp_path / "out")
        assert (code, printed) == (2, "")
        assert "training: expected one process, as it divides no work, got 2 ranks" in err
    with pytest.raises(ValueError, match="got 2 ranks"):
        training.train(build(NAME), torch.zeros(99), TrainingConfig(steps=1, length=8))
    # One process, however it was started.
    monkeypatch.setenv("WORLD_SIZE", "1")
    training.check_one_process()
