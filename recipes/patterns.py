"""Layers in turn in a short form: "3*atlas+transformer", three Atlas blocks, then a Transformer's.

Names are those of ARCHITECTURES, to which `register_block` adds.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from atlas_blocks import check
from atlas_blocks.blocks.stacks import BlockConfig, check_block
from atlas_blocks.recipes.architectures import ARCHITECTURES, Size

Layers = BlockConfig | str | Sequence[BlockConfig | str]
FORM = "a pattern of names such as '3*atlas+transformer'"


def turn_of(layers: Layers, size: Size) -> tuple[BlockConfig, ...]:
    """The block configs of one turn of what LanguageModelConfig takes as its layers.

    Raises ValueError for a malformed pattern, an unknown name (with near ones), and for what is no
    block config.
    """
    if isinstance(layers, str):
        return _turn_of_pattern(layers, size)
    if not isinstance(layers, Sequence):
        check_block("layers", layers)
        return (layers,)
    found: list[BlockConfig] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, str):
            found += _turn_of_pattern(layer, size)
        else:
            check_block(f"layers.{i}", layer)
            found.append(layer)
    if not found:
        check.fail("layers", f"block configs, or {FORM}", "none")
    return tuple(found)


def _turn_of_pattern(pattern: str, size: Size) -> tuple[BlockConfig, ...]:
    found: list[BlockConfig] = []
    for term in pattern.split("+"):
        match = re.fullmatch(r"(?:([1-9][0-9]{0,2}) *\* *)?([^\s*]+)", term.strip())
        if match is None:
            check.fail("layers", FORM, repr(pattern))
        name = match[2]
        if name not in ARCHITECTURES:
            near = difflib.get_close_matches(name, ARCHITECTURES, n=3, cutoff=0.4)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            known = "names of recipes, without a size, or of register_block"
            check.fail("layers", known, repr(name) + hint)
        blocks = ARCHITECTURES[name](size)
        blocks = blocks if isinstance(blocks, tuple) else (blocks,)
        for block in blocks:
            check_block(f"what {name!r} makes", block)
        found += int(match[1] or 1) * blocks
    return tuple(found)
