"""A model over the ranks of a layout: FSDP2 for its parameters, tensor and sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from atlas_blocks.recipes.data.batches import Batch, Packed
from atlas_blocks.recipes.distributed import tensor
from atlas_blocks.recipes.distributed.layout import Layout
from atlas_blocks.recipes.distributed.sequence import Ring, part_of
from atlas_blocks.recipes.losses import batch_loss
from atlas_blocks.recipes.model import LanguageModel, LanguageModelState

R = TypeVar("R")
DATA, SEQUENCE, TENSOR = "data", "sequence", "tensor"


class Parallel:
    """What a training loop asks the ranks of a layout for. Every rank calls everything."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        sizes = (layout.sequence, layout.data, layout.tensor)
        self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=(SEQUENCE, DATA, TENSOR))
        self.ring: Ring | None = None
        if layout.sequence > 1:
            # Groups of their own: what is sent does not wait for what all ranks do together.
            numbers = torch.arange(dist.get_world_size()).view(sizes).flatten(1).T.tolist()
            group: Any = dist.new_subgroups_by_enumeration(numbers)[0]
            self.ring = Ring(group, device)

    @property
    def leads(self) -> bool:
        return dist.get_rank() == 0

    def shard(self, model: LanguageModel) -> None:
        """Every rank keeps its parts of a model of which each has drawn the same."""
        whole = tensor.fused(model)
        if self.layout.tensor > 1:
            tensor.split(model, self.mesh[TENSOR])
        for block in model.blocks:
            if self.ring is not None:
                self.ring.attach(block)
        # Ranks that share crops have the same parts, so that they wait but for each other's states.
        mesh = self.mesh[DATA]
        # Where groups of heads lie one after the other, parts of the rows are no whole heads.
        across = {p for n, p in model.named_parameters() if whole.get(n, (1, 0))[0] == 0}

        def place(parameter: nn.Parameter) -> Shard | None:
            return Shard(parameter.ndim - 1) if parameter in across else None

        for unit in (*model.blocks, model):
            # Always, so that a forward pass without a backward leaves the parts that are saved.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, shard_placement_fn=place)

    def batches(self, packed: Packed) -> Callable[[int], list[Batch]]:
        """This rank's part of every micro-batch: some of its crops, and of each some tokens. The
        parts of all ranks are the batch."""
        each, ring = packed.batch // self.layout.data, self.ring
        first = self.mesh[DATA].get_local_rank() * each

        def own(step: int) -> list[Batch]:
            found = packed(step, range(first, first + each))
            if ring is None:
                return found
            return [part_of(batch, packed.length, ring.rank, ring.ranks) for batch in found]

        return own

    def loss(
        self, model: LanguageModel, batch: Batch, carried: LanguageModelState | None
    ) -> tuple[Tensor, LanguageModelState | None]:
        """`batch_loss` of this rank's part of a batch."""
        if self.ring is None:
            return batch_loss(model, batch, carried)
        with self.ring.running(batch):
            # The blocks themselves know how its pieces go on.
            return batch_loss(model, Batch(batch.tokens, batch.targets, batch.cu_seqlens))

    def add_up(self, model: LanguageModel) -> None:
        """Gradients of all parts of the text, at the end of the backward pass: FSDP2 has averaged
        those of the crops, block by block."""
        if self.ring is None:
            return
        self.ring.finish()
        parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        own = [parameter.grad.to_local() for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in own])
        dist.all_reduce(flat, group=self.ring.group)
        flat /= self.ring.ranks
        for gradient, mean in zip(own, flat.split([g.numel() for g in own]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def joined(self, rows: Tensor) -> Tensor:
        """Rows of the crops of all ranks, of which each has its own."""
        mesh = self.mesh[DATA]
        return DTensor.from_local(rows.to(self.device), mesh, [Shard(0)], run_check=False)

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """For rows of the crops of all ranks."""
        own = (shape[0] // self.layout.data, *shape[1:])
        return self.joined(torch.zeros(own, dtype=dtype))

    def mean(self, value: Tensor) -> Tensor:
        """Over all ranks, which have read equally much."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    def any(self, flag: bool) -> bool:
        """Whether it is so at one of the ranks."""
        found = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def first(self, work: Callable[[], R]) -> R:
        """`work` of the first rank, and then of the others, who find done what it does once."""
        result = self.at_first(work)
        return result if self.leads else work()  # type: ignore[return-value]

    def at_first(self, work: Callable[[], R]) -> R | None:
        """`work` of the first rank, for which the others wait. What it raises, they raise too."""
        result, outcome = None, [None]
        if self.leads:
            try:
                result = work()
            except (ValueError, OSError) as error:
                outcome: list[Any] = [(isinstance(error, ValueError), str(error))]
                dist.broadcast_object_list(outcome, src=0)
                raise
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            is_wrong, words = outcome[0]
            raise (ValueError if is_wrong else OSError)(words)
        return result
