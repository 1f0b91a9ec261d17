"""Signals, kills, full disks and weights that are not finite lose nothing."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from train_command import NAME, SMALL, flat, load, same

from atlas_blocks.recipes import build, checkpoint, losses, runs, training
from atlas_blocks.recipes.training import TrainingConfig, make_optimizer


def test_a_run_is_saved_every_few_steps_and_the_newest_are_kept(run, tmp_path, data, monkeypatch):
    saved, save = [], checkpoint.save

    def keep(path, model, run=None):
        saved.append(run.step)
        save(path, model, run)

    monkeypatch.setattr(checkpoint, "save", keep)
    out = tmp_path / "run"
    command = ("train", NAME, "--data", data, "--out", out, *SMALL)
    assert run(*command, "--steps", 7, "--save-every", 2, "--keep", 2)[0] == 0
    assert saved == [2, 4, 6, 7]
    kept = [f"step-{step:08d}.safetensors" for step in (6, 7)]
    assert sorted(p.name for p in out.glob("step*")) == kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_equals_never_stopping(
    run, tmp_path, data, monkeypatch, number
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ("train", NAME, "--data", data, *SMALL, "--steps", 4)
    assert run(*command, "--out", whole)[0] == 0
    update, calls = training.update, []

    def signalled(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(number)
        return update(*arguments, **options)

    monkeypatch.setattr(training, "update", signalled)
    code, printed, _ = run(*command, "--out", stopped)
    assert code == 130
    assert "interrupted after step 2" in printed
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(*command, "--out", stopped, "--resume")[0] == 0
    assert same(stopped, whole)


def killed_at_random(run, tmp_path, data, kills, steps, name=NAME):
    """Kill a run at random moments, go on each time, and compare with one that is never killed."""
    flags = ["--batch", 2, "--length", 16, "--no-compile", "--tokenizer", 300]
    flags += ["--steps", steps, "--save-every", 3, "--keep", 2, "--validate-every", 40]
    command = ["train", name, "--data", data, *flags]
    whole, out, said = (tmp_path / name for name in ("whole", "killed", "said"))
    draw = random.Random(0)
    main = "from atlas_blocks.recipes.command_line.main import main; main()"

    def resumed(place):
        return ["--resume"] if any(place.glob("step-*.safetensors")) else []

    def start(place):
        arguments = map(str, [*command, "--out", place, *resumed(place)])
        started = [sys.executable, "-c", main, *arguments]
        with said.open("a") as file:
            return subprocess.Popen(started, stdout=file, stderr=subprocess.STDOUT)

    def told(place):
        """Whole lines of steps, and perhaps a part of one."""
        log = place / "log.jsonl"
        lines = log.read_bytes().splitlines() if log.exists() else []
        return [line for line in lines if b'"lr"' in line]

    began = time.monotonic()
    assert start(whole).wait() == 0, said.read_text()
    lasts, landed = time.monotonic() - began, 0
    for number in range(kills):
        process, done = start(out), len(told(out))
        if number % 4 == 1:
            # Wherever it is: while it imports, prepares, loads.
            time.sleep(draw.uniform(0, lasts / 2))
        else:
            # So far that all kills together come before the end; then anywhere in a step or a save.
            target = done + draw.randint(1, steps // kills)
            while process.poll() is None and len(told(out)) < target:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.05))
        landed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL), said.read_text()
    assert landed > kills / 2
    assert run(*command, "--out", out, *resumed(out))[0] == 0
    assert same(out, whole)
    # Its log tells every step once, in order, as that of the other.
    ours, true = (
        [(line["step"], line["loss"], line["lr"]) for line in map(json.loads, told(place))]
        for place in (out, whole)
    )
    assert ours == true


@pytest.mark.slow(compile_nodes=False)
def test_killed_at_random_moments_it_ends_with_the_same_weights(run, tmp_path, data):
    killed_at_random(run, tmp_path, data, kills=3, steps=80)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
def test_a_compiled_run_in_parts_is_the_run(run, tmp_path, data):
    """Each in a process of its own, which compiles anew."""
    command = ["train", "atlas-mag-tiny", "--data", data, "--batch", 2, "--length", 32, "--carry"]
    main = "from atlas_blocks.recipes.command_line.main import main; main()"

    def process(*flags):
        whole = [sys.executable, "-c", main, *map(str, [*command, *flags])]
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)

    for place in ("whole", "parts"):
        process("--out", tmp_path / place, "--steps", 6, "--save-every", 3)
    runs.newest(tmp_path / "parts").unlink()
    process("--out", tmp_path / "parts", "--resume")
    assert same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_a_hybrid_killed_at_random_moments_ends_with_the_same_weights(run, tmp_path, data):
    killed_at_random(run, tmp_path, data, kills=8, steps=80, name="atlas-hybrid-tiny")


def poison(monkeypatch, *places):
    """The losses of these steps, counted from 1, are NaN."""
    loss, calls = training.batch_loss, []

    def poisoned(model, batch, *rest, **options):
        calls.append(batch)
        value, state = loss(model, batch, *rest, **options)
        return value * (float("nan") if len(calls) in places else 1), state

    monkeypatch.setattr(training, "batch_loss", poisoned)
    return calls


def test_a_run_that_diverges_leaves_the_last_good_weights_and_the_batch(
    run, tmp_path, data, monkeypatch
):
    batches = poison(monkeypatch, 3, 4)
    out = tmp_path / "run"
    command = ("train", NAME, "--data", data, "--out", out, *SMALL, "--steps", 5, "--patience", 1)
    code, printed, err = run(*command)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "step 3: loss nan, gradient norm nan; the step is skipped" in flat(printed)
    assert "step 4: loss nan, gradient norm nan; the run as it was before, after step 3" in err
    batch = out / "bad-step-00000004.safetensors"
    assert f"is saved in {out}, and the batch in {batch}" in err
    told = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert told[2]["loss"] is None
    assert "loss nan" in told[2]["skipped"]
    model, after = load(out)
    assert after.step == 3
    assert torch.equal(load_file(batch)["0.tokens"], batches[3].tokens)
    config = TrainingConfig(steps=5, batch=1, length=16)
    monkeypatch.undo()
    torch.manual_seed(0)
    true = build(NAME)
    optimizer = make_optimizer(true, config)
    for i in range(2):
        loss, _ = losses.batch_loss(true, batches[i])
        training.descend(true, optimizer, loss, config, i)
    assert all(map(torch.equal, model.parameters(), true.parameters()))
    # Where it was a passing fault, the run goes on.
    assert run(*command, "--resume")[0] == 0


def test_gradients_beyond_float32_stop_the_run(run, tmp_path, data, monkeypatch):
    """Each is finite, the sum of their squares is not."""
    loss = training.batch_loss

    def large(*arguments, **options):
        value, state = loss(*arguments, **options)
        return value * 1e30, state

    monkeypatch.setattr(training, "batch_loss", large)
    out = tmp_path / "run"
    code, _, err = run("train", NAME, "--data", data, "--out", out, *SMALL, "--steps", 5)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "gradient norm inf" in err
    assert load(out)[0].parameter_count() > 0


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_disk_that_fills_up_loses_nothing(run, tmp_path, data, monkeypatch, kind):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    write = checkpoint.save_file

    def full(tensors, path, metadata):
        if path.parent == out and metadata["step"] != "2":
            monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
            raise kind("No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    command = ("train", NAME, "--data", data, "--out", out, *SMALL)
    code, _, err = run(*command, "--steps", 9, "--save-every", 2)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "cannot be written: No space left on device; the run after step 4 is in" in err
    assert [p.name for p in out.glob("step*")] == ["step-00000002.safetensors"]
    for place, step in ((out, 2), (Path(err.split()[-1]), 4)):
        assert load(place)[1].step == step


def test_what_kills_left_half_written_is_removed(run, tmp_path, data, started):
    out, command = started
    for name in ("step-00000002.safetensors.99.partial", "data.partial"):
        (out / name).write_text("half")
    assert run(*command, "--resume", "--steps", 5)[0] == 0
    assert not list(out.glob("step*.partial"))
