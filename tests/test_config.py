"""Configs round-trip through dict and JSON; what does not fit is named."""

import dataclasses
import json

import pytest
from helpers import small_memory

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    Config,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    SlidingWindowAttentionConfig,
)

CONFIGS = [
    AtlasMemoryConfig(),
    small_memory(memory="gated_mlp", objective="dot", update="gd", errors="chunk", sketch_width=33),
    SlidingWindowAttentionConfig(window=None, sink_tokens=3),
    AtlasBlockConfig(SlidingWindowAttentionConfig(window=5), mlp_width=7),
    MemoryAsLayerConfig(small_memory(window=3)),
    MemoryAsGateConfig(small_memory(degree=3), combine="product"),
    MemoryAsContextConfig(small_memory(ns_every=4), segment=9, rope_base=5e5),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_dict_and_json_give_the_config_back(config: Config) -> None:
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_json(config.to_json()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(Config.from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_field_left_out_takes_its_default(config: Config) -> None:
    kind = type(config)
    assert Config.from_dict({"type": kind.__name__}) == kind()


def test_replace_changes_and_checks() -> None:
    config = AtlasMemoryConfig()
    assert config.replace(window=3).window == 3
    assert config.window == 16
    with pytest.raises(ValueError, match=r"AtlasMemoryConfig field: expected one of .*'windw'"):
        config.replace(windw=3)
    with pytest.raises(ValueError, match="window: expected an int >= 1, got 0"):
        config.replace(window=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r'config: expected a dict with a "type", got \[\]'),
        ({}, r'config: expected a dict with a "type", got \{\}'),
        ({"type": "Atlas"}, "config type: expected one of .*AtlasMemoryConfig.*, got 'Atlas'"),
        (
            {"type": "AtlasMemoryConfig", "windw": 3},
            "AtlasMemoryConfig field: expected one of .*window.*, got 'windw'",
        ),
        (
            {"type": "AtlasMemoryConfig", "window": "3"},
            "window: expected an int >= 1, got '3'",
        ),
        (
            {"type": "AtlasBlockConfig", "mixer": {"type": "AtlasBlockConfig"}},
            "mixer: expected AtlasMemoryConfig or .*, got AtlasBlockConfig",
        ),
        (
            {"type": "AtlasBlockConfig", "mixer": {"window": 3}},
            'config: expected a dict with a "type"',
        ),
    ],
)
def test_a_dict_that_is_no_config_is_named(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "window = 3", '{"type": "AtlasMemoryConfig"'])
def test_text_that_is_no_json_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="config: expected JSON, got"):
        Config.from_json(text)


@pytest.mark.parametrize("name", ["memory", "update", "feature_map", "momentum"])
def test_a_list_where_a_word_belongs_is_a_value_error(name: str) -> None:
    """JSON can hold anything: an unhashable value is a wrong value, not a crash."""
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Config.from_dict({"type": "AtlasMemoryConfig", name: ["mlp"]})


def make(name: str, module: str = "somebody.models", **fields: int) -> type[Config]:
    """A config class of somebody's, as its module defines it."""
    body = {"__annotations__": dict.fromkeys(fields, int), "__module__": module, **fields}
    return dataclasses.dataclass(frozen=True)(type(name, (Config,), body))


@pytest.fixture
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "_classes", dict(Config._classes))


@pytest.mark.usefixtures("_as_before")
def test_a_class_of_the_same_name_takes_nobody_s_place() -> None:
    shipped = AtlasMemoryConfig(window=3)
    text = shipped.to_json()
    theirs = make("AtlasMemoryConfig", width=1)(5)
    assert Config.from_json(text) == shipped
    assert json.loads(text)["type"] == "AtlasMemoryConfig"
    assert Config.from_json(theirs.to_json()) == theirs
    assert type(Config.from_json(theirs.to_json())) is type(theirs)
    other = make("AtlasMemoryConfig", "else.where", depth=1)(7)
    assert [Config.from_json(c.to_json()) for c in (theirs, other)] == [theirs, other]


@pytest.mark.usefixtures("_as_before")
def test_a_class_defined_again_is_the_newest_and_old_files_find_it() -> None:
    make("Mine", width=1)
    newest = make("Mine", width=1)
    for name in ("somebody.models.Mine", "Mine"):  # files of before have the name alone
        assert type(Config.from_dict({"type": name, "width": 4})) is newest
    make("Mine", "else.where", width=1)
    with pytest.raises(ValueError, match=r"config type: expected one of .*else\.where\.Mine"):
        Config.from_dict({"type": "Mine", "width": 4})
    with pytest.raises(ValueError, match="config type: expected one of"):
        Config.from_dict({"type": ["Mine"]})
