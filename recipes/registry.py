"""Named recipes `<architecture>-<size>`: an architecture of architectures.py at a size.

In place of an architecture a pattern may stand: "3*atlas+transformer-tiny". Sizes are the paper's
(depth, width, heads); it does not state the width of the MLPs. Each recipe takes the width that
brings its parameters to the number in its name, and every tiny recipe the width that gives it as
many parameters as atlas-mag-tiny.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import re
from pathlib import Path
from typing import Any, TypeVar

from atlas_blocks import AtlasMemoryConfig, Config, check
from atlas_blocks.blocks.feed_forward import MixtureOfExperts, SquaredReLU, SwiGLU, default_width
from atlas_blocks.blocks.stacks import STACKS, BlockConfig
from atlas_blocks.recipes import describe
from atlas_blocks.recipes.architectures import ARCHITECTURES, SIZES, Architecture, Size
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig
from atlas_blocks.recipes.patterns import turn_of

C = TypeVar("C", bound=Config)
SHIPPED = frozenset(ARCHITECTURES)


def names() -> list[str]:
    """Every recipe, by architecture and then by size."""
    return [f"{architecture}-{size}" for architecture in ARCHITECTURES for size in SIZES]


def register_block(name: str, factory: Architecture) -> None:
    """Let `name` stand in patterns and in recipes' names, for what factory(size) returns: a block
    config, or a tuple of those of one turn.

    A name registered before takes the new meaning. Raises ValueError for a name of a recipe that
    is here already, and for one that is not made of letters, digits, points, _ and -.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", name):
        check.fail("name", "letters, digits, points, _ and -, a letter first", repr(name))
    if name in SHIPPED:
        check.fail("name", "one that no recipe has", repr(name))
    if not callable(factory):
        check.fail("factory", "a function of a Size", type(factory).__name__)
    ARCHITECTURES[name] = factory
    _recipe.cache_clear()


def is_file(name: str) -> bool:
    """Whether `name` is that of a config's file."""
    return Path(name).suffix in (".toml", ".json")


def is_composed(name: str) -> bool:
    """Whether it says what it is made of, as a pattern and a config's file do."""
    return is_file(name) or "+" in name or "*" in name


def is_recipe(name: str) -> bool:
    """Whether `name` is that of a recipe, or a pattern at a size."""
    try:
        _recipe(name)
    except ValueError:
        return False
    return True


def config(name: str) -> LanguageModelConfig:
    """The config of a recipe, of a pattern at a size ("3*atlas+transformer-tiny"), or of the .toml
    or .json file called `name`.

    Raises ValueError, with near matches, for an unknown name.
    """
    return LanguageModelConfig.from_file(name) if is_file(name) else _recipe(name)


@functools.cache
def _recipe(name: str) -> LanguageModelConfig:
    architecture, _, size_name = name.rpartition("-")
    known = architecture in ARCHITECTURES or is_composed(architecture)
    if size_name not in SIZES or not known:
        raise ValueError(f"recipe: {name!r} is unknown; {_near(name)}")
    size = SIZES[size_name]
    start = _at_size(name, architecture, size)
    return fitted(start, target(name), multiple=size.multiple)


def _near(name: str) -> str:
    """What somebody may have meant."""
    architecture, dash, size = name.rpartition("-")
    if is_composed(name):
        ends = difflib.get_close_matches(size, SIZES, n=1, cutoff=0.4) if dash else []
        # Without a near one the dash may be that of a name, and the size missing.
        known = [f"{architecture}-{end}" for end in ends] or [f"{name}-{end}" for end in SIZES]
        return f"did you mean {', '.join(known)}?"
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else "see atlas_blocks.recipes.names()"


def _at_size(name: str, architecture: str, size: Size) -> LanguageModelConfig:
    """At least one turn of its layers, with MLPs of the default width."""
    turn = turn_of(architecture, size)
    return LanguageModelConfig(
        name=name,
        vocab_size=size.vocab_size,
        dim=size.dim,
        heads=size.heads,
        depth=max(size.depth, len(turn)),
        layers=turn,
    )


