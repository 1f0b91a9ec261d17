"""States: mapped, moved, sliced, joined, saved; what is not a state is refused by name."""

import io
import os
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import DIM, draw, make_block
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from atlas_blocks import State
from atlas_blocks.functional import OmegaState


class Leaf(State):
    values: torch.Tensor
    position: torch.Tensor


class Tree(State):
    first: Leaf
    many: tuple[State, ...]
    weights: tuple[torch.Tensor, ...]
    absent: Leaf | None


class Exact(State):
    EXACT = ("memory",)

    memory: tuple[torch.Tensor, ...]
    cache: torch.Tensor


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


def test_a_state_is_immutable_replaced_in_part_copied_and_pickled() -> None:
    state = leaf(1.0, 2.0)
    with pytest.raises(AttributeError):
        state.values = torch.zeros(2)  # type: ignore[misc]
    changed = state.replace(values=torch.zeros(2))
    assert (changed.values.tolist(), state.values.tolist()) == ([0.0, 0.0], [1.0, 2.0])
    assert changed.position is state.position
    with pytest.raises(TypeError, match="nothing"):
        state.replace(nothing=1)
    assert same(pickle.loads(pickle.dumps(tree(1.0, 2.0))), tree(1.0, 2.0))
    with pytest.raises(TypeError, match="More: a state with fields is not subclassed"):

        class More(Leaf):
            more: torch.Tensor


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


KEEP = [True, False, True]


@pytest.mark.parametrize(
    "index",
    [KEEP, torch.tensor(KEEP), np.array(KEEP), np.array([0, 2]), [0, -1], [-3, 2],
     torch.tensor([0, -1]), torch.tensor([0, 2], dtype=torch.int32), slice(None, None, 2),
     range(0, 3, 2), ~torch.tensor([False, True, False])],
    ids=repr,
)  # fmt: skip
def test_masks_and_numbers_from_the_end_choose_what_torch_would(index: object) -> None:
    chosen = tree(1.0, 2.0, 3.0)[index]
    assert chosen.first.values.tolist() == chosen.weights[1].tolist() == [1.0, 3.0]
    assert chosen.many[0].position.tolist() == [0, 2]


def test_one_number_keeps_a_batch_of_one() -> None:
    assert tree(1.0, 2.0, 3.0)[-1].first.values.tolist() == [3.0]


@pytest.mark.parametrize(
    ("index", "got"),
    [
        (3, r"rows from -3 to 2, got 3"),
        ([0, -4], r"rows from -3 to 2, got -4"),
        (torch.tensor([0, 3]), r"rows from -3 to 2, got 3"),
        ([True, False], r"a mask of bool \[3\], got bool \[2\]"),
        ([[0, 1]], r"row numbers, got shape \[1, 2\]"),
        (torch.tensor(1), r"row numbers, got shape \[\]"),
        ([0.0, 1.0], "row numbers, got torch.float32"),
        (torch.tensor([1, 0, 1], dtype=torch.uint8), "row numbers, got torch.uint8"),
        (True, "row numbers, got True"),
        (None, "row numbers, got None"),
        (..., "row numbers, got Ellipsis"),
        ((0, 1), r"row numbers, got \(0, 1\)"),
        ("ab", "row numbers, got 'ab'"),
        (["a"], r"row numbers, got \['a'\]"),
    ],
    ids=repr,
)
def test_any_other_index_is_refused_by_name(index: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"index: expected .*{got}"):
        tree(1.0, 2.0, 3.0)[index]
    with pytest.raises(TypeError):
        iter(tree(1.0))


def test_cat_joins_what_slicing_parted() -> None:
    state = tree(1.0, 2.0, 3.0)
    assert same(State.cat([state[:1], state[1:]]), state)
    with pytest.raises(ValueError, match="states: expected at least one state, got none"):
        State.cat([])


def test_split_parts_what_cat_joins() -> None:
    state = tree(1.0, 2.0, 3.0)
    for sizes, lengths in ((1, [1, 1, 1]), (2, [2, 1]), ([0, 3], [0, 3])):
        parts = state.split(sizes)
        assert [len(part) for part in parts] == lengths
        assert same(State.cat(parts), state)
    with pytest.raises(ValueError, match=r"sizes: expected numbers that add up to .* 3, got \[2\]"):
        state.split([2])
    with pytest.raises(ValueError, match="sizes: expected an int >= 1, got 0"):
        state.split(0)


