"""Windowed attention in the place of attention with a band mask written out, in any model.

Runs on Dynamo's graph, before autograd, so that the gradient follows by itself. The mask is not
recognised but computed: where it depends on no input and no parameter, and nothing writes to it, it
is the same at every call of a graph with fixed lengths, and what counts is whether it is a causal
band. With symbolic lengths nothing is changed. `sliding_window_attention` then does the products
inside the window alone, and takes the fastest backend that can be traced here; no [T, T] mask is
left.

B batch, H heads, T tokens, D head width, w window.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.node import map_arg

from atlas_blocks.attention.definition import choose_backend, sliding_window_attention
from atlas_blocks.compile_passes.graph_pass import GraphPass

# Where it pays: on one CPU core (4 heads of 64) forward and backward are 1.9 times as fast at
# T = 512 and w = 128, 6 times at T = 2048 and w = 128, even at T = 2 w, and slower below T = 512.
SHORTEST, WINDOWS = 512, 4
# A mask is computed once, when compiling; this many entries are a second's work.
LARGEST = 2**28
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def windowed(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """[B, H, T, D] each -> [B, H, T, D], as torch lays attention out."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    backend, _ = choose_backend(q, k, v, window=window)
    # FlexAttention compiles itself, which cannot be done inside of a compile.
    backend = "sdpa" if backend == "flex" else backend
    return sliding_window_attention(q, k, v, window=window, backend=backend).transpose(1, 2)


class SelectAttention(GraphPass):
    """A match is an attention with a band mask, put into its windowed form.

    skipped: why other masked attentions were left as they are.
    """

    name = "select_attention"
    before_autograd = True

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def run(self, graph: fx.Graph) -> int:
        matches = 0
        unused: set[fx.Node] = set()
        bands: dict[fx.Node, int | str] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
                continue
            arguments: dict[str, Any] = dict(zip(ARGUMENTS, node.args, strict=False))
            arguments |= node.kwargs
            mask = arguments.get("attn_mask")
            if not isinstance(mask, fx.Node):
                continue
            found = _refusal(arguments)
            if found is None:
                if mask not in bands:
                    bands[mask] = _band(mask)
                found = bands[mask]
            if isinstance(found, str):
                self.skipped.append(found)
                continue
            with graph.inserting_before(node):
                qkv = (arguments[name] for name in ("query", "key", "value"))
                new = graph.call_function(windowed, (*qkv, found))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            unused |= _ancestors(mask)
            matches += 1
        # Not eliminate_dead_code, which takes edits in place with it: their results have no use.
        for node in reversed(list(graph.nodes)):
            if node in unused and not node.users:
                graph.erase_node(node)
        return matches


def _refusal(arguments: dict[str, Any]) -> str | None:
    """What besides the mask keeps a call as it is."""
    q, k, v = (arguments[name].meta["example_value"] for name in ("query", "key", "value"))
    if q.ndim != 4 or q.shape[:3] != k.shape[:3] or v.shape != k.shape:
        return "queries, keys and values are not all [B, H, T, D]"
    if len({q.dtype, k.dtype, v.dtype}) > 1:  # as autocast may leave them, and takes them
        return f"queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}"
    if any(isinstance(n, torch.SymInt) for n in q.shape):
        return "lengths are symbolic: the mask is another at every length"
    if arguments.get("dropout_p", 0.0) != 0.0 or arguments.get("is_causal", False):
        return "dropout, or a mask that is not all there is"
    scale = arguments.get("scale")
    if scale is not None and abs(scale - q.shape[-1] ** -0.5) > 1e-9:
        return f"scale {scale} is not D ** -0.5"
    return None


def _band(mask: fx.Node) -> int | str:
    """The window of a causal band mask, or why it is none."""
    shape = mask.meta["example_value"].shape
    if len(shape) < 2 or any(isinstance(n, torch.SymInt) for n in shape):
        return "the mask's size is symbolic"
    T, S = shape[-2:]
    if T != S or any(n != 1 for n in shape[:-2]):
        return f"the mask is {list(shape)}, not one of [T, T]"
    if T * S > LARGEST:
        return f"the mask has {T * S} entries"
    needed = _ancestors(mask)
    if any(n.op not in ("call_function", "call_method") or n.is_impure() for n in needed):
        return "the mask depends on inputs"
    if any("_functorch" in str(n.target) for n in needed):
        return "the mask is made inside of a vmap, whose levels other nodes open"
    if _written(mask.graph, needed):
        return "the mask is edited in place"
    value = _value(mask, needed)
    value = value.reshape(T, T)
    seen = value if value.dtype == torch.bool else value == 0
    if value.dtype != torch.bool and not (value[~seen] <= -1e4).all():
        return "the mask adds more than 0 and -inf"
    window = int(seen[-1].sum())
    if T < SHORTEST or not 1 <= window <= T // WINDOWS:
        return f"no gain: its last row sees {window} of {T} keys"
    i = torch.arange(T, device=seen.device)
    distance = i[:, None] - i
    if not torch.equal(seen, (distance >= 0) & (distance < window)):
        return "the mask is no causal band"
    return window


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    needed, queue = {node}, [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                queue.append(source)
    return needed


def _written(graph: fx.Graph, nodes: set[fx.Node]) -> bool:
    """Whether anything in the graph writes to memory of these nodes.

    By the versions of the tensors it was traced with: writes have too many forms to be recognised
    (setitem, masked_fill_, out=, .data), and their results need have no use. An op or a kernel of
    somebody's may write and leave the version as it was: its schema says so, or nothing does.
    """

    def memory(node: fx.Node) -> int | None:
        value = node.meta.get("example_value")
        return value.untyped_storage()._cdata if isinstance(value, Tensor) else None

    theirs = {memory(n) for n in nodes} - {None}
    for node in graph.nodes:
        if memory(node) in theirs and node.meta["example_value"]._version > 0:
            return True
        if _may_write(node) and any(memory(n) in theirs for n in node.all_input_nodes):
            return True
    return False


def _may_write(node: fx.Node) -> bool:
    """Whether it is an op that writes to an argument by its schema, or that has no schema."""
    target: Any = node.target
    if isinstance(target, OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
        return any(op._schema.is_mutable for op in overloads)
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    return isinstance(target, HigherOrderOperator)


def _value(node: fx.Node, needed: set[fx.Node]) -> Tensor:
    """What a node computes from nothing but these."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for n in node.graph.nodes:
            if n in needed:
                args, kwargs = (map_arg(g, lambda m: values[m]) for g in (n.args, n.kwargs))
                if n.op == "call_function":
                    values[n] = n.target(*args, **kwargs)
                else:
                    values[n] = getattr(args[0], n.target)(*args[1:], **kwargs)
    return values[node]
