"""Named recipes `<architecture>-<size>`: an architecture of architectures.py at a size.

Sizes are the paper's (depth, width, heads); it does not state the width of the MLPs. Each recipe
takes the width that brings its parameters to the number in its name, and every tiny recipe the
width that gives it as many parameters as atlas-mag-tiny.
"""

from __future__ import annotations

import difflib
import functools
from typing import Any

from atlas_blocks.blocks.swiglu import SwiGLU, default_width
from atlas_blocks.recipes import describe
from atlas_blocks.recipes.architectures import ARCHITECTURES, SIZES
from atlas_blocks.recipes.model import BlockConfig, LanguageModel, LanguageModelConfig


def names() -> list[str]:
    """Every recipe, by architecture and then by size."""
    return [f"{architecture}-{size}" for architecture in ARCHITECTURES for size in SIZES]


@functools.cache
def config(name: str) -> LanguageModelConfig:
    """The config of a recipe. Raises ValueError, with near matches, for an unknown name."""
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see atlas_blocks.recipes.names()"
        raise ValueError(f"recipe: {name!r} is unknown; {hint}")
    architecture, _, size_name = name.rpartition("-")
    size = SIZES[size_name]
    start = LanguageModelConfig(
        name=name,
        vocab_size=size.vocab_size,
        dim=size.dim,
        heads=size.heads,
        depth=size.depth,
        block=ARCHITECTURES[architecture](size),
    )
    return fitted(start, target(name), multiple=size.multiple)


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
    reference = LanguageModelConfig(
        name=name,
        vocab_size=size.vocab_size,
        dim=size.dim,
        heads=size.heads,
        depth=size.depth,
        block=ARCHITECTURES["atlas-mag"](size),
    )
    return parameter_count(reference)


def size_note(name: str) -> str:
    """Why a recipe's parameter count differs by more than 10 % from its name; else empty."""
    aim, count = target(name), parameter_count(config(name))
    if abs(count - aim) <= 0.1 * aim:
        return ""
    return (
        f"{count / 1e6:.0f}M instead of {aim / 1e6:.0f}M: with the paper's depth and width, "
        f"the mixers and embeddings alone exceed it; the MLP has the smallest width, "
        f"{config(name).block.mlp_width}."
    )


@functools.cache
def parameter_count(config: LanguageModelConfig) -> int:
    """Parameters of the whole model, counted on one block without filling any.

    Embedding, final norm and head; of a block its MLPs alone grow, with every hidden unit alike.
    """
    outer = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2) + config.dim
    width = config.block.mlp_width or default_width(config.dim)
    block, unit = _least_block(config.block.replace(mlp_width=1), config.dim, config.heads)
    return outer + config.depth * (block + (width - 1) * unit)


@functools.cache
def _least_block(block: BlockConfig, dim: int, heads: int) -> tuple[int, int]:
    """Parameters of a block whose MLPs have one hidden unit, and of those units."""
    built = describe.unfilled_block(block, dim, heads)
    units = sum(describe.parameters_in(m) for m in built.modules() if isinstance(m, SwiGLU))
    return describe.parameters_in(built), units


def fitted(config: LanguageModelConfig, aim: float, *, multiple: int) -> LanguageModelConfig:
    """The config with the MLP width, a multiple of `multiple`, that brings it closest to `aim`
    parameters."""
    least = parameter_count(_with_width(config, multiple))
    slope = parameter_count(_with_width(config, 2 * multiple)) - least
    return _with_width(config, multiple * max(1, 1 + round((aim - least) / slope)))


def _with_width(config: LanguageModelConfig, width: int) -> LanguageModelConfig:
    return config.replace(block=config.block.replace(mlp_width=width))
