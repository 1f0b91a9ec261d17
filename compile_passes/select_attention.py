"""Windowed attention in the place of attention with a band mask written out, in any model.

Runs on Dynamo's graph, before autograd, so that the gradient follows by itself. The mask is not
recognised but computed: where it depends on no input and no parameter it is the same at every call
of a graph with fixed lengths, and what counts is whether it is a causal band. With symbolic lengths
nothing is changed. `sliding_window_attention` then does the products inside the window alone, and
takes the fastest backend that can be traced here; no [T, T] mask is left.

B batch, H heads, T tokens, D head width, w window.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_arg

from atlas_blocks.compile_passes.graph_pass import GraphPass
from atlas_blocks.functional.attention import choose_backend, sliding_window_attention

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
            matches += 1
        if matches:
            graph.eliminate_dead_code()
        return matches


def _refusal(arguments: dict[str, Any]) -> str | None:
    """What besides the mask keeps a call as it is."""
    q, k, v = (arguments[name].meta["example_value"] for name in ("query", "key", "value"))
    if q.ndim != 4 or q.shape[:3] != k.shape[:3] or v.shape != k.shape:
        return "queries, keys and values are not all [B, H, T, D]"
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
    value = _constant(mask)
    if value is None:
        return "the mask depends on inputs"
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


def _constant(node: fx.Node) -> Tensor | None:
    """What a node computes, None where that depends on an input or cannot be computed alone."""
    needed, queue = {node}, [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                queue.append(source)
    if any(n.op not in ("call_function", "call_method") or n.is_impure() for n in needed):
        return None
    if any("_functorch" in str(n.target) for n in needed):
        return None  # inside of a vmap, whose levels other nodes open
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
