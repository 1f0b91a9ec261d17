"""States of every block: whose memory they are, and what a call may be given to go on from."""

import pytest
from helpers import BLOCKS, DIM, draw, make_block
from torch import Tensor

every_block = pytest.mark.parametrize("name", BLOCKS)


def storages(tensors: list[Tensor]) -> list[int]:
    return [t.untyped_storage()._cdata for t in tensors if t.numel()]


@every_block
@pytest.mark.parametrize("length", [0, 3, 6, 8, 12, 20])
def test_a_returned_state_shares_memory_with_nothing(name: str, length: int) -> None:
    """With the parameters that a step of an optimizer writes to, the input, the output, itself."""
    block, x = make_block(name), draw(2, length, DIM)
    y, state = block(x)
    if state is None:
        return
    own = storages(state.tensors())
    others = storages([x, y, *block.parameters(), *block.buffers()])
    assert not set(own) & set(others)
    assert len(own) == len(set(own))
    for t in state.tensors():
        assert t.is_contiguous()
        assert t.untyped_storage().nbytes() == t.nbytes
