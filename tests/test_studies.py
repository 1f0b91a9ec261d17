"""The studies of benchmarks/studies: what they are made of fits, and a command goes on."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_blocks.recipes.tasks import RecallTask, TextTask

FOLDER = Path(__file__).parents[1] / "benchmarks" / "studies"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """studies.py, study.py and training.py, as the command imports them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import studies
    import study
    import training

    yield studies, study, training
    for name in ("studies", "study", "training", "report"):
        sys.modules.pop(name, None)


def test_every_variant_has_a_model_that_the_task_fits(scripts: Any) -> None:
    studies, _, training = scripts
    for name, one in studies.STUDIES.items():
        for label, variant in one.variants.items():
            config = training.model_config(one, variant)
            if not isinstance(one.task, TextTask):
                assert config.vocab_size >= one.task.vocab_size, (name, label)
            for setting, value in variant.changes.items():
                assert f"{setting}={value!r}" in repr(config), (name, label)


@pytest.mark.parametrize(
    "arguments",
    [
        "maps.py --seeds 0",
        "maps.py --dim -2",
        "maps.py --length 1",
        "study.py switches --threads 0",
        "study.py switches --seeds 0 -1",
    ],
)
def test_counts_are_refused_before_anything_runs(
    scripts: Any, arguments: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, *rest = arguments.split()
    monkeypatch.setattr(sys, "argv", [script, *rest])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert left.value.code == 2
    assert ": expected an int >= " in capsys.readouterr().err


def test_every_script_checks_its_counts() -> None:
    for file in FOLDER.parent.rglob("*.py"):
        if file.name != "two_versions.py":  # it serves versions that have no such check
            assert "type=int" not in file.read_text(), file.name


def test_no_two_variants_of_a_study_are_the_same_model(scripts: Any) -> None:
    studies, _, training = scripts
    for name in set(studies.STUDIES) - {"settings"}:  # there one of each is what it is anyway
        one = studies.STUDIES[name]
        trained = [
            (v.passed, training.model_config(one, v).replace(name="").to_dict())
            for v in one.variants.values()
        ]
        for i, this in enumerate(trained):
            assert this not in trained[:i], (name, list(one.variants)[i])


def test_a_study_trains_tests_goes_on_and_reports(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    studies, study, training = scripts
    small = training.Study(
        what="A small one",
        task=RecallTask(length=24, pairs=2, keys=4),
        size=dataclasses.replace(studies.SMALL, vocab_size=9, dim=8),
        variants={
            "deltanet": training.Variant("deltanet"),
            "omeganet, c = 2": training.Variant("omeganet", {"window": 2}, x=2),
        },
        lengths=(12, 24),
        tests=(48,),
        steps=2,
        batch=4,
        axis="tokens",
        samples=16,
        equal=False,
    )
    monkeypatch.setitem(studies.STUDIES, "small", small)
    command = ["small", "--seeds", "0", "--eager", "--out", str(tmp_path)]
    study.main([*command[:1], "deltanet", *command[1:]])
    record = json.loads((tmp_path / "small.json").read_text())
    assert list(record["cells"]) == ["deltanet / 0"]
    first = record["cells"]["deltanet / 0"]
    assert first["steps"] == 2
    assert first["tests"]["48"]["samples"] == training.MOST
    study.main(command)
    record = json.loads((tmp_path / "small.json").read_text())
    assert list(record["cells"]) == ["deltanet / 0", "omeganet, c = 2 / 0"]
    assert record["cells"]["deltanet / 0"] == first
    assert (tmp_path / "small.png").stat().st_size > 1000
    assert "| deltanet |" in capsys.readouterr().out


def test_states_are_passed_on_late_and_with_the_share_that_is_asked(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is a state in which a row of the step before ended, whatever its batch was."""
    studies, _, training = scripts
    one = training.Study(
        what="",
        task=RecallTask(length=24, pairs=2, keys=4),
        size=dataclasses.replace(studies.SMALL, vocab_size=9, dim=8),
        variants={},
        lengths=(12, 24),
        steps=10,
        batch=4,
        samples=4,
        equal=False,
    )
    seen: list[Any] = []

    def compile_blocks(model: Any) -> Any:
        def run(tokens: Any, *begun: Any) -> Any:
            found = model(tokens, *begun)
            if not begun:  # fresh samples are answered
                return found
            (state,) = begun
            if state is not None:
                assert len(state) == len(tokens)
                ended = seen[-1][1].split()
                for row in state.split():
                    assert any(
                        all(map(torch.equal, row.tensors(), other.tensors())) for other in ended
                    )
            seen.append((state is not None, found.state))
            return found

        return run

    monkeypatch.setattr(training, "compile_blocks", compile_blocks)
    for passed, least, most in ((0.0, 0, 0), (0.5, 1, 5), (1.0, 6, 6)):
        seen.clear()
        training.run_cell(one, training.Variant("deltanet", passed=passed), 0)
        begun = [state for state, _ in seen]
        assert len(begun) == 10
        assert not any(begun[:4])
        assert least <= sum(begun) <= most


def test_the_rows_of_a_step_depend_on_its_seed_alone(scripts: Any) -> None:
    studies, _, training = scripts
    for one in studies.STUDIES.values():
        first, again = (training.drawn(one, one.size, 5) for _ in range(2))
        other = training.drawn(one, one.size, 6)
        assert torch.equal(first[0], again[0])
        assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
        assert (first[1] != -100).any()
