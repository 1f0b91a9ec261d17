"""Ablations: one change each, equal parameters, nothing finished is ever lost."""

import json

import pytest
import torch
import torch.nn.functional as F

from atlas_blocks.recipes import ablation, registry, text
from atlas_blocks.recipes.ablation import BASE, SWITCHES, AblationConfig

SMALL = ("--dim", 8, "--heads", 2, "--depth", 1, "--steps", 2, "--batch", 1, "--length", 24)


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    data = torch.arange(4096).remainder(13).to(torch.uint8)
    monkeypatch.setattr(ablation, "_corpus", lambda: text.Corpus(data, data, "a pattern"))


@pytest.fixture
def ablate(run, tmp_path):
    """ablate("--only", ...) -> exit code, stdout, stderr; writes into tmp_path/out."""
    return lambda *arguments: run("ablate", *SMALL, "--out", tmp_path / "out", *arguments)


def cells(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "ablation.json").read_text())["cells"]


def test_every_switch_changes_one_thing_and_keeps_the_parameters():
    config = AblationConfig()
    base = config.model(BASE)
    for switch in SWITCHES:
        model = config.model(switch)
        count = registry.parameter_count(model)
        assert abs(count - registry.parameter_count(base)) < 0.01 * count, switch
        (block,), (basic,) = model.turn, base.turn
        if isinstance(block, type(basic)):
            ours, atlas = vars(block.mixer), vars(basic.mixer)
            changed = [name for name in atlas if atlas[name] != ours[name]]
            assert len(changed) == (switch != BASE), switch
        else:
            assert block.memory == basic.mixer


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_trains(switch):
    config = AblationConfig(steps=1, batch=1, length=20, dim=8, heads=2, depth=1)
    cell = ablation.train_cell(config, switch, seed=0)
    assert 0 < cell["score"] < 20


def test_cells_depend_on_config_and_seed_alone():
    config = AblationConfig(task="recall", steps=2, batch=2, length=12, pairs=2, dim=8, heads=2)
    losses = [
        ablation.TASKS["recall"].loss(config.model("mag").build(), config, seed, step).item()
        for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))
        if torch.manual_seed(0)
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    first, again = (ablation.train_cell(config, "window-1", 3)["score"] for _ in range(2))
    assert first == again


def test_the_recall_loss_is_of_asked_keys_alone():
    config = AblationConfig(task="recall", batch=2, length=12, pairs=2, dim=8, heads=2, depth=1)
    model = config.model(BASE).build()
    tokens, targets = config.recall().sample(2, torch.Generator().manual_seed(1_000_003))
    picked = [
        F.log_softmax(model(tokens).logits, -1)[b, t, targets[b, t]]
        for b in range(2)
        for t in range(12)
        if targets[b, t] >= 0
    ]
    assert len(picked) == 4
    loss = ablation.TASKS["recall"].loss(model, config, 1, 0)
    torch.testing.assert_close(loss, -torch.stack(picked).mean())


def test_a_run_is_whole_and_a_second_does_nothing(ablate, tmp_path, monkeypatch):
    code, out, _ = ablate("--only", "atlas,window-1", "--seeds", 2)
    assert code == 0
    assert "held-out bits per byte" in out
    assert set(cells(tmp_path)) == {"atlas/0", "atlas/1", "window-1/0", "window-1/1"}
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 1000
    before = cells(tmp_path)
    monkeypatch.setattr(ablation, "train_cell", lambda *_: pytest.fail("trained again"))
    assert ablate("--only", "atlas,window-1", "--seeds", 2)[0] == 0
    assert cells(tmp_path) == before


def test_ctrl_c_loses_the_cell_in_hand_alone(ablate, tmp_path, monkeypatch):
    train, done = ablation.train_cell, []

    def interrupted(config, switch, seed):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((switch, seed))
        return train(config, switch, seed)

    monkeypatch.setattr(ablation, "train_cell", interrupted)
    code, out, _ = ablate("--only", "atlas,mag", "--seeds", 2)
    assert code == 130
    assert "interrupted" in out
    assert set(cells(tmp_path)) == {"atlas/0", "mag/0"}
    before = cells(tmp_path)
    monkeypatch.setattr(ablation, "train_cell", train)
    # It goes on, here with one seed more.
    assert ablate("--only", "atlas,mag", "--seeds", 3)[0] == 0
    after = cells(tmp_path)
    assert len(after) == 6
    assert all(after[key] == cell for key, cell in before.items())


def test_a_cell_that_diverges_is_told(ablate, tmp_path, monkeypatch):
    real = ablation.descend

    def diverge(model, optimizer, loss, *rest):
        return real(model, optimizer, loss * torch.nan, *rest)

    monkeypatch.setattr(ablation, "descend", diverge)
    code, out, _ = ablate("--only", "atlas", "--seeds", 1)
    assert code == 0
    assert "loss nan" in out
    assert "diverged" in cells(tmp_path)["atlas/0"]


def test_differences_are_taken_seed_by_seed():
    config = AblationConfig(seeds=3, switches=(BASE, "mag"))
    scores = {"atlas/0": 1.0, "atlas/1": 2.0, "mag/0": 1.5, "mag/1": 2.25, "mag/2": 9.0}
    cells = {key: {"score": score, "seconds": 1.0} for key, score in scores.items()}
    cells["atlas/2"] = {"diverged": "step 1: loss nan"}
    assert ablation.against_base(config, cells, "mag") == [0.5, 0.25]
    assert ablation.against_base(config, cells, BASE) == [0.0, 0.0]


def test_another_config_is_refused(ablate, tmp_path):
    assert ablate("--only", "atlas", "--seeds", 1)[0] == 0
    code, _, err = ablate("--only", "atlas", "--seeds", 1, "--lr", 1e-3)
    assert code == 2
    assert "another config" in err
    file = tmp_path / "out" / "ablation.json"
    whole = file.read_bytes()
    odd = json.dumps(json.loads(whole) | {"cells": {"atlas/0": {"score": "1"}}})
    for content in (whole[: len(whole) // 2], b"\xff\xfe", b"[]", b"{}", odd.encode()):
        file.write_bytes(content)
        code, _, err = ablate("--only", "atlas")
        assert code == 2
        assert len(err.splitlines()) == 1
        assert str(file) in err
        assert file.read_bytes() == content


@pytest.mark.parametrize(
    "arguments",
    [
        ("--task", "chess"),
        ("--only", "mag"),  # nothing to compare with
        ("--only", "atlas,no-attention"),
        ("--seeds", 0),
        ("--steps", 0),
        ("--heads", 3),
        ("--task", "recall", "--pairs", 30),
    ],
)
def test_bad_input_gets_one_line(ablate, tmp_path, arguments):
    code, _, err = ablate(*arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
