"""The tasks are what they say, the models are of one size, Dot learns what attention does not."""

import json

import pytest
import torch
from rich.console import Console

from atlas_blocks.recipes import separation
from atlas_blocks.recipes.registry import parameter_count
from atlas_blocks.recipes.tasks import IGNORE, OverwriteTask, ParityTask


def test_the_newest_value_of_a_key_is_the_answer() -> None:
    task = OverwriteTask(writes=9, queries=5, keys=3, values=7)
    tokens, targets = task.sample(50, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (50, task.length)
    assert int(tokens.max()) < task.vocab_size
    rewritten = 0
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        memory: dict[int, int] = {}
        for key, value in zip(row[:18:2], row[1:18:2], strict=True):
            assert 1 <= key <= 3 < value <= 10
            rewritten += key in memory and memory[key] != value
            memory[key] = value
        assert answers[:18] == 18 * [IGNORE]
        assert answers[18:] == [memory[key] for key in row[18:]]
    assert rewritten > 100


def test_parities_are_those_of_all_bits_so_far() -> None:
    tokens, targets = ParityTask(length=20).sample(30, torch.Generator().manual_seed(0))
    assert tokens[:, 0].tolist() == 30 * [2]
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert answers[0] == IGNORE
        assert answers[1:] == [sum(row[1 : t + 1]) % 2 for t in range(1, 20)]


def test_all_models_have_one_size() -> None:
    sizes = [
        parameter_count(separation.model_config(name, OverwriteTask(), 2))
        for name in separation.MIXERS
    ]
    assert max(sizes) < 1.02 * min(sizes)


def test_a_run_is_saved_and_repeats(tmp_path) -> None:
    task = OverwriteTask(writes=3, queries=2)
    options = {"task": task, "depth": 1, "steps": 2, "seeds": 2}
    found = [
        separation.run(Console(quiet=True), out=tmp_path / f"{i}.json", **options) for i in range(2)
    ]
    assert found[0] == found[1]
    saved = json.loads((tmp_path / "0.json").read_text())
    assert saved["accuracy"] == found[0]
    assert saved["complete"]
    assert saved["versions"]["torch"] == torch.__version__


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch) -> None:
    options = {"task": OverwriteTask(writes=3, queries=2), "depth": 1, "steps": 2}
    whole = separation.run(Console(quiet=True), out=tmp_path / "whole.json", seeds=2, **options)
    trained = []

    def counted(config, task, steps, seed):
        trained.append((config.name, seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return whole[config.name][seed]

    monkeypatch.setattr(separation, "train", counted)
    out = tmp_path / "separation.json"
    with pytest.raises(KeyboardInterrupt):
        separation.run(Console(quiet=True), out=out, seeds=2, **options)
    assert separation.run(Console(quiet=True), out=out, seeds=2, **options) == whole
    assert len(trained) == 1 + len(separation.MIXERS) * 2
    with pytest.raises(ValueError, match="of another run"):
        separation.run(Console(quiet=True), out=out, seeds=2, **{**options, "steps": 3})
    for content in (b"{}", b'{"accuracy": {"dot": ["1"]}}', b"[]", b"{", b"\xff"):
        out.write_bytes(content)
        with pytest.raises(ValueError, match=f"out: .*{out.name}"):
            separation.run(Console(quiet=True), out=out, seeds=2, **options)
        assert out.read_bytes() == content


@pytest.mark.slow
def test_dot_learns_what_a_transformer_does_not() -> None:
    task = ParityTask()
    scores = {
        name: separation.train(separation.model_config(name, task, 2), task, 500, seed=1)
        for name in ("transformer", "dot")
    }
    assert scores["dot"] > 0.99
    assert scores["transformer"] < 0.7
