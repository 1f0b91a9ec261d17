"""A projection split over ranks by a tensor-parallel plan is whole again, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from helpers import BLOCKS, DIM, draw, make_block
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from atlas_blocks import SlidingWindowAttentionConfig


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The first of two ranks, whose partner says nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


FUSED = [
    name
    for name in BLOCKS
    if any(part.endswith("qkv") for part, _ in make_block(name).named_modules())
]


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_projection_in_shards_is_refused_by_name(name: str, mesh: DeviceMesh) -> None:
    block = make_block(name, torch.float32)
    part = next(n for n, _ in block.named_modules() if n.endswith("qkv"))
    outside = part.removesuffix("qkv")
    plan = {part: ColwiseParallel(), f"{outside}out": RowwiseParallel()}
    parallelize_module(block, mesh, {n: p for n, p in plan.items() if _has(block, n)})
    x = draw(1, 6, DIM, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"qkv: expected \d+ outputs \(a tensor-parallel plan"):
        block(x)


def test_shards_without_norms_are_refused_too(mesh: DeviceMesh) -> None:
    # Nothing else in this block notices that its heads have half their width.
    config = SlidingWindowAttentionConfig(window=4, qk_norm=False)
    block = config.build(16, 2)
    parallelize_module(block, mesh, {"qkv": ColwiseParallel(), "out": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"qkv: expected 48 outputs .* got 24"):
        block(draw(1, 6, 16, dtype=torch.float32))


def test_a_gathered_projection_has_all_its_outputs(mesh: DeviceMesh) -> None:
    block = make_block("block-attention", torch.float32)
    parallelize_module(block, mesh, {"mixer.qkv": ColwiseParallel(output_layouts=Replicate())})
    assert block(draw(1, 6, DIM, dtype=torch.float32))[0].shape == (1, 6, DIM)


def _has(block: torch.nn.Module, name: str) -> bool:
    return name in dict(block.named_modules())
