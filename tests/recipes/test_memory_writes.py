"""Every token of every recipe is written: the memory after its chunk depends on it."""

import pytest
import torch

from atlas_blocks import State
from atlas_blocks.blocks.memory_caching import CachingState
from atlas_blocks.functional import KernelState, OmegaState
from atlas_blocks.recipes import build, names

WITHOUT = ("lstm-tiny", "transformer-tiny", "sliding-window-tiny")
RECIPES = [name for name in names() if name.endswith("-tiny") and name not in WITHOUT]


def memories(state: State) -> list[torch.Tensor]:
    """What every memory in a state holds, flat."""
    found: list[torch.Tensor] = []

    def visit(value: object) -> None:
        if isinstance(value, OmegaState):
            found.append(torch.cat([w.flatten() for w in value.weights]))
        elif isinstance(value, KernelState):
            found.append(value.coefficients.flatten())
        elif isinstance(value, CachingState):
            # Of whole segments every memory is kept, and the next begins anew.
            found.append(torch.cat([w.flatten() for w in value.weights]))
        elif isinstance(value, State):
            for part in vars(value).values():
                visit(part)
        elif isinstance(value, tuple):
            for part in value:
                visit(part)

    visit(state)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_changing_any_token_changes_the_memory_after_its_chunk(name: str) -> None:
    """In the first chunk of 64 and in a later one."""
    torch.manual_seed(0)
    model = build(name).eval()
    tokens = torch.randint(0, 256, (1, 192))
    with torch.no_grad():
        for start in (0, 128):
            before = model(tokens[:, :start]).state
            piece = tokens[:, start : start + 64]
            whole = memories(model(piece, before).state)
            assert whole
            for t in range(0, 64, 7 if start else 3):
                other = piece.clone()
                other[0, t] = (other[0, t] + 77) % 256
                changed = memories(model(other, before).state)
                for one, two in zip(whole, changed, strict=True):
                    assert (one - two).norm() > 1e-4 * one.norm()
