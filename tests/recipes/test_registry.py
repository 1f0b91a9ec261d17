"""Every recipe: builds on meta at every size, round-trips, and has the parameters it names."""

import pytest
import torch

from atlas_blocks import Config
from atlas_blocks.recipes import describe, display, registry

TINY = [name for name in registry.names() if name.endswith("-tiny")]


@pytest.mark.parametrize("name", registry.names())
def test_builds_on_meta_and_counts_agree(name):
    config = registry.config(name)
    model = describe.meta_model(config)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.parameter_count() == registry.parameter_count(config)
    assert all(layer.mlp_width > 0 for layer in config.layers)


@pytest.mark.parametrize("name", registry.names())
def test_round_trips_through_json(name):
    config = registry.config(name)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", registry.names())
def test_parameters_meet_the_name_or_say_why(name):
    count, aim = registry.parameter_count(registry.config(name)), registry.target(name)
    within = abs(count - aim) <= 0.1 * aim
    assert within == (registry.size_note(name) == "")


def test_tiny_recipes_have_one_parameter_count():
    counts = [registry.parameter_count(registry.config(name)) for name in TINY]
    assert max(counts) - min(counts) < 0.02 * min(counts)


def test_unknown_names_suggest_near_ones():
    with pytest.raises(ValueError, match="atlas-mag-tiny"):
        registry.config("atlas-mag-tinny")
    with pytest.raises(ValueError, match="unknown"):
        registry.build("")


def test_overrides_replace_fields():
    assert registry.build("omeganet-tiny", depth=1, vocab_size=7).config.depth == 1
    with pytest.raises(ValueError, match="deepth"):
        registry.build("omeganet-tiny", deepth=1)
    with pytest.raises(ValueError, match="heads"):
        registry.build("omeganet-tiny", heads=5)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tokens", [1, 70])
def test_stated_state_size_is_the_real_one(name, tokens):
    config = registry.config(name)
    with torch.no_grad():
        _, state = config.build()(torch.zeros(1, tokens, dtype=torch.int64))
    assert state.nbytes == describe.state_bytes(config, tokens)


def test_numbers_for_people():
    assert [describe.human(n) for n in (7, 1234, 193_598, 1.3e9)] == ["7", "1.23k", "194k", "1.30B"]
    assert describe.human(93_700, "B") == "93.7 kB"


@pytest.mark.parametrize("size", list(registry.SIZES))
def test_no_two_recipes_of_a_size_look_alike(size):
    configs = [registry.config(f"{name}-{size}") for name in registry.ARCHITECTURES]
    looks = [(describe.pattern(c), describe.gates(c)) for c in configs]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": False},
        {"layers": registry.config("atlas-mal-tiny").layers[0].replace(mlp_width=None)},
        {
            "layers": registry.config("atlas-mac-tiny")
            .layers[0]
            .replace(mlp_width=None, mlp="relu2")
        },
        {"layers": "samba+lstm+sliding-window", "depth": 5},
        {"depth": 5, "vocab_size": 77},
    ],
)
def test_counts_agree_away_from_the_recipes(changes):
    config = registry.config("omeganet-tiny").replace(**changes)
    assert config.build().parameter_count() == registry.parameter_count(config)


def test_the_table_builds_each_kind_of_block_once():
    """What it takes its time for: a whole model of each recipe would be minutes."""
    cached = (registry._recipe, registry.target, registry.parameter_count, registry._least_block)
    for function in (*cached, describe.unfilled_block):
        function.cache_clear()
    display.recipe_table()
    configs = [registry.config(name) for name in registry.names()]
    kinds = {(block, c.dim, c.heads) for c in configs for block in c.layers}
    assert describe.unfilled_block.cache_info().misses <= 1.1 * len(kinds)


def test_counting_leaves_no_trace():
    """Nothing stays switched off, and no number is drawn."""
    before = torch.get_rng_state()
    describe.unfilled_block.cache_clear()
    describe.state_bytes(registry.config("atlas-mac-tiny"), 3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.nn.Linear(9, 9).weight.isfinite().all()
    assert torch.zeros_like(torch.ones(3)).sum() == 0


def test_settings_reach_every_memory_layer_and_nothing_else() -> None:
    before = registry.config("sliding-window-hybrid-tiny")
    after = registry.with_memory(before, window=3, eta_init=0.25)
    memories = [block.mixer for block in after.layers if hasattr(block.mixer, "eta_init")]
    assert memories
    assert all(m.window == 3 and m.eta_init == 0.25 for m in memories)
    back = [
        block.replace(mixer=old.mixer)
        for block, old in zip(after.layers, before.layers, strict=True)
    ]
    assert after.replace(layers=tuple(back)) == before
    assert registry.with_memory(registry.config("transformer-tiny"), window=3) == registry.config(
        "transformer-tiny"
    )
    inside = registry.with_memory(registry.config("atlas-mac-tiny"), window=3)
    assert all(block.memory.window == 3 for block in inside.layers)
    with pytest.raises(ValueError, match=r"config: expected a config, .*, got 'titans-tiny'"):
        registry.with_memory("titans-tiny", window=3)
    for config in (before, registry.config("transformer-tiny")):
        with pytest.raises(ValueError, match=r"AtlasMemoryConfig field: expected .*, got 'windw'"):
            registry.with_memory(config, windw=3)


def test_equal_layers_of_a_recipe_are_one_config() -> None:
    """A config for each would be checked for each: most of what counting all recipes takes."""
    for name in ("atlas-340m", "atlas-hybrid-170m"):
        layers = registry.config(name).layers
        assert len({id(layer) for layer in layers}) == len(set(layers)) < len(layers)
