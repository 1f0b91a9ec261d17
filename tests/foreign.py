"""Tiny models of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
    }
    return LlamaConfig(**(small | changes))


def language_model(kind: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(llama_config(**changes)).eval()
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0, scale_attn_by_inverse_layer_idx=True, **changes,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()
