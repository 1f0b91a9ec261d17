"""Text and tokenizers of a run, its logs, and what it says."""

import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from train_command import NAME, SMALL, flat

from atlas_blocks.recipes import build, checkpoint, describe, logs, losses, run_data, runs
from atlas_blocks.recipes.command_line import main as cli
from atlas_blocks.recipes.command_line import using
from atlas_blocks.recipes.data import Shards, Tokenizer
from atlas_blocks.recipes.training import TrainingConfig, TrainingState, make_optimizer


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "texts"
    place.mkdir()
    for i in range(30):
        (place / f"{i:02}.txt").write_text(f"text {i} of a folder, of so many words\n" * 20)
    return place


def test_one_command_trains_on_a_folder_with_a_tokenizer_made_from_it(run, tmp_path, folder):
    """And what it saves can be sampled from by itself, in words."""
    out = tmp_path / "run"
    command = ("train", NAME, "--data", folder, "--tokenizer", 300, "--out", out, *SMALL)
    assert run(*command, "--steps", 60, "--lr", 1e-2)[0] == 0
    saved = (runs.newest(out)).rename(tmp_path / "model.safetensors")
    model, coder = checkpoint.load(saved), Tokenizer(checkpoint.tokenizer(saved))
    assert model.config.vocab_size == coder.vocab_size == 300
    code, printed, _ = run("generate", saved, "--prompt", "text 7", "--temperature", 0)
    assert code == 0
    assert printed.startswith("text 7")
    assert len(printed) > 12


def test_a_run_takes_what_was_prepared_and_leaves_it_alone(run, tmp_path, folder, no_step):
    shards = tmp_path / "shards"
    code, printed, _ = run("prepare", folder, "--out", shards, "--tokenizer", 300)
    assert code == 0
    assert "28 documents to train on" in flat(printed)
    assert "2 documents held out" in flat(printed)
    before = {p.name: p.stat().st_mtime_ns for p in shards.iterdir()}
    command = ("train", NAME, "--data", shards, "--out", tmp_path / "run", *SMALL)
    with pytest.raises(AssertionError, match="a step was taken"):
        cli.main([str(part) for part in command])
    assert {p.name: p.stat().st_mtime_ns for p in shards.iterdir()} == before
    assert not (tmp_path / "run" / "data").exists()
    for name, value in (("tokenizer", "bytes"), ("field", "text"), ("held-out", 0.1)):
        code, _, err = run(*command, f"--{name}", value)
        assert code == 2
        assert f"{name}: expected nothing for data that is prepared ({shards})" in flat(err)
    code, _, err = run("prepare", shards, "--out", tmp_path / "again")
    assert code == 2
    assert "(prepared already)" in err


def test_a_tokenizer_is_trained_apart(run, tmp_path, folder):
    file = tmp_path / "tokenizer.json"
    assert run("tokenizer", folder, "--size", 280, "--out", file)[0] == 0
    command = ("prepare", folder, "--out", tmp_path / "a", "--tokenizer")
    assert run(*command, file)[0] == 0
    assert run("prepare", folder, "--out", tmp_path / "b", "--tokenizer", 280)[0] == 0
    assert Shards(tmp_path / "a").fingerprint == Shards(tmp_path / "b").fingerprint
    code, _, err = run("tokenizer", folder, "--size", 280, "--out", folder / "00.txt" / "t.json")
    assert code == 2
    assert "out: cannot write in" in err


def test_sampling_ends_with_the_document(run, tmp_path, folder, monkeypatch):
    coder = run_data.train_tokenizer([["abc"] * 9], 260)
    model = build(NAME, depth=1, vocab_size=260)
    kept = checkpoint.Run(
        TrainingConfig(steps=1),
        make_optimizer(model, TrainingConfig(steps=1)),
        0,
        tokenizer=coder.json,
    )
    checkpoint.save(tmp_path / "model", model, kept)
    (letters,) = coder.encode(["bc"])

    def stream(model, rows, *, stopped, **options):
        for token in [*letters.tolist(), coder.end, *letters.tolist()]:
            if all([stopped(row, token) for row in range(len(rows))]):
                return
            yield torch.tensor([token] * len(rows))

    monkeypatch.setattr(using, "stream", stream)
    for batch in (1, 2):
        _, printed, _ = run("generate", tmp_path / "model", "--prompt", "a", "--batch", batch)
        assert printed.count("abc\n") == batch
        assert "abcbc" not in printed
        assert "endoftext" not in printed


def test_logs_tell_every_step(run, tmp_path, data):
    out = tmp_path / "run"
    command = ("train", NAME, "--data", data, "--out", out, *SMALL, "--steps", 6)
    assert run(*command, "--validate-every", 4)[0] == 0
    told = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in told if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in told if "held_out_loss" in line] == [4, 6]
    assert steps[-1]["tokens"] == 6 * 16
    assert {"lr", "grad_norm", "tokens_per_second"} < set(steps[0])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in board.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in steps
    ]


