"""Tiny models of Hugging Face transformers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

LIKE_LLAMA = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
              "gemma": "Gemma"}  # fmt: skip


def model_config(kind: str, **changes: Any) -> Any:
    import transformers

    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
            eos_token_id=0, scale_attn_by_inverse_layer_idx=True, **changes,
        )  # fmt: skip
    if kind == "gpt_neox":
        return transformers.GPTNeoXConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, bos_token_id=0, eos_token_id=0, **changes,
        )  # fmt: skip
    if kind == "phi":
        return transformers.PhiConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, **changes,
        )  # fmt: skip
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 500.0,
        "pad_token_id": None,
    }
    if kind == "mistral":
        small["sliding_window"] = None
    return getattr(transformers, f"{LIKE_LLAMA[kind]}Config")(**(small | changes))


def language_model(kind: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "phi": "PhiForCausalLM"}
    name = names[kind] if kind in names else f"{LIKE_LLAMA[kind]}ForCausalLM"
    return getattr(transformers, name)(model_config(kind, **changes)).eval()


def attention_class(kind: str) -> Any:
    """Of a model like Llama."""
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    return getattr(module, f"{LIKE_LLAMA[kind]}Attention")
