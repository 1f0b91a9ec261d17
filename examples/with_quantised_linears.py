"""The Linears of a model with integers for weights, by torchao or by bitsandbytes.

    pip install torchao bitsandbytes
    python examples/with_quantised_linears.py

What a memory learns at test time is a state, not a Linear: it stays in full precision.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

from atlas_blocks.recipes.hugging_face import AtlasConfig, AtlasForCausalLM


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those to quantise: not the head, whose weight is the embedding's."""
    found = model.named_modules()
    return {n: m for n, m in found if isinstance(m, nn.Linear) and n != "lm_head"}


def by_torchao(model: nn.Module) -> None:
    """Eight bits; the weights become tensors of its own kind."""
    quantization = importlib.import_module("torchao.quantization")
    chosen = set(linears(model))
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config, filter_fn=lambda _, name: name in chosen)


def by_bitsandbytes(model: nn.Module) -> None:
    """Four bits (nf4); the modules are replaced."""
    layers = importlib.import_module("bitsandbytes.nn")
    for name, linear in linears(model).items():
        new = layers.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4"
        )
        new.load_state_dict(linear.state_dict())
        model.set_submodule(name, new.to(linear.weight.device))


if __name__ == "__main__":
    tokens = torch.arange(30)[None]
    for quantise in (by_torchao, by_bitsandbytes):
        model = AtlasForCausalLM(AtlasConfig.from_recipe("atlas-mac-tiny")).eval()
        true = model(tokens).logits
        quantise(model)
        error = (model(tokens).logits - true).norm() / true.norm()
        print(f"{quantise.__name__}: {error:.4f} of the logits")
