"""Configs round-trip through dict, JSON and files; what does not fit is named."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from helpers import small_memory

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    Config,
    DeepTransformerConfig,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    SlidingWindowAttentionConfig,
    with_settings,
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
            "mixer: expected AtlasMemoryConfig, .*, got AtlasBlockConfig",
        ),
        (
            {"type": "AtlasBlockConfig", "mixer": {"window": 3}},
            'mixer: expected a dict with a "type"',
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


# --- settings by path, and files ----------------------------------------------------------------

STACK = MemoryAsGateConfig(small_memory(), SlidingWindowAttentionConfig(window=9))


def test_settings_change_what_their_paths_name_and_nothing_else() -> None:
    changed = with_settings(STACK, {"attention.window": "none", "mlp_width": 7, "memory.window": 3})
    memory, attention = STACK.memory.replace(window=3), STACK.attention.replace(window=None)
    assert changed == STACK.replace(memory=memory, attention=attention, mlp_width=7)
    assert with_settings(STACK, {}) == STACK
    # Fields that are allowed together alone.
    descent = {"memory.ns_every": 1, "memory.update": "gd", "memory.errors": "online"}
    assert with_settings(STACK, descent).memory == small_memory(update="gd", errors="online")
    # A whole config, and what lies in it.
    window = {"type": "SlidingWindowAttentionConfig", "window": 5}
    whole = with_settings(STACK, {"attention.kv_heads": 1, "attention": window})
    assert whole.attention == SlidingWindowAttentionConfig(window=5, kv_heads=1)


def test_a_word_that_means_something_is_no_none() -> None:
    assert with_settings(DeepTransformerConfig(), {"gates": "none"}).gates == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory.window": "3"}, "memory.window: expected an int >= 1, got '3'"),
        ({"memory.windw": 3}, "memory: AtlasMemoryConfig field: expected one of .*, got 'windw'"),
        ({"windw": 3}, "^MemoryAsGateConfig field: expected one of .*, got 'windw'"),
        ({"": 3}, "^MemoryAsGateConfig field: expected one of .*, got ''"),
        (
            {"memory.window.x": 3},
            "memory.window.x: expected no more after memory.window, which is 5, got 'x'",
        ),
        ({"memory": 3}, "memory: expected AtlasMemoryConfig or .*, got int"),
        ({"memory": {"window": 3}}, 'memory: expected a dict with a "type", got '),
        (
            {"memory.fixed.0": "alpha"},
            "memory.fixed: expected no place, as it is empty, got '0'",
        ),
    ],
)
def test_a_setting_that_does_not_fit_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(STACK, settings)


TOML = """
type = "MemoryAsGateConfig"
mlp_width = 7
[memory]
type = "AtlasMemoryConfig"
fixed = ["alpha"]
[attention]
type = "SlidingWindowAttentionConfig"
window = "none"
"""
needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads no TOML before")


@needs_toml
def test_a_toml_file_is_the_config_it_says(tmp_path: Path) -> None:
    file = tmp_path / "block.toml"
    file.write_text(TOML)
    memory, attention = AtlasMemoryConfig(fixed=("alpha",)), SlidingWindowAttentionConfig(None)
    true = MemoryAsGateConfig(memory, attention, mlp_width=7)
    assert Config.from_file(file) == MemoryAsGateConfig.from_file(str(file)) == true
    # A class that is asked needs no type.
    file.write_text(TOML.replace('type = "MemoryAsGateConfig"', ""))
    assert MemoryAsGateConfig.from_file(file) == true
    with pytest.raises(ValueError, match=r'block.toml: config: expected a dict with a "type"'):
        Config.from_file(file)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_a_json_file_is_what_to_json_wrote(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    assert Config.from_file(file) == config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", TOML.replace('"none"', "0"), "attention.window: expected an int >= 1, got 0"),
        ("a.toml", TOML.replace("mlp_width", "mlp_size"), "MemoryAsGateConfig field: expected one"),
        ("a.toml", TOML.replace("fixed", "fixd"), "memory: AtlasMemoryConfig field: .* got 'fixd'"),
        ("a.toml", TOML.replace("MemoryAsGate", "LSTM"), "LSTMConfig field: expected one of"),
        ("a.toml", "window = ", "Invalid value"),
        ("a.json", '{"type": "LSTMConfig"}', "type: expected MemoryAsGateConfig, got LSTMConfig"),
        ("a.json", "[]", r'config: expected a dict with a "type", got \[\]'),
        ("a.json", "{", "Expecting property name"),
        ("a.yaml", "", r"suffix: expected one of \.json, \.toml, got '\.yaml'"),
        ("a.json", None, "cannot be read: .*No such file"),
    ],
)
@needs_toml
def test_a_file_that_is_no_config_is_named(tmp_path: Path, name, text, message) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"^config .*{name}: .*{message}"):
        MemoryAsGateConfig.from_file(tmp_path / name)


def test_a_class_of_a_module_that_was_not_imported_is_named() -> None:
    message = "config type: expected a config class of some.models, once that is imported"
    with pytest.raises(ValueError, match=message):
        Config.from_dict({"type": "some.models.Mine"})
