"""Wrong arguments of constructors and inputs of another dtype get one clear error each."""

from dataclasses import replace

import pytest
import torch
from helpers import BLOCKS, DIM, draw, make_block

from atlas_blocks import (
    AtlasBlock,
    AtlasBlockConfig,
    AtlasMemory,
    AtlasMemoryConfig,
    DeepTransformerConfig,
    DeepTransformerLayer,
    MemoryAsContext,
    MemoryAsContextConfig,
    MemoryAsGate,
    MemoryAsGateConfig,
    MemoryAsLayer,
    MemoryAsLayerConfig,
    SlidingWindowAttention,
    SlidingWindowAttentionConfig,
)

KINDS = [
    (AtlasMemory, AtlasMemoryConfig, "window"),
    (DeepTransformerLayer, DeepTransformerConfig, "window"),
    (SlidingWindowAttention, SlidingWindowAttentionConfig, "window"),
    (AtlasBlock, AtlasBlockConfig, "mlp_width"),
    (MemoryAsLayer, MemoryAsLayerConfig, "mlp_width"),
    (MemoryAsGate, MemoryAsGateConfig, "mlp_width"),
    (MemoryAsContext, MemoryAsContextConfig, "segment"),
]


@pytest.mark.parametrize(("block", "config", "field"), KINDS)
def test_a_setting_belongs_into_the_config_of_the_class(block, config, field: str) -> None:
    name = config.__name__
    for arguments, options, message in (
        ((), {field: 4}, rf"{field}: expected it in a config, .*{name}\({field}=4\)"),
        ((), {"windw": 4}, f"{name} field: expected one of .*{field}.*, got 'windw'"),
        (({field: 4},), {}, f"config: expected {name}, got dict"),
        ((None,), {}, f"config: expected {name}, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            block(16, 2, *arguments, **options)
    other = SlidingWindowAttentionConfig() if block is AtlasMemory else AtlasMemoryConfig()
    with pytest.raises(ValueError, match=f"config: expected {name}, got {type(other).__name__}"):
        block(16, 2, other)
    assert f"{field}=4" in repr(block(16, 2, replace(config(), **{field: 4})))
    assert f"{field}=" not in repr(block(16, 2)).split("(mixer_norm)")[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_an_input_of_another_dtype_is_named_or_taken(name: str) -> None:
    block, x = make_block(name, torch.float32), draw(1, 9, DIM, dtype=torch.bfloat16)
    true = block(x.float())[0]

    def off(y: torch.Tensor) -> torch.Tensor:
        return (y.float() - true).norm() / true.norm()

    message = "x: expected dtype torch.float32, that of the weights, or torch.autocast, got .*16"
    if name.startswith(("block", "as", "lstm", "conv")):  # begin with what casts
        assert off(block(x)[0]) < 0.01
    else:
        with pytest.raises(ValueError, match=message):
            block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert off(block(x)[0]) < 0.05