def test_a_log_goes_on_from_the_step_it_is_told(tmp_path):
    """Later steps, and what a kill left of a line, are dropped."""
    lines = [json.dumps({"step": step, "loss": step}) for step in (1, 2, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    with logs.Log(tmp_path, 3) as log:
        log.write(4, loss=float("nan"), lr=0.1, skipped="")
        log.write(5, loss=0.5, skipped="why")
    told = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [1, 2, 2, 3, 4, 5]
    assert told[4] == {"step": 4, "loss": None, "lr": 0.1}
    assert told[5] == {"step": 5, "loss": 0.5, "skipped": "why"}


def test_a_project_of_weights_and_biases_is_told_the_same(run, tmp_path, data, monkeypatch):
    told = []

    class Project:
        def log(self, scalars, step):
            told.append((step, scalars))

        def finish(self):
            told.append("finished")

    library = types.SimpleNamespace(init=lambda **how: told.append(how) or Project())
    monkeypatch.setitem(sys.modules, "wandb", library)
    out = tmp_path / "run"
    command = ("train", NAME, "--data", data, "--out", out, *SMALL, "--steps", 2)
    assert run(*command, "--wandb", "some")[0] == 0
    assert told[0]["project"] == "some"
    assert [entry[0] for entry in told[1:-1]] == [1, 2, 2]
    assert told[-1] == "finished"


def test_how_much_was_held_out_is_said(run, started, data):
    out, command = started
    _, printed, _ = run(*command, "--resume")
    held_out = Shards(out / "data").held_out.token_count
    read = (held_out - 1) // 16 * 16
    assert "bits per byte" in flat(printed)
    said = f"held out: on {read:,} of {held_out:,} tokens, {read:,} bytes of text"
    assert said in flat(printed)  # a token is a byte here


def test_a_vocabulary_that_changes_is_said_with_the_new_size(started):
    console = Console(record=True, width=200, file=io.StringIO())
    model = build("linear-attention-170m", vocab_size=256, dim=16, heads=2, depth=1)
    config = TrainingConfig(steps=1)
    shards = Shards(started[0] / "data")
    begun = runs.Training(model, config, make_optimizer(model, config), TrainingState(), shards)
    runs._announce(console, begun)
    said = console.export_text()
    assert f"{describe.human(model.parameter_count())} parameters with a vocab" in flat(said)
    assert "with a vocabulary of 256 instead of the recipe's 32,000 (170M)" in flat(said)


def test_bits_per_byte_of_tokens_are_of_the_text_they_stand_for(run, tmp_path, folder):
    assert run("prepare", folder, "--out", tmp_path / "s", "--tokenizer", 300)[0] == 0
    shards, config = Shards(tmp_path / "s"), TrainingConfig(steps=1, batch=2, length=8)
    held_out, model = runs.HeldOut(shards, config), build(NAME, vocab_size=300)
    targets = [b.targets[0].tolist() for s in range(held_out.steps) for b in held_out.packed(s)]
    count, size = sum(map(len, targets)), sum(len(shards.tokenizer.decode(t)) for t in targets)
    assert (held_out.tokens, held_out.size) == (count, size)
    assert size > 2 * count
    nats, bits = held_out(model)
    assert bits == pytest.approx(nats * count / size / 0.6931471805599453)


def test_bits_per_byte_are_of_bytes():
    model = build(NAME, vocab_size=1000)
    tokens = torch.randint(1000, (200,))
    with pytest.raises(ValueError, match=r"data: expected dtype torch.uint8, got torch.int64"):
        losses.bits_per_byte(model, tokens, length=16)
    assert 9 < losses.bits_per_token(model, tokens, length=16) < 11


def test_the_version(run):
    code, printed, _ = run("--version")
    assert code == 0
    assert printed.startswith(f"atlas-blocks {checkpoint.version()} ")


@pytest.mark.parametrize("command", [("--version",), ("show", "atlas-tiny")])
def test_a_reader_that_goes_away_is_no_error(capsys, monkeypatch, command):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as left:
            cli.main(list(command))
    assert left.value.code == 1
    assert capsys.readouterr().err == ""


def test_json_results_survive_a_kill(tmp_path, monkeypatch):
    """The files of the laboratories are replaced whole."""
    from atlas_blocks.recipes import files

    place = tmp_path / "result.json"
    files.write_json(place, {"cells": 1})

    def killed(self, *rest):
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(place, {"cells": 2})
    monkeypatch.undo()
    assert json.loads(place.read_text()) == {"cells": 1}
    assert list(tmp_path.iterdir()) == [place]