def test_a_state_of_no_rows_is_still_one() -> None:
    assert len(tree(1.0, 2.0)) == 2
    assert len(tree()) == 0
    assert tree()
    assert len(Tree(leaf(), (), (), None)) == 0


def test_a_clone_has_contiguous_memory_of_its_own() -> None:
    rows = torch.arange(6.0).view(3, 2).mT
    state = Leaf(rows, torch.zeros(2, dtype=torch.int64))
    copy = state.clone()
    assert same(copy, state)
    assert copy.values.is_contiguous()
    rows.zero_()
    assert copy.values.any()


def test_positions_stay_on_the_cpu_when_a_state_moves() -> None:
    moved = tree(1.0, 2.0).to("meta")
    assert moved.first.values.is_meta
    assert moved.first.position.device.type == "cpu"


def test_everything_comes_to_the_cpu() -> None:
    cache = Leaf(torch.zeros(2), torch.zeros(2, dtype=torch.int64, device="meta"))
    # A tensor on meta has nothing to bring: that it was asked for shows that it would come.
    with pytest.raises(NotImplementedError, match="meta"):
        cache.cpu()
    assert same(tree(1.0).cpu(), tree(1.0))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_another_dtype_leaves_positions_and_what_must_be_exact(low: torch.dtype) -> None:
    state = Exact((torch.ones(2),), torch.ones(2))
    lower = state.to(low)
    assert (lower.memory[0].dtype, lower.cache.dtype) == (torch.float32, low)
    for higher in (state.to(dtype=torch.float64), state.to("cpu", torch.float64)):
        assert (higher.memory[0].dtype, higher.cache.dtype) == (torch.float64, torch.float64)
    assert leaf(1.0).to(low).position.dtype == torch.int64
    with pytest.raises(ValueError, match=r"dtype: expected a floating dtype, got torch\.int64"):
        state.to(torch.int64)


def test_a_state_prints_as_one_line() -> None:
    text = repr(make_block("as-context", torch.float32)(draw(2, 9, DIM, dtype=torch.float32))[1])
    assert text.startswith("ContextState(batch 2, ")
    assert text.endswith(" bytes, float32, cpu)")
    assert "\n" not in text
    assert len(text) < 100


def test_a_dict_round_trip_is_exact_and_safe_to_load() -> None:
    state = tree(1.0, 2.0)
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    assert same(State.from_dict(torch.load(file, weights_only=True)), state)


def test_a_foreign_class_of_the_same_name_is_another_one() -> None:
    saved = make_block("lstm")(draw(1, 2, DIM))[1].to_dict()
    assert saved["type"] == "LSTMState"

    def define() -> type[State]:
        class LSTMState(State):
            other: torch.Tensor

        return LSTMState

    foreign = define()
    assert type(State.from_dict(saved)) is not foreign
    again = State.from_dict(foreign(torch.ones(1)).to_dict())
    assert type(again) is foreign
    # As they were written before they had their module's name.
    old = tree(1.0).to_dict()["first"] | {"type": "Leaf"}
    assert same(State.from_dict(old), leaf(1.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, 'state: expected a dict with a "type", got int'),
        ({"values": 1}, 'state: expected a dict with a "type", got dict'),
        ({"type": "Nothing"}, "state type: expected one of .*, got 'Nothing'"),
        ({"type": []}, r"state type: expected one of .*, got \[\]"),
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


@pytest.mark.parametrize(
    "name", ["as-context", "as-layer", "dot", "block-attention", "lstm", "conv", "attention-plain"]
)
def test_a_saved_file_holds_the_state(name: str, tmp_path) -> None:
    _, state = make_block(name, torch.float32)(draw(2, 9, DIM, dtype=torch.float32))
    path = tmp_path / "state.safetensors"
    state.to(torch.bfloat16).save(path)
    assert same(State.load(path), state.to(torch.bfloat16))
    state.save(path)
    loaded = State.load(path)
    assert same(loaded, state)
    assert repr(loaded) == repr(state)
    assert os.listdir(tmp_path) == ["state.safetensors"]
    names = load_file(path)
    assert names.keys() == state.named_tensors().keys()


def test_what_shares_memory_and_is_not_contiguous_is_saved_too(tmp_path) -> None:
    both = torch.arange(6.0).view(3, 2).mT
    state = Tree(Leaf(both, torch.zeros(2, dtype=torch.int64)), (), (both, both[:, :1]), None)
    state.save(tmp_path / "state")
    assert same(State.load(tmp_path / "state"), state)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "state"
    tree(1.0).save(path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tree(2.0).save(path)
    assert same(State.load(path), tree(1.0))
    assert os.listdir(tmp_path) == ["state"]


def test_a_file_that_holds_no_state_is_named(tmp_path) -> None:
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match="state"):
        State.load(path)
    tree(1.0, 2.0).save(path)
    whole = path.read_bytes()
    header = whole.index(b'"tensor\\')
    for data in (b"", b"nothing", whole[:-1], whole[:40],
                 whole[:header] + b'"sensor' + whole[header + 7 :]):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"state: expected a file that State.save wrote, got"):
            State.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"expected a file .*, got format None"):
        State.load(path)


