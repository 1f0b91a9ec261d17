"""FSDP2 by hand around a model of transformers: sharded, trained, saved as one folder.

torchrun --nproc-per-node 2 examples/with_fsdp2.py FOLDER
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from atlas_blocks.recipes.hugging_face import AtlasConfig, AtlasForCausalLM


def main(folder: str) -> None:
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")

    torch.manual_seed(0)
    model = AtlasForCausalLM(AtlasConfig.from_recipe("atlas-mag-tiny")).to(device)
    mesh = dist.device_mesh.init_device_mesh(device.type, (count,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the rest: the embedding, which is the head too, and the norm

    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    tokens = (torch.arange(24) + 5 * torch.arange(4)[:, None]).to(device)
    part = tokens.chunk(count)[rank]
    for step in range(4):
        loss = model(part, labels=part).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # One write a line: the processes share the output.
        print(f"{rank} {step} {loss.item()}\n", end="")

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder, state_dict=weights)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
