"""The capacity laboratory finds what can be proved, and each of its means does what it says."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import draw

from atlas_blocks.recipes import capacity
from atlas_blocks.recipes.capacity import EXACT, CapacityConfig, Store


def errors(config: CapacityConfig, store: Store, count: int) -> list[float]:
    keys, values = capacity.pairs(config, count, config.seeds)
    return [capacity.closed_form(store, k, v) for k, v in zip(keys, values, strict=True)]


@pytest.mark.parametrize(("degree", "pairs"), [(0, 4), (1, 5), (2, 15), (3, 35)])
def test_propositions_1_and_2(degree, pairs):
    """A matrix memory stores C(Dk + p, p) pairs exactly, Dk without features, and no more."""
    config, store = CapacityConfig(dim=4), Store("matrix", degree, 4, 4)
    assert store.proposed(unit_keys=False) == pairs
    assert max(errors(config, store, pairs)) < EXACT
    assert min(errors(config, store, pairs + 1)) > 0.1


@pytest.mark.parametrize(("degree", "pairs"), [(0, 4), (1, 5), (2, 14), (3, 30)])
def test_keys_of_unit_length_store_fewer(degree, pairs):
    config, store = CapacityConfig(dim=4, unit_keys=True), Store("matrix", degree, 4, 4)
    assert store.proposed(unit_keys=True) == pairs
    assert max(errors(config, store, pairs)) < EXACT
    assert min(errors(config, store, pairs + 1)) > 0.1


def test_descent_stores_what_the_closed_form_stores():
    config, store = CapacityConfig(dim=3, seeds=1), Store("matrix", 2, 3, 4)
    for count, learnt in ((10, True), (11, False)):
        keys, values = (x[0] for x in capacity.pairs(config, count, 1))
        error = capacity.descent(store, keys, values, iterations=200)
        assert (error <= capacity.LEARNT) == learnt


def test_a_deep_memory_learns_more_than_a_matrix():
    config = CapacityConfig(dim=3, seeds=1)
    keys, values = (x[0] for x in capacity.pairs(config, 5, 1))
    store = Store("mlp", 0, 3, 4)
    assert capacity.descent(store, keys, values, iterations=200) <= capacity.LEARNT
    assert capacity.closed_form(Store("matrix", 0, 3, 4), keys, values) > 0.1


@pytest.mark.parametrize("rule", ["Hebbian (dot)", "delta rule"])
def test_one_pass_recalls_orthonormal_keys(rule):
    keys = torch.eye(5, dtype=torch.float64)[None]
    values = draw(1, 5, 5)
    found = capacity.one_pass(Store("matrix", 0, 5, 4), keys, values, rule)
    assert found == [1, 2, 3, 4, 5]


def test_one_pass_is_the_recurrence_written_out():
    keys, values = F.normalize(draw(1, 6, 3), dim=-1), draw(1, 6, 3, seed=2)
    found = capacity.one_pass(Store("matrix", 0, 3, 4), keys, values, "delta rule")
    by_strength = []
    for eta in capacity.STRENGTHS:
        m, counts = torch.zeros(3, 3).double(), []
        for n in range(6):
            m = m + eta * torch.outer(values[0, n] - m @ keys[0, n], keys[0, n])
            read = keys[0, : n + 1] @ m.T
            nearest = torch.cdist(read, values[0, : n + 1]).argmin(-1)
            counts.append(float((nearest == torch.arange(n + 1)).sum()))
        by_strength.append(counts)
    assert found == max(by_strength, key=sum)


@pytest.mark.parametrize("true", [0, 1, 6, 7, 40])
@pytest.mark.parametrize("guess", [1, 7, 100])
def test_bisection(true, guess):
    assert capacity.largest(lambda n: n <= true, guess) == true


def test_more_pairs_only_add_to_fewer():
    config = CapacityConfig()
    few, many = capacity.pairs(config, 3, 2), capacity.pairs(config, 9, 2)
    assert all(torch.equal(a, b[:, :3]) for a, b in zip(few, many, strict=True))


def test_a_run_writes_its_table_figures_and_plot(run, tmp_path, monkeypatch):
    out, every = tmp_path / "out", capacity.stores
    monkeypatch.setattr(capacity, "stores", lambda config: every(config)[:4])
    options = ("--dim", 2, "--degrees", "1,2", "--seeds", 1, "--longest", 4, "--iterations", 50)
    code, printed, _ = run("capacity", *options, "--out", out)
    assert code == 0
    assert "matrix, degree 2" in printed
    found = json.loads((out / "capacity.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["matrix, identity"]["stored"] == 2
    assert rows["matrix, degree 2"]["stored"] == rows["matrix, degree 2"]["proposed"] == 6
    assert rows["mlp, identity"]["learnt"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert (out / "capacity.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments", [("--dim", 0), ("--degrees", "0"), ("--degrees", "x"), ("--seeds", -1)]
)
def test_bad_input_gets_one_line(run, tmp_path, arguments):
    code, _, err = run("capacity", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