def test_a_flipped_bit_in_a_saved_file_is_refused(tmp_path) -> None:
    path = tmp_path / "state"
    tree(1.0, 2.0).save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"expected a file that State.save wrote, got"):
            State.load(path)
    tree(1.0, 2.0)[:0].save(path)  # without numbers there is a file too
    assert len(State.load(path)) == 0


def test_pytrees_reach_every_tensor() -> None:
    state = tree(1.0, 2.0)
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: 2 * t, state)
    assert same(doubled, state.map(lambda t: 2 * t))
    leaves = pytree.tree_flatten_with_path(state)[0]
    found = {pytree.keystr(path): leaf for path, leaf in leaves if leaf is not None}
    assert all(a is b for a, b in zip(found.values(), state.tensors(), strict=True))
    assert ".many[1].position" in found


def test_a_map_over_a_batch_takes_and_returns_states() -> None:
    state = tree(1.0, 2.0)
    each = torch.func.vmap(lambda s: s.map(lambda t: t + t.sum()))(state)
    assert each.first.values.tolist() == [2.0, 4.0]


@dataclass
class Output:
    y: torch.Tensor
    state: State


def test_precision_plugins_hand_a_state_on_as_it_is() -> None:
    """Lightning's walk over what a model returns, with which Fabric casts to its precision."""
    state, y = tree(1.0, 2.0), torch.ones(1)
    for output in ((y, state), {"y": y, "state": state}):
        half = apply_to_collection(output, torch.Tensor, lambda t: t.half())
        first, after = half if isinstance(half, tuple) else (half["y"], half["state"])
        assert first.dtype == torch.float16
        assert same(after, state)
    # What it moves, it moves by the `to` of what has one.
    moved = apply_to_collection((y, state), (torch.Tensor, State), lambda t: t.to("meta"))
    assert moved[1].first.values.is_meta
    half = apply_to_collection(Output(y, state), torch.Tensor, lambda t: t.half())
    assert half.y.dtype == torch.float16
    assert same(half.state, state)


def test_mixed_precision_of_fsdp_hands_a_state_on_as_it_is() -> None:
    from torch.distributed.utils import _apply_to_tensors

    y, after = _apply_to_tensors(lambda t: t.half(), (torch.ones(1), tree(1.0)))
    assert y.dtype == torch.float16
    assert same(after, tree(1.0))


def test_a_memory_is_never_less_than_float32() -> None:
    _, state = make_block("as-context", torch.float32)(draw(1, 9, DIM, dtype=torch.float32))
    low = state.to(torch.bfloat16)
    assert isinstance(low.memory.rule, OmegaState)
    assert {t.dtype for t in low.memory.rule.tensors()} == {torch.float32, torch.int64}
    assert low.read[0].dtype == torch.float32
    assert low.keys.dtype == low.memory.conv.tail.dtype == torch.bfloat16
    _, state = make_block("dot", torch.float32)(draw(1, 9, DIM, dtype=torch.float32))
    assert {t.dtype for t in state.to(torch.float16).kernel.tensors()} == {
        torch.float32, torch.int64,
    }  # fmt: skip
