"""What a graph computes twice, computed once.

With gradients torch does this itself, to forward and backward as one graph, before it parts them; a
graph without gradients it takes as it is traced. There a rule of one token, and what comes before
it, repeat themselves from layer to layer: positions, lags, windows, tables of features.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable

import torch
from torch import fx
from torch.utils import _pytree as pytree

from atlas_blocks.compile_passes.graph_pass import GraphPass

# Of ops whose results differ for the same arguments, or bring a size of their own.
UNLIKE = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.dynamic_output_shape,
    torch.Tag.data_dependent_output,
}


class CleanUp(GraphPass):
    """A match is a node that went, as an earlier one has the same operation and arguments."""

    name = "clean_up"

    def run(self, graph: fx.Graph) -> int:
        handed_out = _handed_out(graph)
        first: dict[Hashable, fx.Node] = {}
        matches = 0
        for node in list(graph.nodes):
            if node in handed_out or not _repeats(node):
                continue
            same = first.setdefault(_key(node), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
                matches += 1
        return matches


def _repeats(node: fx.Node) -> bool:
    """Whether another node like it gives the same, and nothing else happens."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    unlike = target._schema.is_mutable or "empty" in target._schema.name
    return not unlike and UNLIKE.isdisjoint(target.tags)


def _key(node: fx.Node) -> Hashable:
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    # By what is written: 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    values = (leaf if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf)) for leaf in leaves)
    return node.target, tuple(values), structure


def _handed_out(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory the graph returns, which may not be one for two results."""
    found: set[fx.Node] = set()
    queue = [n for output in graph.find_nodes(op="output") for n in output.all_input_nodes]
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        schema = getattr(node.target, "_schema", None)
        if node.target is operator.getitem or (
            schema is not None and any(r.alias_info is not None for r in schema.returns)
        ):
            queue += node.all_input_nodes
    return found
