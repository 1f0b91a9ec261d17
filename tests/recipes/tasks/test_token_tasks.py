"""Tasks over tokens: solved by construction, and drawn as their benchmarks draw them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from atlas_blocks.recipes import tasks
from atlas_blocks.recipes.tasks import (
    IGNORE,
    MADCompression,
    MADCopy,
    MADFuzzy,
    MADMemorization,
    MADRecall,
    MQARTask,
    OverwriteTask,
    RecallTask,
)

NAMES = [name for name, task in tasks.TASKS.items() if isinstance(task, tasks.TokenTask)]


def draw(task, batch, seed=0):
    return task.sample(batch, torch.Generator().manual_seed(seed))


def looked_up(tokens, targets):
    """What a dictionary answers that is told every token and what came after it."""
    answers = torch.full_like(targets, -1)
    for row, line in enumerate(tokens.tolist()):
        after = {}
        for place, token in enumerate(line):
            if targets[row, place] != IGNORE:
                answers[row, place] = after[token]
            if place + 1 < len(line):
                after.setdefault(token, line[place + 1])
    return answers


def right(answers, targets):
    asked = targets != IGNORE
    return bool(asked.any()) and bool((answers == targets)[asked].all())


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_of_the_seed_and_within_the_vocabulary(name):
    task = tasks.TASKS[name]
    tokens, targets = draw(task, 5)
    again, others = draw(task, 5), draw(task, 5, seed=1)
    assert torch.equal(tokens, again[0])
    assert torch.equal(targets, again[1])
    assert not torch.equal(tokens, others[0])
    assert tokens.shape == targets.shape
    assert tokens.dtype == targets.dtype == torch.int64
    assert task.length - tokens.shape[1] in (0, 1)
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    asked = targets[targets != IGNORE]
    assert 0 <= asked.min() <= asked.max() < task.vocab_size
    assert 0 < task.chance < 1
    easy = task.curriculum()[0]
    assert all(draw(step, 2)[0].max() < task.vocab_size for step in task.curriculum())
    assert type(easy) is type(task)


def test_mqar_is_solved_by_a_dictionary_and_has_zoologys_places():
    task = MQARTask(length=64, pairs=8, vocab_size=512, random_filler=False)
    tokens, targets = draw(task, 4000)
    keys, values = tokens[:, :16:2], tokens[:, 1:16:2]
    assert right(looked_up(tokens[:50], targets[:50]), targets[:50])
    # Keys and values: their ranges, each once in a sample, all as likely.
    for part, low, high in ((keys, 1, 255), (values, 256, 511)):
        assert (part.min(), part.max()) == (low, high)
        assert all(len(set(row)) == 8 for row in part.tolist())
        share = part.unique(return_counts=True)[1] / part.numel() * (high - low + 1)
        assert share.min() > 0.5
        assert share.max() < 1.6
    # One query of every pair, at even places after the pairs, the rest filler.
    asked = targets != IGNORE
    assert (asked.sum(1) == 8).all()
    places = asked.nonzero()[:, 1]
    assert (places % 2 == 0).all()
    assert places.min() == 16
    assert (tokens[:, 16:] != 0).sum() == asked.sum()
    # By numpy's own drawing without replacement, which zoology calls.
    rng = np.random.default_rng(0)
    p = np.arange(1, 25) ** (0.01 - 1)
    drawn = [rng.choice(24, 8, replace=False, p=p / p.sum()) for _ in range(4000)]
    expected = np.bincount(np.concatenate(drawn), minlength=24) / 4000
    found = asked[:, 16::2].float().mean(0).numpy()
    assert np.abs(found - expected).max() < 5 * math.sqrt(0.5 / 4000)
    # Key 1 is drawn first, and its place is the earliest more often.
    first = (tokens[:, 16:] == keys[:, :1]).int().argmax(1) // 2
    expected = np.bincount([d[0] for d in drawn], minlength=24) / 4000
    found = np.bincount(first.numpy(), minlength=24) / 4000
    assert np.abs(found - expected).max() < 5 * math.sqrt(0.5 / 4000)


def test_mqar_filler_is_any_token_and_the_labels_stay():
    task = MQARTask(length=64, pairs=4, vocab_size=128)
    tokens, targets = draw(task, 2000)
    asked = targets != IGNORE
    assert asked.sum() == 4 * 2000
    rest = tokens[:, 8:][~asked[:, 8:]]
    counts = rest.bincount(minlength=128) / len(rest) * 128
    assert counts.min() > 0.85
    assert counts.max() < 1.15
    keys, values = tokens[:, :8:2], tokens[:, 1:8:2]
    match = tokens[:, :, None] == keys[:, None]
    answers = (values[:, None] * match).sum(-1)
    assert right(answers, targets)


def test_mqars_protocol_is_zoologys():
    task = MQARTask()
    sizes = [(t.length, t.pairs) for t in task.curriculum()]
    assert sizes == [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
    assert (task.tests()[-1].length, task.tests()[-1].pairs) == (1024, 256)
    for wrong in ({"length": 63}, {"length": 14}, {"vocab_size": 200}, {"power": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(task, **wrong)


@pytest.mark.parametrize("name", ["mad-recall", "mad-noisy"])
def test_mads_recall(name):
    task = tasks.TASKS[name]
    tokens, targets = draw(task, 400)
    half = (task.vocab_size - task.noise_vocab) // 2
    noise = 2 * half
    answers, probes = torch.full_like(targets, -1), 0
    pairs = meant = 0
    for row, line in enumerate(tokens.tolist()):
        known = {}
        for place in range(0, len(line) - 1, 2):
            pairs += 1
            key, value = line[place : place + 2]
            assert (key >= noise) == (value >= noise)
            if key >= noise:
                assert targets[row, place] == IGNORE
                continue
            meant += 1
            assert key < half <= value < noise
            # Every repeat is asked for, at its key, and nothing else.
            assert (targets[row, place] != IGNORE) == (key in known)
            assert known.setdefault(key, value) == value
            answers[row, place] = known[key]
        answers[row, -1] = known[line[-1]]
        assert (targets[row, 1::2] == IGNORE).all()
        probes += int(targets[row, -1] != IGNORE)
    assert probes == 400
    assert right(answers, targets)
    # 63 pairs but for the last, all but one of which are noise with that probability.
    assert abs(meant / pairs - (1 - task.noise * 62 / 63)) < 0.015
    # Values are drawn evenly, so that a guess is right in one of them.
    asked = targets[targets != IGNORE]
    assert (asked.bincount(minlength=noise)[half:] / len(asked) - task.chance).abs().max() < 0.03


def test_mads_training_targets_are_the_next_tokens():
    for name in ("mad-recall", "mad-noisy", "mad-fuzzy"):
        tokens, targets = draw(dataclasses.replace(tasks.TASKS[name], training=True), 3)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_mads_fuzzy_recall():
    task = MADFuzzy()
    tokens, targets = draw(task, 300)
    sizes = []
    for line, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        # A reader that knows the kinds: three tokens below 7 are a key, those from 7 on its value.
        line = [t for t in line if t != 15]
        wanted = wanted[len(wanted) - len(line) :]
        known, place = {}, 0
        while place < len(line):
            key = tuple(line[place : place + 3])
            assert len(set(key)) == 3
            assert max(key) < 7
            place += 3
            if key in known:
                # Each token of its value, one before where it stands.
                asked = wanted[place - 1 : place - 1 + len(known[key])]
                assert asked == list(known[key])
                place += len(known[key])
                continue
            end = place
            while end < len(line) and line[end] >= 7:
                assert wanted[end - 1] == IGNORE
                end += 1
            known[key] = tuple(line[place:end])
            assert len(set(known[key])) == len(known[key])
            sizes.append(len(known[key]))
            place = end
        assert place >= len(line)
        assert wanted[-1] != IGNORE
    assert [round(sizes.count(n) / len(sizes), 1) for n in (1, 2, 3)] == [0.3, 0.3, 0.3]


def test_mads_copying():
    task = MADCopy()
    tokens, targets = draw(task, 2000)
    assert (tokens[:, 239] == 15).all()
    assert (tokens[:, 240:] == 14).all()
    assert (targets[:, :240] == IGNORE).all()
    front = tokens[:, :239]
    copied = front[front != 14].reshape(2000, 16)
    assert torch.equal(copied, targets[:, 240:])
    # Never a blank after the last token; before each as many on average.
    places = (front != 14).nonzero()[:, 1].reshape(2000, 16)
    assert (places[:, -1] == 238).all()
    gaps = torch.diff(places, dim=1, prepend=torch.full((2000, 1), -1)) - 1
    assert (gaps.float().mean(0) - 223 / 16).abs().max() < 0.5
    assert (copied.flatten().bincount() / copied.numel() - task.chance).abs().max() < 0.01


def test_mads_compression_and_memorization():
    tokens, targets = draw(MADCompression(), 50)
    assert torch.equal(tokens, targets)
    assert (tokens[:, -1] == 15).all()
    assert tokens[:, :-1].max() == 14
    task = MADMemorization()
    tokens, targets = draw(task, 50)
    assert (tokens[:, 1::2] == 255).all()
    assert (targets[:, ::2] == IGNORE).all()
    values = task.values()
    assert len(values) == len(values.unique()) == 127
    assert set(values.tolist()) < set(range(127, 255))
    # One map, of all sequences and seeds.
    pairs = set()
    for inputs, wanted in ((tokens, targets), draw(task, 50, seed=9)):
        both = torch.stack([inputs[:, ::2], wanted[:, 1::2]], -1).flatten(0, 1)
        pairs |= {tuple(pair) for pair in both.tolist()}
    assert len({k for k, _ in pairs}) == len(pairs)


def test_mads_difficulties_are_those_of_its_table():
    sizes = [len(tasks.TASKS[f"mad-{n}"].settings()) for n in ("recall", "noisy", "fuzzy", "copy")]
    assert sizes == [7, 10, 7, 9]
    assert [t.vocab_size for t in tasks.TASKS["mad-noisy"].settings()[1:4]] == [48, 80, 144]
    assert len(MADCompression().settings()) == 7
    assert len(MADMemorization().settings()) == 6


def test_macro_accuracy_is_torchmetrics_own():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (4, 30), generator=generator)
    answers = torch.where(torch.rand(4, 30, generator=generator) < 0.5, targets, 6)
    targets[:, ::3] = IGNORE
    shares, asked = [], targets != IGNORE
    for c in range(8):
        true = ((targets == c) & asked & (answers == c)).sum()
        held = ((targets == c) & asked).sum()
        named = ((answers == c) & asked).sum()
        if held + named:
            shares.append(float(true / held) if held else 0.0)
    assert tasks.macro_accuracy(answers, targets) == pytest.approx(sum(shares) / len(shares))


def test_chance_of_recall_is_that_of_naming_a_shown_value():
    task = RecallTask(length=24, pairs=4, keys=6)
    tokens, targets = draw(task, 4000)
    shown = tokens[:, 1:8:2]
    asked = targets[targets != IGNORE].reshape(4000, 4)
    share = (shown[:, None, :] == asked[:, :, None]).float().mean()
    assert share == pytest.approx(task.chance, abs=0.01)


def test_a_task_is_named_with_its_settings():
    assert tasks.task("mqar", length=512, pairs=8).pairs == 8
    assert tasks.task("overwrite", length=116).writes == 50
    for settings, words in (
        ({"name": "magic"}, "task: expected one of"),
        ({"name": "mqar", "bairs": 3}, "setting: expected one of"),
        ({"name": "mqar", "pairs": "many"}, "pairs: expected int"),
        ({"name": "overwrite", "length": 15}, "length: expected 16 queries"),
    ):
        with pytest.raises(ValueError, match=words):
            tasks.task(**settings)
    assert isinstance(tasks.task("overwrite", length=18), OverwriteTask)
    assert isinstance(tasks.task("mad-noisy"), MADRecall)


def test_wilsons_interval_and_what_answers_are_worth():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert tasks.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert tasks.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert tasks.wilson(20, 20)[1] == 1
    with pytest.raises(ValueError, match="right"):
        tasks.wilson(3, 2)
    # Samples that are right or wrong as a whole are worth one answer each.
    assert tasks.effective([8, 0] * 50, [8] * 100) == pytest.approx(100, rel=0.02)
    # Answers that do not depend on one another count nearly all.
    torch.manual_seed(0)
    rights = (torch.rand(500, 8) < 0.6).sum(1).tolist()
    assert tasks.effective(rights, [8] * 500) > 3000
    assert tasks.effective([8] * 5, [8] * 5) == 5
