"""Modules of somebody's in the stacks: what they are told and must return, and their states."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DIM, HEADS, AverageConfig, assert_close, block_in_pieces, difference, draw
from torch import Tensor, nn

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    Config,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    SlidingWindowAttentionConfig,
    State,
)
from atlas_blocks.blocks.foreign import ForeignBlock


@dataclasses.dataclass(frozen=True)
class GivenConfig(Config):
    """Builds whatever it is given; forward of a function is that function."""

    forward: Any

    def build(self, dim: int, heads: int) -> Any:
        return Given(self.forward) if callable(self.forward) else self.forward


class Given(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = forward


def given(forward: Any) -> ForeignBlock:
    """The block around a module with this forward, as a stack builds it."""
    return AtlasBlockConfig(GivenConfig(forward), mlp_width=4).build(DIM, HEADS).double().mixer


@pytest.mark.parametrize(
    "config",
    [
        MemoryAsLayerConfig(AverageConfig(), AverageConfig(0.5), mlp_width=6),
        MemoryAsGateConfig(AverageConfig(), AverageConfig(0.5), mlp_width=6, mlp="relu2"),
    ],
    ids=lambda c: type(c).__name__,
)
def test_both_branches_of_a_stack_may_be_somebody_s(config) -> None:
    block, x = config.build(DIM, HEADS).double(), draw(2, 20, DIM)
    whole = block(x)
    assert_close(block_in_pieces(block, x, [3, 0, 10, 7]), whole)
    ends = torch.tensor([0, 8, 13, 20])
    packed, states = block(x[:1], cu_seqlens=ends)
    alone = [block(part) for part in x[:1].split([8, 5, 7], 1)]
    true = torch.cat([y for y, _ in alone], 1), State.cat([s for _, s in alone])
    assert_close((packed, states), true)
    assert Config.from_json(config.to_json()) == config


def test_documents_are_told_to_a_module_that_takes_them() -> None:
    told = []

    def forward(x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None):
        told.append(cu_seqlens)
        rows = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        return x, x.new_zeros(rows, 1)

    block, x = given(forward), draw(1, 9, DIM)
    block(x)
    _, state = block(x, cu_seqlens=torch.tensor([0, 4, 9]))
    assert told[0] is None
    assert told[1].tolist() == [0, 4, 9]
    assert len(state) == 2


def test_documents_of_one_length_share_a_call_of_any_other_module() -> None:
    sizes = []

    def forward(x: Tensor, state: Tensor | None):
        sizes.append(tuple(x.shape[:2]))
        return x, x[:, -1]

    block, x = given(forward), draw(1, 13, DIM)
    y, state = block(x, cu_seqlens=torch.tensor([0, 4, 9, 13]))
    assert sizes == [(2, 4), (1, 5)]
    assert torch.equal(y, x)
    assert torch.equal(state.value, x[0, [3, 8, 12]])


def test_a_module_without_a_state_streams() -> None:
    block = AtlasBlockConfig(GivenConfig(lambda x, state: (2 * x, None)), 4).build(DIM, HEADS)
    block, x = block.double(), draw(2, 9, DIM)
    y, state = block(x)
    assert state.tensors() == []
    assert difference([block_in_pieces(block, x, [4, 5])[0]], [y]) < 1e-12
    assert difference([block(x[:1], cu_seqlens=torch.tensor([0, 4, 9]))[0]], [y[:1]]) < 1e-12


def test_a_state_of_several_parts_is_carried_kept_and_cut_from_the_graph(tmp_path) -> None:
    memory = AtlasMemoryConfig(update="gd", window=1).build(DIM, HEADS).double()

    def forward(x: Tensor, state: Any):
        inner, count = (None, x.new_zeros(len(x))) if state is None else state
        y, inner = memory(x, inner)
        return y + count[:, None, None], (inner, count + x.shape[1])

    block, x = given(forward), draw(2, 20, DIM)
    late = (torch.arange(20) >= 3).double()[:, None]
    found = block_in_pieces(block, x, [3, 17])
    assert_close(found, (memory(x)[0] + 3 * late, block(x)[1]))
    _, state = block(x.requires_grad_())
    assert not any(t.requires_grad for t in state.tensors())
    state.save(tmp_path / "state")
    loaded = State.load(tmp_path / "state")
    assert_close(block(x[:, :3], loaded), block(x[:, :3], state))
    assert loaded[[1]].value[1].tolist() == [20]


def grown(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    return x, x if state is None else torch.cat([state, x], 1)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda x: (x, None),
            r"module: expected a module whose forward takes \(x, state\) of Given",
        ),
        (lambda x, state, more: (x, None), r"got Given\.forward\(x, state, more\)"),
        (lambda x, state: x, "Given: expected y, state as its result, got Tensor"),
        (lambda x, state: (x, x, x), "Given: expected y, state as its result, got tuple"),
        (
            lambda x, state: (x[:, 1:], None),
            r"y of Given: expected shape \[B, T, dim\] = \[2, 9, 12\]",
        ),
        (lambda x, state: (x, [x]), "state of Given: expected a State, a tensor, .*, got list"),
        (lambda x, state: (x, {"k": x}), "state of Given: expected a State, .*, got dict"),
        (lambda x, state: (x, x.sum()), r"state of Given: expected a batch of 2, first, got \[\]"),
        (lambda x, state: (x, x[:1]), r"state of Given: expected a batch of 2, first, got \[1, 9"),
        ("module", r"GivenConfig\.build: expected a torch\.nn\.Module, got str"),
    ],
)
def test_what_a_module_must_take_and_return_is_named(forward, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given(forward)(draw(2, 9, DIM))


def test_rows_of_states_that_grow_cannot_be_joined() -> None:
    x = draw(1, 9, DIM)
    message = "state: expected tensors of one size after any text, or a State with an `aligned`"
    with pytest.raises(ValueError, match=message):
        given(grown)(x, cu_seqlens=torch.tensor([0, 4, 9]))


class NoConfig(Config):
    """Of somebody's, and builds nothing."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AtlasBlockConfig(NoConfig()), "mixer: expected .* has build, got NoConfig"),
        (lambda: AtlasBlockConfig(nn.Linear(2, 2)), "mixer: expected .*, got Linear"),
        (
            lambda: MemoryAsGateConfig(NoConfig()),
            "memory: expected AtlasMemoryConfig or .*NoConfig",
        ),
        (
            lambda: MemoryAsContextConfig(AverageConfig()),
            "memory: expected AtlasMemoryConfig, got AverageConfig",
        ),
        (
            lambda: MemoryAsLayerConfig(attention=AtlasBlockConfig(SlidingWindowAttentionConfig())),
            "attention: expected SlidingWindowAttentionConfig or .*, got AtlasBlockConfig",
        ),
    ],
)
def test_what_builds_no_mixer_is_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
