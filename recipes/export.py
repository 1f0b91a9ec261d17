"""Ahead of time: one token of a model as a package that runs without Python.

torch.export keeps each op of this library, such as `atlas::omega_rule`, as a single node, which is
Python. For a package an op is replaced by what it computes for one token as plain tensor operations
(omega/one_token.py); AOTInductor compiles those.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atlas_blocks import check
from atlas_blocks.blocks.lstm_op import definition as lstm_definition
from atlas_blocks.graph.contract import own
from atlas_blocks.omega.feature_maps import polynomial_features
from atlas_blocks.omega.one_token import one_token
from atlas_blocks.omega.op import Settings, unflatten
from atlas_blocks.state import State


class Streaming(nn.Module):
    """`model(x, state)` with the state as flat tensors: (x, *state) -> (y, *state)."""

    def __init__(self, model: nn.Module, state: State | None) -> None:
        super().__init__()
        self.model, self.state = model, state

    def forward(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """x [B, T] or [B, T, dim]; tensors: those of the state, in the order of `State.tensors`."""
        parts = iter(tensors)
        state = None if self.state is None else self.state.map(lambda _: next(parts))
        y, after = self.model(x, state)
        # Copies: an exported graph may not return its inputs.
        return y, *([] if after is None else [own(t) for t in after.tensors()])


def export_step(model: nn.Module, x: Tensor, state: State | None) -> torch.export.ExportedProgram:
    """`model` for inputs like x and states like `state`, every op a single node.

    The length T of x is free where it is not 1 (with an attention: as long as it stays on the side
    of the window on which x is); so is an axis of the state along which it grows.
    """
    with torch.no_grad():
        step = Streaming(model, state).eval()
        tensors = () if state is None else tuple(state.tensors())
        first, *others = _free_axes(step, x, tensors)
        shapes = (first, tuple(others)) if others else (first,)
        return _export(step, (x, *tensors), shapes)


def export_plain_step(model: nn.Module, x: Tensor, state: State) -> torch.export.ExportedProgram:
    """The same for one token, with no op of this library: nothing in it needs Python.

    Raises ValueError where x has more than one token, or `model` an op whose step reads its place
    on the host: exact phi* (`DeepTransformerLayer`).
    """
    if x.shape[1] != 1:
        check.fail("x", "one token", f"T = {x.shape[1]}")
    program = export_step(model, x, state)
    graph = program.module()
    assert isinstance(graph, torch.fx.GraphModule)
    for node in graph.graph.nodes:
        if node.target in _ONE_TOKEN:
            node.target = _ONE_TOKEN[node.target]
        elif str(node.target).startswith("atlas."):
            check.fail("model", "blocks whose step reads nothing on the host", node.target)
    graph.recompile()
    with torch.no_grad():
        # A package takes tensors laid out like these: a state at the start of a sequence may be
        # one for all rows, and later ones are not.
        tensors = tuple(t.contiguous() for t in state.tensors())
        axes = _free_axes(Streaming(model, state), x, tensors)
        return _export(graph, (x.contiguous(), *tensors), tuple(axes))


def _export(
    step: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...]
) -> torch.export.ExportedProgram:
    return torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)


def _free_axes(step: Streaming, x: Tensor, tensors: Sequence[Tensor]) -> list[Any]:
    """For x and for every tensor of the state: the axes whose length is no constant."""
    found: list[Any] = [{1: torch.export.Dim.AUTO} if x.shape[1] != 1 else None]
    # An attention without a window keeps every key.
    after = step(x, *tensors)[1:] if tensors else ()
    for before, now in zip(tensors, after, strict=True):
        pairs = enumerate(zip(before.shape, now.shape, strict=True))
        found.append({axis: torch.export.Dim.AUTO for axis, (a, b) in pairs if a != b} or None)
    return found


def _omega_rule(tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """`atlas::omega_rule` for one token."""
    *settings, _, _ = rest
    y, state = one_token(unflatten(tensors, Settings.of(*settings)))
    return [y, *state.tensors()]


_ONE_TOKEN = {
    torch.ops.atlas.omega_rule.default: _omega_rule,
    torch.ops.atlas.polynomial_features.default: lambda tensors, wanted: [
        polynomial_features(*tensors)
    ],
    torch.ops.atlas.lstm.default: lambda tensors, wanted: lstm_definition(tensors),
}


def package(model: nn.Module, x: Tensor, state: State, out: Path) -> Path:
    """Compile one token's step into `out`, a .pt2 file.

    x: [B, 1] tokens or [B, 1, dim]. The package takes x and the state's tensors (`State.tensors`)
    and returns y and the next state's. All must be contiguous, as those that it returns are: it
    looks how they are laid out only where the environment has AOTI_RUNTIME_CHECK_INPUTS=1.
    torch._inductor.aoti_load_package runs it, and so does torch::inductor::AOTIModelPackageLoader
    in C++.
    """
    if out.suffix != ".pt2":
        check.fail("out", "a file name that ends in .pt2", out)
    program = export_plain_step(model, x, state)
    # Elsewhere first: whoever reads `out` finds a whole package, the old one or the new one.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
        part = str(Path(folder) / out.name)
        os.replace(torch._inductor.aoti_compile_and_package(program, package_path=part), out)
    return out
