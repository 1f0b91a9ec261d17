"""Recipes as models of torchtitan 0.3: its trainer, data and checkpoints around our blocks.

    pip install torchtitan
    PYTHONPATH=examples/torchtitan torchrun --nproc-per-node 8 -m torchtitan.train \
        --module atlas_titan --config omeganet_170m --hf-assets-path TOKENIZER --training.steps 100

TOKENIZER is a folder with a tokenizer.json. torchtitan's trainer needs a GPU. What it divides here:
parameters (--parallelism.data-parallel-shard-degree) and heads
(--parallelism.tensor-parallel-degree). Parts of the text, pipelines and its compile are refused.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import TORCH_DTYPE_MAP, TrainingConfig
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from atlas_blocks import check
from atlas_blocks.recipes import registry
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.distributed import tensor


class Model(BaseModel):
    """A recipe's language model: tokens [B, T] -> logits [B, T, V]."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        recipe: str
        # Of the tokenizer, once that is known; None: the recipe's.
        vocab_size: int | None = None

        def update_from_config(self, *, config: Any, **others: Any) -> None:
            file = Path(config.hf_assets_path) / "tokenizer.json"
            if self.vocab_size is None and file.is_file():
                self.vocab_size = Tokenizer.read(file).vocab_size

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Two operations for each weight and token, three times for a step; the memory's own
            steps are not counted."""
            count = sum(p.numel() for p in model.parameters())
            return count, 6 * count

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        chosen = registry.config(config.recipe)
        if config.vocab_size is not None:
            chosen = chosen.replace(vocab_size=config.vocab_size)
        self.model = chosen.build()

    def forward(self, tokens: Tensor, positions: Tensor | None = None, **others: Any) -> Tensor:
        """positions: [B, T], 0 where a document begins; documents do not see each other."""
        if positions is None:
            return self.model(tokens).logits
        begins = positions == 0
        begins[:, 0] = True  # of a row too
        flat = tokens.flatten()[None]
        bounds = torch.cat(
            [
                begins.flatten().nonzero().flatten(),
                begins.new_tensor([flat.shape[1]], dtype=torch.int64),
            ]
        )
        return self.model(flat, cu_seqlens=bounds.cpu()).logits.view(*tokens.shape, -1)

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        for module in self.model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def verify_module_protocol(self) -> None:
        """Blocks are plain modules; `init_states` resets each."""


def parallelize(
    model: Model,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> Model:
    """Heads over the ranks of "tp", then every block a unit of FSDP2."""
    if parallel_dims.cp_enabled or parallel_dims.pp_enabled:
        check.fail("parallelism", "data and tensor parallelism", "context or pipeline")
    if compile_config.enable or ac_config is not None:
        check.fail("compile, activation_checkpoint", "neither", "one of them")
    inner = model.model
    if parallel_dims.tp_enabled:
        mesh = parallel_dims.get_mesh("tp")
        tensor.check_heads(inner, mesh.size())
        tensor.split(inner, mesh)
    replicated = parallel_dims.dp_replicate_enabled
    mesh = parallel_dims.get_mesh(["dp_replicate", "fsdp"] if replicated else ["fsdp"])
    policy = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
    )
    for unit in (*inner.blocks, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # Its loop divides by the tokens of all ranks.
    disable_fsdp_gradient_division(model)
    return model


def spec(recipe: str) -> ModelSpec:
    """What torchtitan trains."""
    return ModelSpec(
        name="atlas_blocks",
        flavor=recipe,
        model=Model.Config(recipe=recipe),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )


def _trainer(recipe: str, **training: Any) -> Trainer.Config:
    return Trainer.Config(
        loss=CrossEntropyLoss.Config(),
        model_spec=spec(recipe),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=20),
        # A host reads where documents begin, which a CUDA graph cannot.
        training=TrainingConfig(disable_cuda_graphs=True, **training),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4"),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(interval=500),
        activation_checkpoint=None,
    )


def omeganet_170m() -> Trainer.Config:
    return _trainer("omeganet-170m", local_batch_size=8, seq_len=2048, steps=1000)


def atlas_hybrid_tiny() -> Trainer.Config:
    """Small, to try it: on the text that torchtitan brings."""
    return _trainer("atlas-hybrid-tiny", local_batch_size=2, seq_len=128, steps=10)
