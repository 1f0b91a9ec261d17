"""Tensor parallelism: every rank has its own heads (hidden units of an MLP), and y is the sum of
what they give.

Blocks say where their heads lie (`Block.tensor_plan`). Parameters are DTensors; each module gets
its rank's part of them while it runs, so that the maths of the blocks sees plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from atlas_blocks import check
from atlas_blocks.blocks.base import Block
from atlas_blocks.recipes.model import LanguageModel

Plan = dict[str, tuple[int, int]]


def split(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Give every rank of the mesh [ranks] its own heads of all blocks."""
    plan: dict[str, ParallelStyle] = {}
    for name, block, own in _taken_apart(model):
        plan[name] = _Heads(own)
        block.take_heads(mesh.get_local_rank(), mesh.size())
    inside = {part for name in plan for part in model.get_submodule(name).modules()}
    for name, module in model.named_modules():
        if module not in inside and next(module.parameters(recurse=False), None) is not None:
            plan[name] = _Whole()
    parallelize_module(model, mesh, plan)


def check_heads(model: LanguageModel, ranks: int) -> None:
    """Raise ValueError that names a block whose heads so many ranks cannot have apart."""
    for name, block, plan in _taken_apart(model):
        sizes = {"heads": getattr(block, "heads", ranks)}
        shapes = {parameter: tensor.shape for parameter, tensor in block.named_parameters()}
        sizes |= {n: shapes[n][axis] // parts for n, (axis, parts) in plan.items()}
        for what, size in sizes.items():
            if size % ranks:
                check.fail("tensor", f"a divisor of {size}, as {what} of {name} has it", ranks)


def fused(model: LanguageModel) -> Plan:
    """Parameters in which several groups of heads lie one after the other."""
    found = {}
    for name, module in model.named_modules():
        plan = isinstance(module, Block) and module.tensor_plan()
        for parameter, (axis, parts) in (plan or {}).items():
            if parts > 1:
                found[f"{name}.{parameter}"] = (axis, parts)
    return found


def _taken_apart(model: LanguageModel) -> Iterator[tuple[str, Block, Plan]]:
    """Name, module and plan of all that has one. Raises ValueError for a block without."""

    def of(name: str, block: nn.Module) -> Iterator[tuple[str, Block, Plan]]:
        if not isinstance(block, Block):
            return
        plan = block.tensor_plan()
        if plan is None:
            wanted = "blocks whose heads ranks can have apart (Block.tensor_plan)"
            check.fail("tensor", wanted, f"{type(block).__name__} in {name}")
        if plan:
            yield name, block, plan
            return
        for inner, part in block.named_children():
            yield from of(f"{name}.{inner}", part)

    for number, block in enumerate(model.blocks):
        yield from of(f"blocks.{number}", block)


class _Whole(ParallelStyle):
    """A module that every rank computes alike."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _Local(module, {}, device_mesh, Replicate())
        return module


class _Heads(ParallelStyle):
    """A block of which every rank computes its heads' share of y."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, part in module.named_modules():
            prefix = f"{name}." if name else ""
            own = {
                n.removeprefix(prefix): at for n, at in self.plan.items() if n.startswith(prefix)
            }
            # What is whole here sees but the share of the gradient that these heads give.
            _Local(part, own, device_mesh, Partial())

        def enter(_: nn.Module, args: Any) -> Any:
            x = DTensor.from_local(args[0], device_mesh, [Replicate()], run_check=False)
            return x.to_local(grad_placements=[Partial()]), *args[1:]

        def leave(_: nn.Module, args: Any, result: Any) -> Any:
            # Of no tokens only the state is wanted, and redistributing takes no missing gradient.
            if result[0].numel() == 0:
                return None
            y = DTensor.from_local(result[0], device_mesh, [Partial()], run_check=False)
            return y.redistribute(placements=[Replicate()]).to_local(), *result[1:]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class _Local:
    """Makes the parameters of one module DTensors, and gives it this rank's part while it runs."""

    def __init__(
        self, module: nn.Module, plan: Plan, mesh: DeviceMesh, gradient: Placement
    ) -> None:
        self.plan, self.gradient = plan, gradient
        self.kept: dict[str, Any] = {}
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, self._distributed(name, parameter, mesh))
        if module._parameters:
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(self.leave, always_call=True)

    def _distributed(self, name: str, parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
        axis, parts = self.plan.get(name, (0, 0))
        tensor, place = parameter.detach(), Shard(axis) if parts else Replicate()
        if parts > 1:
            tensor, place = tensor.unflatten(axis, (parts, -1)), Shard(axis + 1)
        # Every rank has drawn the same.
        made = distribute_tensor(tensor, mesh, [place], src_data_rank=None)
        return nn.Parameter(made, requires_grad=parameter.requires_grad)

    def enter(self, module: nn.Module, args: Any) -> None:
        self.kept = dict(module._parameters)
        for name, parameter in self.kept.items():
            if parameter is None:
                continue
            axis, parts = self.plan.get(name, (0, 0))
            local = parameter.to_local(grad_placements=None if parts else [self.gradient])
            module._parameters[name] = local.flatten(axis, axis + 1) if parts > 1 else local

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        module._parameters.update(self.kept)
        self.kept = {}
