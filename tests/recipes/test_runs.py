"""Training from the command line: what can be known is known before step 1; nothing is lost."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from atlas_blocks.recipes import (
    build,
    checkpoint,
    describe,
    logs,
    losses,
    run_data,
    runs,
    training,
)
from atlas_blocks.recipes.command_line import main as cli
from atlas_blocks.recipes.command_line import using
from atlas_blocks.recipes.data import Packed, Shards, Tokenizer
from atlas_blocks.recipes.training import TrainingConfig, TrainingState, make_optimizer

NAME = "linear-attention-tiny"
SMALL = ("--batch", 1, "--length", 16, "--no-compile")


@pytest.fixture
def data(tmp_path):
    """Enough text to train on and to hold out."""
    file = tmp_path / "words.txt"
    file.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(300)))
    return file


@pytest.fixture
def no_step(monkeypatch):
    """A step is a failure: what is wrong has to be said before."""

    def step(*arguments, **options):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(training, "batch_loss", step)


def flat(words):
    return " ".join(words.split())


def load(out):
    """The model and the run of the newest checkpoint in a folder."""
    path = runs.newest(out)
    model = checkpoint.load(path)
    return model, checkpoint.load_run(path, model)


def same(out, other):
    """Whether two runs ended at the same step with the same weights and optimizer, bit for bit."""
    ours, theirs = (load_file(runs.newest(place)) for place in (out, other))
    names = runs.newest(out).name == runs.newest(other).name and ours.keys() == theirs.keys()
    return names and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- before step 1 ------------------------------------------------------------------------------


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


# --- going on -----------------------------------------------------------------------------------


@pytest.fixture
def started(run, tmp_path, data):
    """A run of four steps, finished: (out, its command)."""
    out = tmp_path / "run"
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
        (("--carry",), "carry: expected False (that"),
        (("--compile",), "compile: expected False (that"),
        (("--accumulate", 2), "accumulate: expected 1 (that"),
        (("--optimizer", "muon"), "optimizer: expected adamw (that"),
        (("--schedule", "wsd"), "schedule: expected cosine (that"),
        (("--spike", 1), "spike: expected 8.0 (that"),
        (("--steps", 3), "steps: expected at least the 4 that"),
        (("--tokenizer", 300), "tokenizer: expected bytes (that of"),
        (("--held-out", 0.1), "held-out: expected 0.05 (that of"),
        (("--field", "content"), "data: expected words.txt as it was when"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_flag_that_differs_is_refused_by_name(run, data, started, no_step, flags, words, named):
    """Also where the run finds its data by itself."""
    out, _ = started
    source = ("--data", data) if named else ()
    code, printed, err = run("train", NAME, *source, "--out", out, "--resume", "--steps", 9, *flags)
    assert (code, printed) == (2, "")
    assert words in flat(err) or (not named and "field: expected text (that of" in flat(err))


def test_another_text_or_recipe_is_refused_by_name(run, tmp_path, data, started, no_step):
    out, command = started
    code, _, err = run("train", "lstm-tiny", "--data", data, "--out", out, "--resume")
    assert code == 2
    assert f"recipe: expected {NAME} (that of" in flat(err)
    other = tmp_path / "other.txt"
    other.write_text(data.read_text().replace("enough", "enouhg"))
    assert run("prepare", other, "--out", tmp_path / "shards")[0] == 0
    code, _, err = run("train", NAME, "--data", tmp_path / "shards", "--out", out, "--resume")
    assert code == 2
    assert "data: expected words.txt (" in flat(err)
    data.write_text(other.read_text())
    code, _, err = run(*command, "--resume", "--steps", 9)
    assert code == 2
    assert "data: expected words.txt as it was when" in flat(err)


def test_there_must_be_a_run_to_resume_and_none_to_begin(run, tmp_path, data, started, no_step):
    out, command = started
    code, printed, err = run(*command)
    assert (code, printed) == (2, "")
    assert f"out: {out} holds a run; --resume continues it" in flat(err)
    code, printed, err = run("train", NAME, "--out", tmp_path / "none", "--resume")
    assert (code, printed) == (2, "")
    assert "out: expected the folder of a run to resume, got" in flat(err)


def test_steps_extend_a_finished_run(run, data, started):
    out, command = started
    code, printed, _ = run(*command, "--resume")
    assert code == 0
    assert "all 4 steps were taken before; --steps with a larger number goes on" in flat(printed)
    code, printed, _ = run("train", NAME, "--out", out, "--resume", "--steps", 6)
    assert code == 0
    assert "from step 4 to 6" in flat(printed)
    model, after = load(out)
    assert after.step == 6

    # The same by hand: four steps of a run of four, then two of a run of six.
    four = TrainingConfig(steps=4, batch=1, length=16)
    packed = Packed(Shards(out / "data").train, 1, 16)
    torch.manual_seed(0)
    true = build(NAME)
    optimizer, state = make_optimizer(true, four), TrainingState()
    training.train(true, packed, four, optimizer=optimizer, state=state)
    training.train(true, packed, four.replace(steps=6), optimizer=optimizer, state=state)
    assert all(map(torch.equal, model.parameters(), true.parameters()))


HARD = (
    "--tokenizer",
    300,
    "--optimizer",
    "muon",
    "--schedule",
    "wsd",
    "--carry",
    "--accumulate",
    2,
)


@pytest.mark.parametrize("flags", [(), HARD, ("--bf16",)], ids=["plain", "hard", "bf16"])
def test_a_run_in_parts_is_the_run(run, tmp_path, data, flags):
    """Whatever a run goes on from is in its checkpoints: everything in them is the same."""
    command = ("train", NAME, "--data", data, *SMALL, "--batch", 2, *flags, "--steps", 7)
    assert run(*command, "--out", tmp_path / "whole")[0] == 0
    parts = tmp_path / "parts"
    assert run(*command, "--out", parts, "--save-every", 3)[0] == 0
    runs.newest(parts).unlink()
    assert run(*command, "--out", parts, "--resume")[0] == 0
    assert same(parts, tmp_path / "whole")


def test_generators_go_on_where_they_were(run, tmp_path, data, monkeypatch):
    """A model that draws as it trains draws the same after a resume."""
    drawn, loss = [], training.batch_loss

    def noisy(*arguments, **options):
        value, state = loss(*arguments, **options)
        drawn.append(torch.rand(()).item())
        return value * (1 + drawn[-1]), state

    monkeypatch.setattr(training, "batch_loss", noisy)
    command = ("train", NAME, "--data", data, *SMALL, "--out", tmp_path / "out", "--steps", 5)
    assert run(*command, "--save-every", 2)[0] == 0
    runs.newest(tmp_path / "out").unlink()
    assert run(*command, "--resume")[0] == 0
    assert drawn[5:] == drawn[4:5]


# --- nothing is lost ----------------------------------------------------------------------------


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


# --- data and tokenizer -------------------------------------------------------------------------


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


# --- logs ---------------------------------------------------------------------------------------


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


# --- what is said -------------------------------------------------------------------------------


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
