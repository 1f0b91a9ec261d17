"""States: mapped, moved, sliced, joined, saved; what is not a state is refused by name."""

import io
from dataclasses import dataclass

import pytest
import torch
from helpers import DIM, draw, make_block

from atlas_blocks import State


@dataclass(frozen=True)
class Leaf(State):
    values: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class Tree(State):
    first: Leaf
    many: tuple[State, ...]
    weights: tuple[torch.Tensor, ...]
    absent: Leaf | None


def leaf(*numbers: float) -> Leaf:
    return Leaf(torch.tensor(numbers), torch.arange(len(numbers)))


def tree(*numbers: float) -> Tree:
    return Tree(
        leaf(*numbers), (leaf(*numbers), leaf(*numbers)), (torch.tensor(numbers),) * 2, None
    )


def same(a: State, b: State) -> bool:
    pairs = list(zip(a.tensors(), b.tensors(), strict=True))
    return type(a) is type(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_map_reaches_every_tensor_once_and_keeps_the_structure() -> None:
    state = tree(1.0, 2.0)
    doubled = state.map(lambda t: 2 * t)
    assert len(state.tensors()) == 8
    assert doubled.first.values.tolist() == [2.0, 4.0]
    assert doubled.many[1].position.tolist() == [0, 2]
    assert doubled.weights[1].tolist() == [2.0, 4.0]
    assert doubled.absent is None
    assert state.nbytes == 3 * (2 * 4 + 2 * 8) + 2 * 2 * 4


def test_detach_cuts_every_tensor() -> None:
    state = tree(1.0, 2.0).map(lambda t: t.requires_grad_() * 2 if t.is_floating_point() else t)
    assert any(t.requires_grad for t in state.tensors())
    assert not any(t.requires_grad for t in state.detach().tensors())


def test_rows_are_chosen_by_slice_list_or_tensor() -> None:
    state = tree(1.0, 2.0, 3.0)
    assert same(state[1:], tree(1.0, 2.0, 3.0).map(lambda t: t[1:]))
    assert state[[2, 0, 2]].many[0].values.tolist() == [3.0, 1.0, 3.0]
    assert state[torch.tensor([1])].weights[0].tolist() == [2.0]
    assert state[[]].first.values.shape == (0,)


def test_cat_joins_what_slicing_parted() -> None:
    state = tree(1.0, 2.0, 3.0)
    assert same(State.cat([state[:1], state[1:]]), state)
    with pytest.raises(ValueError, match="states: expected at least one state, got none"):
        State.cat([])


def test_positions_stay_on_the_cpu_when_a_state_moves() -> None:
    moved = tree(1.0, 2.0).to("meta")
    assert moved.first.values.is_meta
    assert moved.first.position.device.type == "cpu"


def test_a_dict_round_trip_is_exact_and_safe_to_load() -> None:
    state = tree(1.0, 2.0)
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    assert same(State.from_dict(torch.load(file, weights_only=True)), state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, 'state: expected a dict with a "type", got int'),
        ({"values": 1}, 'state: expected a dict with a "type", got dict'),
        ({"type": "Nothing"}, "state type: expected one of .*, got 'Nothing'"),
        (
            {"type": "Leaf", "values": 1},
            r"Leaf: expected the fields \['position', 'values'\], got \['type', 'values'\]",
        ),
        (
            {"type": "Leaf", "values": 1, "position": 2, "more": 3},
            r"Leaf: expected the fields \['position', 'values'\], got .*more",
        ),
    ],
)
def test_a_dict_that_is_no_state_is_named(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        State.from_dict(data)


def test_a_state_of_the_layer_continues_in_another_process_form() -> None:
    """Half a sequence here, the dict through bytes, the rest there: the same memory."""
    block, x = make_block("memory-mlp-gd-sketch"), draw(2, 30, DIM)
    whole = block(x)[1]
    file = io.BytesIO()
    torch.save(block(x[:, :17])[1].to_dict(), file)
    file.seek(0)
    state = State.from_dict(torch.load(file, weights_only=True))
    _, end = make_block("memory-mlp-gd-sketch")(x[:, 17:], state)
    for a, b in zip(end.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(a, b)
