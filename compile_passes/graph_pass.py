"""What every pass is: a name, a uuid, a count of matches, and a record of what it did to a graph.

Most run on Inductor's graphs after autograd, forward and backward, through the option
`post_grad_custom_pre_pass` of one compile; without a uuid torch would not cache the graphs. Some
run before autograd on what Dynamo captured, which is what torch then knows the graph by.
"""

from __future__ import annotations

import abc
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.node import map_arg


@dataclass(frozen=True)
class PassRun:
    """What a pass did to one graph.

    direction: "forward" or "backward". before, after: nodes of the graph that compute something.
    changed: how many more or fewer there are of an op, by its name; an op that a pass only gave
    another argument is not among them.
    """

    name: str
    graph: int
    direction: str
    matches: int
    before: int
    after: int
    changed: dict[str, int]
    seconds: float


class GraphPass(abc.ABC):
    """One pass of compile_passes/. `settings` is whatever changes what it does to a graph."""

    name: str
    settings: str = ""
    before_autograd: bool = False

    @abc.abstractmethod
    def run(self, graph: fx.Graph) -> int:
        """Change the graph in place; how many places were changed."""

    def uuid(self) -> str:
        """Of the pass's source and settings."""
        source = sys.modules[type(self).__module__].__file__
        assert source is not None
        text = Path(source).read_bytes() + repr((self.name, self.settings)).encode()
        return hashlib.sha256(text).hexdigest()


class Passes(CustomGraphPass):
    """Several passes in turn as the one that Inductor takes, each run of them told to `record`.

    then: what the user gave for the same option, run last.
    """

    def __init__(
        self,
        passes: Sequence[GraphPass],
        graph: int = 0,
        record: Callable[[PassRun], None] = lambda run: None,
        then: Sequence[Callable[[fx.Graph], None]] = (),
    ) -> None:
        self.passes, self.graph, self.record, self.then = list(passes), graph, record, list(then)

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.passes:
            before, began = op_counts(graph), time.perf_counter()
            matches = one.run(graph)
            seconds = time.perf_counter() - began
            after = op_counts(graph)
            changed = {op: after[op] - before[op] for op in sorted(before | after)}
            self.record(
                PassRun(
                    name=one.name,
                    graph=self.graph,
                    direction=direction(graph),
                    matches=matches,
                    before=before.total(),
                    after=after.total(),
                    changed={op: n for op, n in changed.items() if n},
                    seconds=seconds,
                )
            )
        for function in self.then:
            function(graph)

    def uuid(self) -> Any:
        """Of all passes; None, and with it no caching, where the user's has none."""
        theirs = [f.uuid() if isinstance(f, CustomGraphPass) else None for f in self.then]
        if None in theirs:
            return None
        return tuple(one.uuid() for one in self.passes) + tuple(map(str, theirs))


def direction(graph: fx.Graph) -> str:
    """ "backward" where the graph takes gradients."""
    tangents = (n for n in graph.find_nodes(op="placeholder") if str(n.target).startswith("tang"))
    return "forward" if next(tangents, None) is None else "backward"


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How many nodes there are of each op."""
    kinds = ("call_function", "call_module", "call_method")
    return Counter(str(n.target) for n in graph.nodes if n.op in kinds)


def is_atlas(target: Any) -> bool:
    """Whether a node calls an op of ours."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "atlas"


def values(argument: Any) -> Any:
    """An argument of a node with fake tensors in place of nodes."""
    return map_arg(argument, lambda node: node.meta["val"])


def bound(node: fx.Node, target: Any) -> dict[str, Any]:
    """The node's arguments by the names of the op's schema."""
    names = [a.name for a in target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