def build(name: str, **overrides: Any) -> LanguageModel:
    """The model of a recipe, freshly initialised; overrides replace fields of its config.

    Raises ValueError for an unknown recipe or field.
    """
    return config(name).replace(**overrides).build()


@functools.cache
def target(name: str) -> float:
    """Parameters that a recipe aims at: the paper's size, or atlas-mag-tiny's count for tiny."""
    size = SIZES[name.rpartition("-")[2]]
    if size.parameters is not None:
        return size.parameters
    return parameter_count(_at_size(name, "atlas-mag", size))


def size_note(name: str) -> str:
    """Why a recipe's parameter count differs by more than 10 % from its name; else empty."""
    aim, count = target(name), parameter_count(config(name))
    if abs(count - aim) <= 0.1 * aim:
        return ""
    width = next(b.mlp_width for b in config(name).layers if isinstance(b, STACKS))
    return (
        f"{count / 1e6:.0f}M instead of {aim / 1e6:.0f}M: with the paper's depth and width, "
        f"the mixers and embeddings alone exceed it; the MLP has the smallest width, {width}."
    )


@functools.cache
def parameter_count(config: LanguageModelConfig) -> int:
    """Parameters of the whole model, counted on one block of each kind without filling any.

    Embedding, final norm and head; of a block its MLPs alone grow, with every hidden unit alike.
    """
    outer = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2) + config.dim
    kinds = collections.Counter(config.layers)
    return outer + sum(
        count * _block_count(block, config.dim, config.heads) for block, count in kinds.items()
    )


def _block_count(block: BlockConfig, dim: int, heads: int) -> int:
    if not isinstance(block, STACKS):
        return describe.parameters_in(describe.unfilled_block(block, dim, heads))
    least, unit = _least_block(describe.least_mlp(block), dim, heads)
    return least + ((block.mlp_width or default_width(dim, block.mlp)) - 1) * unit


@functools.cache
def _least_block(block: BlockConfig, dim: int, heads: int) -> tuple[int, int]:
    """Parameters of a block whose MLPs have one hidden unit, and of those units."""
    built = describe.unfilled_block(block, dim, heads)
    kinds = (SwiGLU, SquaredReLU, MixtureOfExperts)
    # A mixer of somebody's may have an MLP too, of another width.
    mlps = [m for m in built.modules() if isinstance(m, kinds) and m.width == 1]
    # A router does not grow.
    units = [
        describe.parameters_in(m)
        - (describe.parameters_in(m.router) if isinstance(m, MixtureOfExperts) else 0)
        for m in mlps
    ]
    return describe.parameters_in(built), sum(units)


def fitted(config: LanguageModelConfig, aim: float, *, multiple: int) -> LanguageModelConfig:
    """The config with the MLP width, a multiple of `multiple`, that brings it closest to `aim`
    parameters; as it is where no block has an MLP to fit."""
    least = parameter_count(_with_width(config, multiple))
    slope = parameter_count(_with_width(config, 2 * multiple)) - least
    if not slope:
        return config
    return _with_width(config, multiple * max(1, 1 + round((aim - least) / slope)))


def with_memory(config: C, **settings: Any) -> C:
    """A config with these settings of AtlasMemoryConfig in every memory layer that it holds.

    Raises ValueError for a name that is none of its fields, and for a value out of range.
    """
    if not isinstance(config, Config):
        check.fail("config", "a config, such as registry.config(name)", repr(config))
    known = [field.name for field in dataclasses.fields(AtlasMemoryConfig)]
    for name in settings:
        check.choice("AtlasMemoryConfig field", name, known)

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return with_memory(value, **settings) if isinstance(value, Config) else value

    if isinstance(config, AtlasMemoryConfig):
        return config.replace(**settings)
    fields = (field.name for field in dataclasses.fields(config))
    return config.replace(**{name: changed(getattr(config, name)) for name in fields})


def _with_width(config: LanguageModelConfig, width: int) -> LanguageModelConfig:
    """All of its MLPs of this width."""

    def changed(block: BlockConfig) -> BlockConfig:
        return block.replace(mlp_width=width) if isinstance(block, STACKS) else block

    made = {id(block): changed(block) for block in {id(b): b for b in config.layers}.values()}
    return config.replace(layers=tuple(made[id(block)] for block in config.layers))
