"""How many ranks do what, and what that asks of a model and of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch

from atlas_blocks import check
from atlas_blocks.recipes import describe
from atlas_blocks.recipes.model import LanguageModelConfig
from atlas_blocks.recipes.training import TrainingConfig

# Whose names torch gives to readers of types in part.
dist: Any = torch.distributed
# One rank prepares the data while the others wait.
PATIENCE = datetime.timedelta(hours=2)


@dataclasses.dataclass(frozen=True)
class Layout:
    """data * sequence * tensor ranks. data: each has a part of the crops of every batch, and of the
    parameters. sequence: each has a part of every crop. tensor: each has a part of the heads."""

    data: int
    sequence: int
    tensor: int

    @staticmethod
    def of(ranks: int, *, tensor: int, sequence: int) -> Layout:
        """What is left is for the data. Raises ValueError where the ranks do not divide so."""
        for name, value in (("tensor", tensor), ("sequence", sequence)):
            check.at_least(name, value, 1)
        if ranks % (tensor * sequence):
            got = f"{tensor} * {sequence} = {tensor * sequence}"
            wanted = f"tensor * sequence to divide the {count(ranks)} (torchrun --nproc-per-node)"
            check.fail("tensor, sequence", wanted, got)
        return Layout(ranks // (tensor * sequence), sequence, tensor)

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled as in one process: the hooks around them are FSDP2's alone,
        which torch.compile knows."""
        return self.tensor * self.sequence == 1

    def check(self, model: LanguageModelConfig, config: TrainingConfig) -> None:
        """Raise ValueError for a model or a run that cannot be divided so."""
        # Imported here: it takes a second.
        from atlas_blocks.recipes.distributed.tensor import check_heads

        if config.batch % self.data:
            check.fail("batch", f"a multiple of the {self.data} ranks of data", config.batch)
        if config.length % self.sequence:
            wanted = f"a multiple of sequence = {self.sequence}"
            check.fail("length", wanted, config.length)
        if model.dim % self.data:
            wanted = f"a divisor of the model's dim = {model.dim}"
            check.fail("ranks of data", wanted, self.data)
        if config.carry and self.tensor * self.sequence > 1:
            check.fail("carry", "tensor = 1 and sequence = 1, whole states", str(self))
        if config.optimizer == "muon" and self.tensor > 1:
            check.fail("optimizer", "adamw with tensor > 1", "muon, which takes whole matrices")
        if self.tensor > 1:
            check_heads(describe.meta_model(model), self.tensor)

    def __str__(self) -> str:
        parts = {"data": self.data, "sequence": self.sequence, "tensor": self.tensor}
        return " x ".join(f"{name} {size}" for name, size in parts.items() if size > 1)


def count(ranks: int) -> str:
    """1 process, 2 processes."""
    return f"{ranks} process{'' if ranks == 1 else 'es'}"


def ranks() -> int:
    """Processes that torchrun started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this one speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def restarts() -> int:
    """How often torchrun has started them again, because one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def own_device(device: str) -> str:
    """That of this rank, where each has one of its own: cuda is cuda:1 for the second."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """This process as one of the group that torchrun's environment describes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # NCCL has nothing for what lies on the host.
    both = f"cpu:gloo,cuda:{backend}" if backend == "nccl" else backend
    where, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
    if size == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
        # torchrun's store outlives those that died, with the addresses at which they were. (Several
        # machines count their restarts each for itself.)
        where = dist.PrefixStore(f"attempt {restarts()}", where)
    dist.init_process_group(both, timeout=PATIENCE, store=where, rank=rank, world_size=size)
    yield
    # Not after an error: the others may be waiting for this one, which leaves.
    dist.destroy_process_group()
