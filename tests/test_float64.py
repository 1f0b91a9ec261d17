"""Devices without float64, such as Apple's: nothing of theirs is ever float64."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_blocks import float64
from atlas_blocks.attention.definition import rotary
from atlas_blocks.functional import sketch_tables
from atlas_blocks.omega.feature_maps import sketch_features


class NoFloat64(TorchDispatchMode):
    """The meta device stands for one that has none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_meta:
                assert t.dtype != torch.float64, func
        return out


def test_angles_are_computed_where_float64_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        x = torch.empty(2, 5, 3, 8, device="meta")
        tables = sketch_tables(8, 20, 3, device="meta")
        features = sketch_features(x, torch.ones(4, device="meta"), *tables, 20)
        for positions in (torch.arange(5, device="meta"), torch.zeros(2, 5, dtype=torch.int64)):
            assert rotary(x, positions).is_meta
        assert features.is_meta
        assert features.dtype == torch.float32

    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        with pytest.raises(AssertionError):
            run()
        monkeypatch.setattr(float64, "WITHOUT", frozenset({"meta"}))
        run()
