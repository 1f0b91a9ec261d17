"""Inductor with all kernels of a graph on a CPU in one C++ program: the compiler starts once for
all of them, and nothing between them is Python's (Inductor's own `cpp_wrapper`)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

# Of torch; nothing here was tried with an earlier one.
SINCE = (2, 13)
# Whose ops a program is known to call rightly.
LIBRARIES = {"aten", "atlas", "inductor", "prims"}


def options(inputs: Sequence[Any]) -> dict[str, Any]:
    """Inductor's options for a graph of these inputs, tensors and sizes."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if version < SINCE or not tensors or any(t.device.type != "cpu" for t in tensors):
        return {}
    _no_word_of_shims()
    return {"cpp_wrapper": True}


def fits(graph: fx.GraphModule) -> bool:
    """Whether a program calls all ops of Inductor's graph rightly, those of graphs within it too.

    Of a list of one tensor torch 2.13 reads the tensor where the list is, and the process dies; it
    writes a string into the program as it stands. So a graph with such a list, or with an op of
    somebody else's, gets a program a kernel. What Inductor writes out itself it does not call.
    """
    parts = [part for part in graph.modules() if isinstance(part, fx.GraphModule)]
    nodes = [node for part in parts for node in part.graph.nodes]
    ops = [node for node in nodes if isinstance(node.target, torch._ops.OpOverload)]
    return not any(
        node.target.namespace not in LIBRARIES or _lists_one_tensor(node) for node in ops
    )


def _lists_one_tensor(node: fx.Node) -> bool:
    from torch._inductor import lowering

    if node.target in lowering.lowerings and node.target not in lowering.fallbacks:
        return False
    returns: Any = node.target._schema.returns  # type: ignore[union-attr]
    if len(returns) != 1 or not isinstance(returns[0].type, torch.ListType):
        return False
    # Unknown is as bad.
    return len(node.meta.get("val", ())) < 2


def inductor(
    graph: fx.GraphModule, inputs: Sequence[Any], settings: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend of torch.compile. settings: of Inductor; they come before `options`."""
    from torch._inductor.compile_fx import compile_fx

    both = {**options(inputs), **(settings or {})}
    return compile_fx(graph, list(inputs), inner_compile=_inner, config_patches=both)  # type: ignore[return-value]


def _inner(graph: fx.GraphModule, inputs: Sequence[Any], **arguments: Any) -> Any:
    """Inductor's part for one graph, a forward or a backward."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    if not arguments.get("cpp_wrapper") or fits(graph):
        return compile_fx_inner(graph, inputs, **arguments)
    arguments["cpp_wrapper"] = False
    with config.patch(cpp_wrapper=False):
        return compile_fx_inner(graph, inputs, **arguments)


@functools.cache
def _no_word_of_shims() -> None:
    """Inductor warns of every op, such as solve_triangular, that the program calls through torch's
    dispatcher."""
    logging.getLogger("torch._inductor.ir").addFilter(
        lambda record: "c-shim implementation" not in str(record.msg)
    )
