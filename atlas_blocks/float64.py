"""Where float64 can be computed: angles need more digits than float32 has."""

from __future__ import annotations

import torch

WITHOUT = frozenset({"mps"})


def float64_device(device: torch.device) -> torch.device:
    """The device, or the CPU in place of one that has no float64 (Apple's, some of Intel's)."""
    if device.type in WITHOUT:
        return torch.device("cpu")
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.device("cpu")
    return device
