"""A text to train on, and a run that is over."""

import pytest
from train_command import NAME, SMALL

from atlas_blocks.recipes import training


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


@pytest.fixture
def started(run, tmp_path, data):
    """A run of four steps, finished: (out, its command)."""
    out = tmp_path / "run"
    command = ("train", NAME, "--data", data, "--out", out, *SMALL)
    assert run(*command, "--steps", 4)[0] == 0
    return out, command
