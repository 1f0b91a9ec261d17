"""Maps to learn online: what depends on what, and of which size and rank it is."""

import pytest
import torch

from atlas_blocks.recipes.tasks import MapTask
from atlas_blocks.recipes.tasks.maps import KINDS, error


def drawn(seed: int = 0, batch: int = 3, **settings: object):
    return MapTask(**settings).sample(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_shapes_and_seeds(kind: str) -> None:
    inputs, outputs = drawn(kind=kind, length=200, dim=32, window=8)
    assert inputs.shape == outputs.shape == (3, 200, 32)
    for x in (inputs, outputs):
        torch.testing.assert_close(x.square().sum(-1).mean(-1), torch.ones(3))
    again = drawn(kind=kind, length=200, dim=32, window=8)
    assert torch.equal(again[0], inputs)
    assert torch.equal(again[1], outputs)
    other = drawn(1, kind=kind, length=200, dim=32, window=8)
    assert not torch.equal(other[1], outputs)


def test_low_rank_is_linear_of_that_rank_and_least_squares_solves_it() -> None:
    inputs, outputs = drawn(kind="low-rank", length=100, dim=24, rank=5)
    solution = torch.linalg.lstsq(inputs.double(), outputs.double()).solution
    assert error(inputs.double() @ solution, outputs.double()).max() < 1e-9
    assert torch.linalg.matrix_rank(outputs, rtol=1e-4).tolist() == [5, 5, 5]
    # Every row has a map of its own.
    swapped = inputs.double() @ solution[[1, 2, 0]]
    assert error(swapped, outputs.double()).mean() > 0.5


@pytest.mark.parametrize("kind", ["mlp", "attention-input"])
def test_of_these_an_output_is_a_smooth_map_of_its_input_alone_and_no_linear_one(kind: str) -> None:
    task = MapTask(kind=kind, length=400, dim=4, hidden=2)
    inputs, outputs = task.sample(1, torch.Generator().manual_seed(0))
    solution = torch.linalg.lstsq(inputs[0], outputs[0]).solution
    assert error(inputs[0] @ solution, outputs[0]).median() > 1e-3
    # The nearest input's output is near: an answer that what came before does not change.
    apart = torch.cdist(inputs[0], inputs[0]).fill_diagonal_(torch.inf)
    near, number = apart.min(1)
    close = near < near.quantile(0.1)
    other = outputs[0].roll(7, 0)
    found = error(outputs[0][number[close]], outputs[0][close]).median()
    assert found < 0.2 * error(other[close], outputs[0][close]).median()


def test_of_attention_the_inputs_before_decide_too_and_of_a_window_the_last_alone() -> None:
    """Equal inputs but for the first: an output changes exactly where it can see it."""

    def changed(kind: str) -> list[bool]:
        task = MapTask(kind=kind, length=8, dim=16, window=3)
        inputs, draws = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1)), []

        def draw(*shape: int) -> torch.Tensor:
            draws.append(torch.Generator().manual_seed(len(draws)))
            return torch.randn(1, *shape, generator=draws[-1]) / shape[-1] ** 0.5

        _, before = KINDS[kind](task, inputs, draw)
        draws.clear()
        inputs = inputs.clone()
        inputs[:, 0] += 1
        _, after = KINDS[kind](task, inputs, draw)
        return ((before - after).abs().amax(-1)[0] > 1e-6).tolist()

    assert changed("attention") == [True] * 8
    assert changed("window") == [True] * 3 + [False] * 5
    assert changed("mlp") == changed("low-rank") == [True] + [False] * 7


def test_refuses_what_is_out_of_range() -> None:
    with pytest.raises(ValueError, match="kind"):
        MapTask(kind="cubic")
    with pytest.raises(ValueError, match="rank: expected at most dim = 8, got 9"):
        MapTask(kind="low-rank", dim=8, rank=9)
    with pytest.raises(ValueError, match="length"):
        MapTask(length=0)
    assert [task.kind for task in MapTask().curriculum()] == list(KINDS)
    _, outputs = drawn(length=16, dim=8, rank=2)
    assert (error(torch.zeros_like(outputs), outputs) == MapTask().chance).all()
