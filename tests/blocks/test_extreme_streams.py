"""Activations of any size, spikes and gates drawn for every token leave a layer's memory bounded,
its gradients finite (specification 9b). Gradient descent: Muon's steps have one size anyway.

A head for each setting of the gates, a row of the batch for each number of distinct tokens.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import GATE_LOGITS, MEMORIES, OBJECTIVES
from marks import slow_as_it_is
from torch import Tensor, nn

from atlas_blocks import AtlasMemory, AtlasMemoryConfig

WIDTH, DISTINCT = 8, (1, 2, 4, 64)
NAMES = ("alpha", "eta", "theta", "gamma")
GATES = ("extreme", "moderate", "drawn")
SIZES = ("one", "thousand", "million", "spikes")
VARIANTS = [
    dict(zip(("objective", "window", "momentum", "feature_map"), values, strict=True))
    for values in itertools.product(
        OBJECTIVES, (1, 16), (True, False), ("identity", "sketch", "polynomial", "taylor_exp")
    )
]
CASES = list(itertools.product(MEMORIES, GATES, SIZES))


def dtype_of(case: tuple[str, str, str]) -> torch.dtype:
    """A gated memory's gradients are products of four numbers of the size of its activations: with
    momentum they leave the range of float32 (docs/limits.md, Stability)."""
    memory, _, size = case
    beyond = memory == "gated_mlp" and size in ("million", "spikes")
    return torch.float64 if beyond else torch.float32


def variants(case: tuple[str, str, str]) -> list[dict[str, Any]]:
    """Two of them all that differ in everything; over the cases each comes at least twice."""
    i = 3 * CASES.index(case) % len(VARIANTS)
    return [VARIANTS[i], VARIANTS[-1 - i]]


def layer(memory: str, gates: str, seed: int = 0, **settings: Any) -> AtlasMemory:
    torch.manual_seed(seed)
    config = AtlasMemoryConfig(memory=memory, update="gd", expansion=2, gate_rank=4, **settings)
    rows = GATE_LOGITS.get(gates, 4 * (NAMES,))
    block = AtlasMemory(WIDTH * len(rows), len(rows), config)
    with torch.no_grad():
        for i, name in enumerate(NAMES):
            gate = getattr(block, name)
            if gate is None:
                continue
            if gates == "drawn":  # each token its own logits of about 30
                nn.init.normal_(gate[1].weight, std=30.0)
                continue
            for head, logits in zip(gate[1].bias.reshape(len(rows), -1), rows, strict=True):
                if logits[i] is not None:
                    head.fill_(logits[i])
    return block


def streams(dim: int, length: int, size: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(max(DISTINCT), dim, generator=g)
    x = torch.stack([table[torch.randint(n, (length,), generator=g)] for n in DISTINCT])
    if size == "spikes":
        rare = torch.rand(len(DISTINCT), length, 1, generator=g) < 0.01
        return torch.where(rare, 1e6 * x, x)
    return {"one": 1.0, "thousand": 1e3, "million": 1e6}[size] * x


def sizes_along(block: AtlasMemory, x: Tensor, pieces: int) -> Tensor:
    """The largest |weight| after every piece, as a multiple of the largest |value| (or of 1)."""
    state, found, largest = None, [], torch.ones((), dtype=x.dtype)
    with torch.no_grad():
        for part in x.split(x.shape[1] // pieces, 1):
            v = F.silu(block.conv(block.qkv(part), state and state.conv)[0]).chunk(3, -1)[2]
            largest = torch.maximum(largest, v.abs().max())
            _, state = block(part, state)
            held = torch.stack([w.abs().max() for w in state.rule.weights])
            assert all(t.isfinite().all() for t in state.rule.tensors())
            found.append(held.max() / largest)
    return torch.stack(found)


def assert_bounded(block: AtlasMemory, x: Tensor, pieces: int = 4) -> Tensor:
    sizes = sizes_along(block, x, pieces)
    assert sizes.isfinite().all()
    # Linear attention is a sum: where nothing fades it grows with the stream.
    if (block.config.memory, block.config.objective) != ("matrix", "dot"):
        assert sizes.max() < 300, sizes
    return sizes


# Every second, each pair of values once, and the others with the slow tests.
HALF = [c if i % 2 == i // 4 % 2 else slow_as_it_is(c) for i, c in enumerate(CASES)]


@pytest.mark.parametrize("case", HALF, ids="-".join)
def test_a_memory_is_bounded(case: tuple[str, str, str]) -> None:
    memory, gates, size = case
    for settings in variants(case):
        block = layer(memory, gates, **settings).to(dtype_of(case))
        assert_bounded(block, streams(block.dim, 2000, size).to(dtype_of(case)))


@pytest.mark.parametrize("case", HALF, ids="-".join)
def test_gradients_of_two_thousand_tokens_are_finite(case: tuple[str, str, str]) -> None:
    memory, gates, size = case
    for settings in variants(case)[:1]:
        block = layer(memory, gates, **settings).to(dtype_of(case))
        x = streams(block.dim, 2000, size).to(dtype_of(case)).requires_grad_()
        y, _ = block(x)
        # A loss of size 1, as a model's norms and logits make of any activations.
        loss = (y / y.detach().abs().max().clamp(min=1)).square().mean()
        found = torch.autograd.grad(loss, [x, *block.parameters()])
        assert all(t.isfinite().all() for t in found)
