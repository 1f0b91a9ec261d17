"""Reads a graph after the passes: the ops of ours in it, who serves them, what it computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from atlas_blocks.compile_passes.graph_pass import direction, is_atlas, op_counts, values
from atlas_blocks.compile_passes.lower_ops import inlined, op_nodes
from atlas_blocks.compile_passes.report import OpUse, Work
from atlas_blocks.graph import providers
from atlas_blocks.omega import inline
from atlas_blocks.ops import register_flop_formulas

INLINED = "traced into the graph, and compiled with it but for a walk over chunks"


@dataclass
class Survey:
    """What the graphs of one compile hold. Runs behind the passes and changes nothing.

    balance: the device's FLOPs per byte.
    """

    number: int
    balance: float
    nodes: dict[str, int] = field(default_factory=dict)
    ops: list[OpUse] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def __call__(self, graph: fx.Graph) -> None:
        way = direction(graph)
        self.nodes[way] = op_counts(graph).total()
        self.ops += [_use(self.number, way, found) for found in op_nodes(graph)]
        self.ops += [OpUse(self.number, way, op, inline.NAME, INLINED, {}) for op in inlined(graph)]
        self.work += _work(graph, self.number, way, self.balance)


def _use(number: int, way: str, found: Any) -> OpUse:
    call = found.call
    if call is None:
        inside = "each op inside it chooses when it runs"
        reason = inside if found.provider == "auto" else "asked for, for the ops inside it"
        return OpUse(number, way, found.op, found.provider, reason, {})
    choice = providers.explain_choice(found.op, call)
    if choice.provider == found.provider:
        reason, refusals = f"the first choice on {call.device} that can serve it", choice.refusals
        if found.provider == providers.DEFINITION and not refusals:
            reason = "the only one this op has"
    else:
        reason, refusals = f"asked for; by itself it would take {choice.provider!r}", {}
    return OpUse(number, way, found.op, found.provider, reason, refusals)


def _work(graph: fx.Graph, number: int, way: str, balance: float) -> Iterator[Work]:
    """Ops with a FLOP formula, and ours; the rest is what Inductor fuses."""
    register_flop_formulas()
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    counted: set[str] = set()
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or not (packet in flop_registry or is_atlas(node.target)):
            continue
        inputs, kwargs = values(node.args), values(node.kwargs)
        output = node.meta["val"]
        total = counts[str(packet)]
        total[0] += 1
        if packet in flop_registry:
            args, options, out = pytree.tree_map(_hinted, (inputs, kwargs, output))
            # Formulas marked so read shapes; ours and torch's own are all of that kind.
            counted.add(str(packet))
            total[1] += int(flop_registry[packet](*args, **options, out_val=out))
        tensors = pytree.tree_leaves((inputs, kwargs, output))
        total[2] += sum(_bytes(t) for t in tensors if isinstance(t, Tensor))
    for op, (count, flops, moved) in sorted(counts.items(), key=lambda item: -item[1][1]):
        if op not in counted:
            yield Work(number, way, op, count, None, moved, "unknown")
            continue
        bound = "compute" if flops > balance * moved else "memory"
        yield Work(number, way, op, count, flops, moved, bound)


def _hint(size: Any) -> int:
    """A symbolic size as it was when the graph was traced."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _bytes(t: Tensor) -> int:
    count = 1
    for size in t.shape:
        count *= _hint(size)
    return count * t.element_size()


def _hinted(value: Any) -> Any:
    """A tensor without storage, of the sizes it was traced with."""
    if isinstance(value, Tensor):
        return torch.empty([_hint(n) for n in value.shape], dtype=value.dtype, device="meta")
    return _hint(value) if isinstance(value, torch.SymInt) else value
