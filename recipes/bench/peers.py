"""`atlas-blocks bench AtlasMemory --peers`: the layer beside memory layers of other libraries.

All have the same dim, heads, width of a head, chunk and kind of memory, and learn by gradient
descent with momentum. titans-pytorch takes the gradients of all chunks at the weights of the call's
start, so that nothing is sequential; with batch_size = chunk it takes them at the memory before
each chunk, as AtlasMemory does. It looks at one token at a time, and so does AtlasMemory with a
window of 1.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atlas_blocks import AtlasMemory, AtlasMemoryConfig
from atlas_blocks.recipes.bench.contenders import CHUNK, WINDOW, missing
from atlas_blocks.recipes.bench.subjects import ATLAS, EAGER, Entrant, Size

BLOCK, TITANS = "AtlasMemory", "titans-pytorch"
# Kinds of memory, and how many weights each has.
MEMORIES = {"matrix": 1, "mlp": 2}
WHAT = {"peers": True, "chunk": CHUNK, "window": WINDOW, "expansion": 1}
# titans-pytorch with a batch_size unrolls its chunks, at about half a minute of compiling each.
MOST_UNROLLED = 8
# All of a layer's own tensors and its input. fla's kernels take no float32.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


class Foreign(nn.Module):
    """Another library's layer, called as a block: y [B, T, dim] and no state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x)[0], None


def entrants(
    memory: str, size: Size, device: torch.device, backends: Sequence[str]
) -> list[Entrant]:
    """Who is timed with a memory of MEMORIES, the one that all are compared with first.

    backends: of torch.compile; "atlas" is for our layer alone. Raises ValueError where
    titans-pytorch cannot be imported.
    """
    found = []

    def enter(
        name: str, layer: nn.Module, compiled: Sequence[str], *, checked: bool, problem: str = ""
    ) -> None:
        layer = layer.to(device, DTYPES[device.type])
        found.append(Entrant(name, layer, EAGER, checked))
        found.extend(Entrant(f"{name}, {c}", layer, c, checked, problem) for c in compiled)

    plain = [b for b in backends if b != ATLAS]
    enter(TITANS, _titans(memory, size, None), plain, checked=False)
    chunks = -(-size.tokens // CHUNK)
    problem = "" if chunks <= MOST_UNROLLED else f"{chunks} chunks would be unrolled to compile"
    layer = _titans(memory, size, CHUNK)
    enter(f"{TITANS}, batch_size={CHUNK}", layer, plain, checked=False, problem=problem)
    enter(BLOCK, _ours(memory, size), backends, checked=True)
    enter(f"{BLOCK}, a window of 1", _ours(memory, size, window=1), backends, checked=True)
    if memory == "matrix":
        name = "fla, GatedDeltaNet"
        delta, problem = _gated_delta_net(size, device)
        if delta is None:
            found.append(Entrant(name, None, EAGER, checked=False, problem=problem))
        else:
            enter(name, delta, (), checked=False)
    return found


def _ours(memory: str, size: Size, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = AtlasMemoryConfig(
        memory=memory,
        update="gd",
        feature_map="identity",
        window=WINDOW,
        chunk_size=CHUNK,
        expansion=1,
    )
    return AtlasMemory(size.dim, size.heads, config.replace(**changes))


def _titans_pytorch() -> Any:
    try:
        return importlib.import_module("titans_pytorch")
    except ImportError as error:
        raise ValueError(f"peers: {missing(TITANS, error)}") from error


def _titans(memory: str, size: Size, batch_size: int | None) -> nn.Module:
    titans = _titans_pytorch()
    torch.manual_seed(0)
    width = size.dim // size.heads
    model = titans.MemoryMLP(dim=width, depth=MEMORIES[memory], expansion_factor=1.0)
    return Foreign(
        titans.NeuralMemory(
            dim=size.dim,
            chunk_size=CHUNK,
            batch_size=batch_size,
            heads=size.heads,
            dim_head=width,
            model=model,
        )
    )


def _gated_delta_net(size: Size, device: torch.device) -> tuple[nn.Module | None, str]:
    """fla's layer around chunk_gated_delta_rule, or why there is none."""
    if device.type != "cuda":
        return None, "its kernels need a CUDA device"
    try:
        layers = importlib.import_module("fla.layers")
    except ImportError as error:
        return None, missing("flash-linear-attention", error)
    torch.manual_seed(0)
    width = size.dim // size.heads
    layer = layers.GatedDeltaNet(
        hidden_size=size.dim, num_heads=size.heads, head_dim=width, expand_v=1.0
    )
    return Foreign(layer), ""
