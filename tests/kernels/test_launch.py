"""What is asked of every launch."""

import pytest
import torch

from atlas_blocks.kernels import coefficients, fold, tiles


def test_an_axis_that_a_gpu_does_not_take_is_refused():
    tiles.launch(None, (0, tiles.LONGEST_AXIS, tiles.LONGEST_AXIS))  # nothing to launch
    for grid in ((1, tiles.LONGEST_AXIS + 1), (1, 1, tiles.LONGEST_AXIS + 1)):
        with pytest.raises(ValueError, match=r"grid: expected at most 65535 along y and z, got"):
            tiles.launch(None, grid)


@pytest.mark.parametrize(("rows", "tokens"), [(70_000, 4), (1, 64 * 70_000)], ids=str)
def test_rows_and_tokens_lie_along_the_first_axis(rows, tokens, monkeypatch):
    """Of a batch of 70,000, and of a sequence of 4 million: only columns lie along another."""
    grids = []
    monkeypatch.setattr(fold, "launch", lambda kernel, grid, *a, **s: grids.append(grid))
    at = tiles.Layout(torch.empty(0, 4), torch.empty(0, 2), rows, 1, 64, tokens)
    spans = coefficients.Spans.of(64, 1, 0, 0)
    out = torch.empty(1, 1, 2, 96)
    fold.fold(out, out, out, at, spans)
    parts = -(-tokens // 64)
    assert grids == [(2 * rows * parts, 2)]
