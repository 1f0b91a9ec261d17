"""Training from the command line: what can be known is known before step 1; nothing is lost."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from atlas_blocks.recipes import build, checkpoint, cli, runs, text, training
from atlas_blocks.recipes.training import TrainingConfig, make_optimizer

NAME = "linear-attention-tiny"
SMALL = ("--batch", 1, "--length", 16)


@pytest.fixture
def data(tmp_path):
    """Enough text to train on and to hold out."""
    file = tmp_path / "words.txt"
    file.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(300)))
    return file


@pytest.fixture
def no_step(monkeypatch):
    """A step is a failure: what is wrong has to be said before."""

    def step(*arguments):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(training, "train_step", step)


def flat(words):
    return " ".join(words.split())


# --- before step 1 ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["words.txt/model", "/proc/no/model", "folder"])
def test_a_place_that_cannot_be_written_is_named_first(run, tmp_path, data, no_step, place):
    (tmp_path / "folder").mkdir()
    out = tmp_path / place
    code, printed, err = run("train", NAME, "--data", data, "--out", out, *SMALL)
    assert (code, printed) == (2, "")
    assert err.startswith("atlas-blocks: out: ")
    assert str(out if place == "folder" else out.parent) in err


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
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    code, _, err = run("train", NAME, "--data", data, "--out", tmp_path / "model", *SMALL)
    assert code == 2
    assert "out: expected a disk with" in err
    assert "10.0 kB" in err


@pytest.mark.parametrize(
    ("size", "words"),
    [(100, "at least 129 bytes to train on"), (1500, "at least 129 bytes to hold out")],
)
def test_a_text_too_short_is_named_first(run, tmp_path, no_step, size, words):
    file = tmp_path / "small.txt"
    file.write_text("x" * size)
    code, printed, err = run("train", NAME, "--data", file, "--out", tmp_path / "model")
    assert (code, printed) == (2, "")
    assert words in err
    assert not (tmp_path / "model").exists()


def test_one_of_several_ranks_is_refused(run, tmp_path, data, no_step, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (("train", NAME, "--data", data), ("demo",), ("ablate",), ("separation",)):
        code, printed, err = run(*command, "--out", tmp_path / "out")
        assert (code, printed) == (2, "")
        assert "training: expected one process, as it divides no work, got 2 ranks" in err
    with pytest.raises(ValueError, match="got 2 ranks"):
        training.train(build(NAME), torch.zeros(99), TrainingConfig(steps=1, length=8))
    # One process, however it was started.
    monkeypatch.setenv("WORLD_SIZE", "1")
    training.check_one_process()


# --- going on -----------------------------------------------------------------------------------


@pytest.fixture
def started(run, tmp_path, data):
    """A run of four steps, finished: (out, its command)."""
    out = tmp_path / "model"
    command = ("train", NAME, "--data", data, "--out", out, *SMALL)
    assert run(*command, "--steps", 4)[0] == 0
    return out, command


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", 1e-2), "lr: expected 0.003 (that of the run in"),
        (("--length", 32), "length: expected 16 (that"),
        (("--batch", 2), "batch: expected 1 (that"),
        (("--seed", 1), "seed: expected 0 (that"),
        (("--bf16",), "bf16: expected False (that"),
        (("--steps", 3), "steps: expected at least the 4 that"),
    ],
)
def test_a_flag_that_differs_is_refused_by_name(run, data, started, no_step, flags, words):
    out, _ = started
    code, printed, err = run(
        "train", NAME, "--data", data, "--out", out, "--resume", "--steps", 9, *flags
    )
    assert (code, printed) == (2, "")
    assert words in flat(err)


def test_another_text_or_recipe_is_refused_by_name(run, data, started, no_step):
    out, command = started
    data.write_text(data.read_text().replace("enough", "enouhg"))
    code, _, err = run(*command, "--resume", "--steps", 9)
    assert code == 2
    assert "data: expected words.txt (" in flat(err)
    code, _, err = run("train", "lstm-tiny", "--data", data, "--out", out, "--resume")
    assert code == 2
    assert f"recipe: expected {NAME} (that of" in flat(err)


def test_steps_extend_a_finished_run(run, data, started):
    out, _ = started
    command = ("train", NAME, "--data", data, "--out", out, "--resume")
    code, printed, _ = run(*command)
    assert code == 0
    assert "all 4 steps were taken before; --steps with a larger number goes on" in flat(printed)
    code, printed, _ = run(*command, "--steps", 6)
    assert code == 0
    assert "from step 4 to 6" in flat(printed)
    model = checkpoint.load(out)
    assert checkpoint.load_run(out, model).step == 6

    # The same by hand: four steps of a run of four, then two of a run of six.
    corpus = text.load_text(data)
    four = TrainingConfig(steps=4, batch=1, length=16)
    torch.manual_seed(0)
    true = build(NAME)
    optimizer = make_optimizer(true, four)
    training.train(true, corpus.train, four, optimizer=optimizer)
    training.train(true, corpus.train, four.replace(steps=6), optimizer=optimizer, start=4)
    assert all(map(torch.equal, model.parameters(), true.parameters()))


# --- nothing is lost ----------------------------------------------------------------------------


def test_a_run_is_saved_every_few_steps(run, tmp_path, data, monkeypatch):
    saved, save = [], checkpoint.save

    def keep(path, model, run=None):
        saved.append((run.step, checkpoint.Path(path).exists()))
        save(path, model, run)

    monkeypatch.setattr(checkpoint, "save", keep)
    out = tmp_path / "model"
    command = ("train", NAME, "--data", data, "--out", out, *SMALL)
    assert run(*command, "--steps", 7, "--save-every", 2)[0] == 0
    assert saved == [(2, False), (4, True), (6, True), (7, True)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_equals_never_stopping(
    run, tmp_path, data, monkeypatch, number
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ("train", NAME, "--data", data, *SMALL, "--steps", 4)
    assert run(*command, "--out", whole)[0] == 0
    step = training.train_step

    def signalled(*arguments):
        if arguments[-1] == 1:
            signal.raise_signal(number)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", signalled)
    code, printed, _ = run(*command, "--out", stopped)
    assert code == 130
    assert "interrupted after step 2" in printed
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(*command, "--out", stopped, "--resume")[0] == 0
    ours, true = (checkpoint.load(p).parameters() for p in (stopped, whole))
    assert all(map(torch.equal, ours, true))


def test_kill_leaves_the_last_save_whole(run, tmp_path, data):
    """Killed while it saves at every step: what lies there can be resumed."""
    out = tmp_path / "model"
    main = "import sys; from atlas_blocks.recipes.cli import main; main(sys.argv[1:])"
    command = ["train", NAME, "--data", data, "--out", out, *SMALL, "--save-every", 1]
    started = [sys.executable, "-c", main, *map(str, [*command, "--steps", 100_000])]
    process = subprocess.Popen(started, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not out.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = checkpoint.load_run(out, checkpoint.load(out)).step
    assert step > 0
    assert run(*command, "--resume", "--steps", step + 1)[0] == 0
    assert checkpoint.load_run(out, checkpoint.load(out)).step == step + 1


def poison(monkeypatch, at):
    """The loss of one step is NaN."""
    loss, calls = training.next_byte_loss, []

    def poisoned(model, rows, reduction="mean"):
        calls.append(rows)
        return loss(model, rows, reduction) * (float("nan") if len(calls) == at else 1)

    monkeypatch.setattr(training, "next_byte_loss", poisoned)
    return calls


def test_a_loss_that_is_not_finite_leaves_the_last_good_weights_and_the_batch(
    run, tmp_path, data, monkeypatch
):
    batches = poison(monkeypatch, at=3)
    out = tmp_path / "model"
    command = ("train", NAME, "--data", data, "--out", out, *SMALL, "--steps", 5)
    code, _, err = run(*command)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "step 3: loss nan" in err
    assert f"after step 2, is saved in {out}, and the batch in {out}.batch" in err
    model = checkpoint.load(out)
    assert checkpoint.load_run(out, model).step == 2
    assert torch.equal(load_file(f"{out}.batch")["rows"], batches[2])
    config = TrainingConfig(steps=5, batch=1, length=16)
    monkeypatch.undo()
    torch.manual_seed(0)
    true = build(NAME)
    optimizer = make_optimizer(true, config)
    for i in range(2):
        training.train_step(true, optimizer, batches[i], config, i)
    assert all(map(torch.equal, model.parameters(), true.parameters()))


def test_gradients_beyond_float32_stop_the_run(run, tmp_path, data, monkeypatch):
    """Each is finite, the sum of their squares is not."""
    loss = training.next_byte_loss
    monkeypatch.setattr(training, "next_byte_loss", lambda *a: loss(*a) * 1e30)
    out = tmp_path / "model"
    code, _, err = run("train", NAME, "--data", data, "--out", out, *SMALL, "--steps", 5)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "gradient norm inf" in err
    assert checkpoint.load(out).parameter_count() > 0


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_disk_that_fills_up_loses_nothing(run, tmp_path, data, monkeypatch, kind):
    out, elsewhere = tmp_path / "out" / "model", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    write = checkpoint.save_file

    def full(tensors, path, metadata):
        if path.parent == out.parent and metadata["step"] != "2":
            raise kind("No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    command = ("train", NAME, "--data", data, "--out", out, *SMALL)
    code, _, err = run(*command, "--steps", 9, "--save-every", 2)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "cannot be written: No space left on device; the run after step 4 is in" in err
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    for place, step in ((out, 2), (Path(err.split()[-1]), 4)):
        assert checkpoint.load_run(place, checkpoint.load(place)).step == step


# --- what is said -------------------------------------------------------------------------------


def test_how_much_was_held_out_is_said(run, started, data):
    _, command = started
    _, printed, _ = run(*command, "--resume")
    held_out = len(text.load_text(data).held_out)
    read = (held_out - 1) // 16 * 16
    assert f"bits per byte, on {read:,} of {held_out:,} bytes" in flat(printed)


def test_a_vocabulary_that_changes_is_said_with_the_new_size(tmp_path):
    console = cli.Console(record=True, width=200, file=io.StringIO())
    model = build("linear-attention-170m", vocab_size=256, dim=16, heads=2, depth=1)
    config = TrainingConfig(steps=1)
    corpus = text.Corpus(torch.zeros(9), torch.zeros(9), "x")
    runs._announce(console, model, runs.Run(config, make_optimizer(model, config), 0), corpus)
    said = console.export_text()
    assert "with a vocabulary of 256 bytes instead of the recipe's 32,000 (170M)" in flat(said)


def test_bits_per_byte_are_of_bytes():
    model = build(NAME, vocab_size=1000)
    tokens = torch.randint(1000, (200,))
    with pytest.raises(ValueError, match=r"data: expected dtype torch.uint8, got torch.int64"):
        training.bits_per_byte(model, tokens, length=16)
    assert 9 < training.bits_per_token(model, tokens, length=16) < 11


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
