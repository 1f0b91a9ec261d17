"""The layer with exact phi*: its configs, its neutral gates, its bounds. More: test_every_block."""

import pytest
import torch
from helpers import difference, draw
from torch import nn

from atlas_blocks import (
    AtlasMemoryConfig,
    DeepTransformerConfig,
    SlidingWindowAttentionConfig,
    phi_star,
)

PLAIN = DeepTransformerConfig(
    gates="none", qk_norm="none", rope_base=1e4, conv_width=None, output_gate=False
)


@pytest.mark.parametrize("gates", ["none", "neutral"])
def test_without_what_it_adds_the_layer_is_the_attention_block(gates: str) -> None:
    config = SlidingWindowAttentionConfig(window=None, qk_norm=False)
    attention = config.build(16, 2).double()
    layer = PLAIN.replace(gates=gates).build(16, 2).double()
    assert not layer.load_state_dict(attention.state_dict(), strict=False).unexpected_keys
    x = draw(2, 80, 16)
    assert difference([layer(x)[0]], [attention(x)[0]]) < 1e-13


def test_named_systems_are_settings_of_the_rule() -> None:
    systems = {
        "deep-transformer": ("dot", 1),
        "swdt": ("dot", 8),
        "dot": ("l2", 8),
    }
    for name, (objective, window) in systems.items():
        exact, deep = (phi_star(name, memory, window=8) for memory in ("matrix", "mlp"))
        assert isinstance(exact, DeepTransformerConfig)
        assert isinstance(deep, AtlasMemoryConfig)
        for config in (exact, deep):
            assert (config.objective, config.window) == (objective, window)
        assert (deep.memory, deep.feature_map, deep.update) == ("mlp", "taylor_exp", "gd")
        assert not deep.momentum


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("chunk", [1, 16])
def test_repetitive_streams_leave_dot_bounded(chunk: int, window: int) -> None:
    """At default and at extreme gates, whatever repeats: see test_stability for deep memories."""
    extremes = [(30, 30, 30), (7, 30, 0), (5, 0, 30), (-30, 30, 30), (30, -30, -30), None]
    torch.manual_seed(0)
    config = DeepTransformerConfig(
        objective="l2", window=window, chunk_size=chunk, gate_rank=4, normalise=False
    )
    layer = config.build(8 * len(extremes), len(extremes))
    with torch.no_grad():
        for head, logits in enumerate(extremes):
            for name, logit in zip(("alpha", "eta", "gamma"), logits or (), strict=False):
                gate = getattr(layer.gates, name)
                if gate is not None:
                    gate[1].bias.view(len(extremes), -1)[head] = logit
        table = torch.randn(64, layer.dim)
        x = torch.stack([table[torch.randint(n, (600,))] for n in (1, 2, 5, 64)])
        y, state = layer(x)
        values = nn.functional.silu(layer.conv(layer.qkv(x))[0]).abs().max()
        # What a key's own kernel stores: e^scale a_i, of the size of values.
        stored = state.kernel.coefficients.abs().max() * torch.tensor(layer.scale).exp()
    assert y.isfinite().all()
    assert stored < 10 * values


def test_wrong_configs_are_named() -> None:
    for changes, message in (
        ({"objective": "huber"}, "objective: expected one of dot, l2"),
        ({"gates": "open"}, "gates: expected one of learned, neutral, none"),
        ({"gates": "none", "window": 2}, "gates: expected learned or neutral with a window"),
        ({"objective": "l2", "qk_norm": "rms"}, 'qk_norm: expected "unit" with objective="l2"'),
        ({"window": 0}, "window: expected an int >= 1"),
        ({"conv_width": 0}, "conv_width: expected an int >= 1"),
        ({"normalise": "yes"}, "normalise: expected True or False"),
        ({"eta_max": 3.0}, r"eta_max: expected a number in \[1e-06, 2.0\]"),
        ({"errors": "late"}, "errors: expected one of chunk, online, got 'late'"),
        ({"eta_max": 2.0, "objective": "l2"}, 'eta_max: expected at most 1 with errors="online"'),
        ({"rope_base": 0.0}, "rope_base: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepTransformerConfig(**changes)
    for config, dim, heads, message in (
        (DeepTransformerConfig(), 10, 3, "heads: expected a divisor of dim = 10, got 3"),
        (DeepTransformerConfig(kv_heads=2), 12, 3, "kv_heads: expected a divisor of heads = 3"),
        (DeepTransformerConfig(rope_base=9.0), 9, 3, "head width: expected an even number"),
    ):
        with pytest.raises(ValueError, match=message):
            config.build(dim, heads)
    with pytest.raises(ValueError, match="system: expected one of"):
        phi_star("transformer")
    with pytest.raises(ValueError, match="memory: expected one of"):
        phi_star("dot", "linear")
