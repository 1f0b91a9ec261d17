"""Text and tasks: what the models learn from."""

import pytest
import torch

from atlas_blocks.recipes import tasks, text


def test_standard_library_is_text_split_by_file():
    corpus = text.standard_library()
    assert len(corpus.train) > 10 * len(corpus.held_out) > 100_000
    assert b"import" in bytes(corpus.held_out[:100_000].tolist())
    again = text.standard_library()
    assert torch.equal(corpus.held_out, again.held_out)


def test_batches_are_crops_and_depend_on_seed_and_step_alone():
    data = torch.arange(200, dtype=torch.uint8)
    batch = text.random_batch(data, 5, 16, seed=3, step=4)
    assert batch.shape == (5, 17)
    assert (batch.diff(dim=1) == 1).all()
    assert torch.equal(batch, text.random_batch(data, 5, 16, seed=3, step=4))
    assert not torch.equal(batch, text.random_batch(data, 5, 16, seed=3, step=5))
    with pytest.raises(ValueError, match="at least 201 bytes"):
        text.random_batch(data, 1, 200, 0, 0)


def test_printed_text_cannot_steer_a_terminal():
    assert text.printable(b"a\x1b[2J\n\xc3\xa9\xff\x00") == "a\ufffd[2J\né\ufffd\ufffd"


def test_windows_predict_every_byte_once():
    data = torch.arange(100, dtype=torch.uint8)
    rows = torch.cat(list(text.windows(data, 2, 16, limit=1000)))
    assert rows[:, 1:].flatten().tolist() == list(range(1, 97))


@pytest.mark.parametrize("task", [tasks.RecallTask(), tasks.RecallTask(24, 8, 8)])
def test_recall_asks_for_what_was_shown(task):
    tokens, targets = task.sample(50, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (50, task.length)
    assert tokens.max() < task.vocab_size
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        keys, values = row[: 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2]
        assert len(set(keys)) == task.pairs
        assert set(keys) <= set(range(1, 1 + task.keys))
        assert set(values) <= set(range(1 + task.keys, task.vocab_size))
        shown = dict(zip(keys, values, strict=True))
        asked = [i for i, t in enumerate(wanted) if t != tasks.IGNORE]
        assert sorted(row[i] for i in asked) == sorted(keys)
        assert min(asked) >= 2 * task.pairs
        assert all(wanted[i] == shown[row[i]] for i in asked)
        rest = set(range(2 * task.pairs, task.length)) - set(asked)
        assert all(row[i] == tasks.FILLER for i in rest)


def test_recall_checks_its_sizes():
    with pytest.raises(ValueError, match="length"):
        tasks.RecallTask(length=20, pairs=8)


def test_accuracy_counts_asked_places_alone():
    targets = torch.tensor([[tasks.IGNORE, 1, 2]])
    logits = torch.eye(3)[torch.tensor([[0, 1, 1]])]
    assert tasks.accuracy(logits, targets) == 0.5
