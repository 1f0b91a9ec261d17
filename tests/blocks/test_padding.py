"""Padded batches: every row gives what it gives alone, wherever its padding stands."""

from __future__ import annotations

import pytest
import torch
from helpers import BLOCKS, DIM, assert_close, difference, draw, make_block
from torch import Tensor

from atlas_blocks.recipes import registry

LENGTH = 21
every_block = pytest.mark.parametrize("name", list(BLOCKS))


def masks() -> Tensor:
    """[5, LENGTH]: padding at the left, at the right, anywhere, everywhere, nowhere."""
    mask = torch.rand(5, LENGTH) < 0.6
    mask[0] = torch.arange(LENGTH) >= 8
    mask[1] = torch.arange(LENGTH) < 4
    mask[3], mask[4] = False, True
    return mask


@every_block
@torch.no_grad()
def test_rows_give_what_they_give_alone_in_any_pieces(name: str) -> None:
    block, mask, x = make_block(name), masks(), draw(5, LENGTH, DIM)
    x[~mask] = torch.nan
    state, outputs = None, []
    for part, real in zip(x.split([9, 1, 11], 1), mask.split([9, 1, 11], 1), strict=True):
        y, state = block(part, state, mask=real)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    assert not y[~mask].any()
    for row in (0, 1, 2, 4):
        alone, after = block(x[row][mask[row]][None])
        rows = state if state is None or not state.tensors() else state[[row]]
        assert_close((y[row][mask[row]][None], rows), (alone, after))
    # A row without tokens goes on from nothing.
    if state is not None and state.tensors():
        more = draw(1, 3, DIM, seed=3)
        assert_close(block(more, state[[3]]), block(more))


@pytest.mark.parametrize("name", ["memory-mlp-gd-sketch", "as-gate-sum", "dot", "swiglu"])
def test_gradients_are_those_of_the_rows_alone(name: str) -> None:
    block, mask = make_block(name), masks()
    x = draw(5, LENGTH, DIM).requires_grad_()
    weights = draw(5, LENGTH, DIM, seed=2)
    (block(x, mask=mask)[0] * weights).sum().backward()
    assert x.grad is not None
    assert not x.grad[~mask].any()
    found = [x.grad[mask], *(p.grad for p in block.parameters() if p.grad is not None)]
    other = x.detach().requires_grad_()
    block.zero_grad()
    losses = [(block(other[[i]][:, mask[i]])[0] * weights[i][mask[i]]).sum() for i in (0, 1, 2, 4)]
    torch.stack(losses).sum().backward()
    assert other.grad is not None
    true = [other.grad[mask], *(p.grad for p in block.parameters() if p.grad is not None)]
    assert difference(found, true) < 1e-9


@torch.no_grad()
def test_a_mask_without_padding_changes_nothing() -> None:
    block, x = make_block("memory-mlp-muon-sketch"), draw(2, 9, DIM)
    mask = torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(block(x, mask=mask)[0], block(x)[0])


@torch.no_grad()
def test_hooks_run_once() -> None:
    block, seen = make_block("memory-plain"), []
    block.register_forward_hook(lambda m, args, out: seen.append(tuple(out[0].shape)))
    block(draw(5, LENGTH, DIM), mask=masks())
    assert seen == [(5, LENGTH, DIM)]


@torch.no_grad()
def test_a_language_model_takes_one_too() -> None:
    model = registry.build("atlas-mag-tiny").double()
    mask, tokens = masks(), torch.randint(0, 256, (5, LENGTH))
    logits, state = model(tokens[:, :9], mask=mask[:, :9])
    more, state = model(tokens[:, 9:], state, mask=mask[:, 9:])
    logits = torch.cat([logits, more], 1)
    next_tokens = torch.randint(0, 256, (5, 1))
    after = model(next_tokens, state).logits
    for row in (0, 1, 2, 4):
        alone, rest = model(tokens[[row]][:, mask[row]])
        true = [alone, model(next_tokens[[row]], rest).logits]
        assert difference([logits[row][mask[row]][None], after[[row]]], true) < 1e-9


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 8, dtype=torch.bool), r"mask: expected shape \[B, T\] = \[2, 9\]"),
        (torch.ones(2, 9), "mask: expected dtype torch.bool"),
        (1, "mask: expected a tensor"),
    ],
)
def test_other_masks_are_refused(mask: object, words: str) -> None:
    block = make_block("memory-plain")
    with pytest.raises(ValueError, match=words):
        block(draw(2, 9, DIM), mask=mask)


def test_a_mask_goes_with_no_bounds_and_with_a_state_of_its_rows() -> None:
    block, mask = make_block("memory-plain"), masks()
    with pytest.raises(ValueError, match="mask: expected none beside cu_seqlens"):
        block(draw(1, 9, DIM), cu_seqlens=torch.tensor([0, 9]), mask=mask[:1, :9])
    _, state = block(draw(2, 3, DIM))
    with pytest.raises(ValueError, match="state: expected a batch of 5"):
        block(draw(5, LENGTH, DIM), state, mask=mask)
