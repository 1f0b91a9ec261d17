"""Batches: every prediction once an epoch, no document sees another, any step from its number."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atlas_blocks.recipes.data import Packed, Split

LENGTHS = [5, 1, 40, 2, 17, 3, 3, 90, 1, 8]


def split(lengths, shards=1):
    """Document d of n tokens is 1000 d, 1000 d + 1, ..."""
    parts = np.array_split(np.arange(len(lengths)), shards)
    tokens = [np.concatenate([1000 * d + np.arange(lengths[d]) for d in part]) for part in parts]
    return Split(tokens, [np.cumsum([lengths[d] for d in part]) for part in parts])


def predicted(batches):
    """Every (token, next) of some batches."""
    return [
        pair
        for batch in batches
        for pair in zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True)
    ]


def everything(lengths):
    return [(1000 * d + i, 1000 * d + i + 1) for d, n in enumerate(lengths) for i in range(n - 1)]


def by_document(tokens):
    """Runs of tokens of one document."""
    return [(d, list(run)) for d, run in itertools.groupby(tokens, lambda t: t // 1000)]


orders = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 12),
    "accumulate": st.integers(1, 2),
    "carry": st.booleans(),
    "seed": st.integers(-(2**32), 2**32),
}


@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=12), **orders)
def test_an_epoch_predicts_everything_once(lengths, **order):
    if sum(lengths) - len(lengths) < 80:
        lengths = [*lengths, 90]
    packed = Packed(split(lengths, shards=2), **order)
    lanes = order["batch"] * order["accumulate"]
    for epoch in range(2):
        # With carry the crops that make no whole step are left out; else epochs follow closely.
        first = epoch * packed.steps if order["carry"] else 0
        steps = packed.steps if order["carry"] else (epoch + 1) * packed.crops // lanes
        seen = predicted(b for step in range(first, first + steps) for b in packed(step))
        times = 1 if order["carry"] else epoch + 1
        assert len(seen) == steps * lanes * order["length"]
        assert set(seen) <= set(everything(lengths))
        assert max(seen.count(pair) for pair in seen) <= times


@given(**orders)
def test_pieces_are_of_one_document_and_follow_one_another(**order):
    packed = Packed(split(LENGTHS), **order)
    for step in range(6):
        batches = packed(step)
        assert len(batches) == order["accumulate"]
        for batch in batches:
            bounds = batch.cu_seqlens.tolist()
            assert batch.tokens.shape == batch.targets.shape == (1, bounds[-1])
            assert bounds[-1] == order["batch"] * order["length"]
            assert set(range(0, bounds[-1], order["length"])) <= set(bounds)
            for start, stop in itertools.pairwise(bounds):
                assert (batch.tokens[0, start:stop].diff() == 1).all()
            assert torch.equal(batch.targets, batch.tokens + 1)


def test_what_goes_on_is_marked():
    packed = Packed(split(LENGTHS), batch=3, length=4, accumulate=2, carry=True)
    for step in range(2 * packed.steps):
        for place, batch in enumerate(packed(step)):
            starts, before = batch.cu_seqlens[:-1], batch.before
            assert torch.equal(starts[batch.last] // 4, torch.arange(3))
            for piece in range(len(before)):
                first = int(batch.tokens[0, starts[piece]])
                if before[piece] < 0:
                    # The start of a document, or of what this lane reads of an epoch.
                    assert first % 1000 == 0 or step % packed.steps == 0
                else:
                    old = packed(step - 1)[place]
                    ends = old.targets[0, old.cu_seqlens[1:] - 1][old.last]
                    assert first == int(ends[before[piece]])


def test_a_lane_reads_documents_whole_and_in_order():
    packed = Packed(split(LENGTHS), batch=2, length=5, carry=True)
    batches = [packed(step)[0] for step in range(packed.steps)]
    for lane in range(2):
        read = torch.cat([b.tokens[0, 5 * lane : 5 * lane + 5] for b in batches]).tolist()
        # All that it reads of a document is in one piece, and only the ends of a lane are in part.
        found = [(d, [t % 1000 for t in part]) for d, part in by_document(read)]
        assert len({d for d, _ in found}) == len(found)
        for number, (document, part) in enumerate(found):
            assert part == list(range(part[0], part[0] + len(part)))
            assert part[0] == 0 or number == 0
            assert len(part) == LENGTHS[document] - 1 or number in (0, len(found) - 1)


@pytest.mark.parametrize("carry", [False, True])
def test_a_step_depends_on_its_number_and_the_seed_alone(carry):
    def make(seed):
        return Packed(split(LENGTHS, shards=3), batch=2, length=7, seed=seed, carry=carry)

    one, other = make(0), make(1)
    in_order = [predicted(one(step)) for step in range(40)]
    for step in (39, 0, 17, 25, 3):
        assert predicted(make(0)(step)) == predicted(one(step)) == in_order[step]
    assert [predicted(other(step)) for step in range(40)] != in_order


def test_epochs_differ():
    packed = Packed(split(LENGTHS), batch=1, length=4)
    first, second = (
        [predicted(packed(step)) for step in range(e * packed.steps, (e + 1) * packed.steps)]
        for e in (0, 1)
    )
    assert first != second


def test_micro_batches_are_the_batch_in_parts():
    for carry in (False, True):
        whole = Packed(split(LENGTHS), batch=4, length=5, carry=carry)
        parts = Packed(split(LENGTHS), batch=2, accumulate=2, length=5, carry=carry)
        for step in range(8):
            assert predicted(parts(step)) == predicted(whole(step))


def test_data_too_short_is_named():
    short = split([4, 4])
    Packed(short, batch=9, length=6)
    with pytest.raises(ValueError, match="documents with at least 7 predictions, got 6"):
        Packed(short, batch=1, length=7)
    with pytest.raises(ValueError, match="at least 8 predictions"):
        Packed(short, batch=2, accumulate=2, length=2, carry=True)
