"""A run in parts is the run, and nothing else goes on as it."""

import pytest
import torch
from train_command import NAME, SMALL, flat, load, same

from atlas_blocks.recipes import build, runs, training
from atlas_blocks.recipes.data import Packed, Shards
from atlas_blocks.recipes.training import TrainingConfig, TrainingState, make_optimizer


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
