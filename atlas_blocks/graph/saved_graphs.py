"""What a node's forward leaves to its backward beside tensors: autograd's graph.

A compiled graph hands a node's backward tensors alone, so that it would compute its forward again.
On a CPU, where a node's body is Python in the same process, the graph that autograd built in the
forward waits here instead, under a tensor, the key, that the compiled graph saves as it saves
others; it is freed with the key, or by the backward. A key that is not known here, because a
checkpoint copied it or the backward is run twice, costs the forward again and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _autograd
from torch.utils.weak import WeakTensorKeyDictionary

from atlas_blocks.graph.contract import own, recording

# Of the call's largest stream, such as [B, T, H, D]: what is kept is some twenty times that, as
# under plain autograd. Longer calls compute again, a few chunks at a time.
LARGEST = 2**22

_graphs = WeakTensorKeyDictionary()


def no_key(like: Tensor) -> Tensor:
    """A key that nothing is kept under."""
    return torch.empty(0, device=like.device)


def serves(stream: Tensor, size: int | None = None) -> bool:
    """Whether to keep the graph of a call with this stream, or of one of `size` numbers.

    Not where hooks say what becomes of saved tensors, as under a checkpoint: they would be called
    for every tensor of the graph, of which they are to know nothing.
    """
    if _autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    return stream.device.type == "cpu" and (stream.numel() if size is None else size) <= LARGEST


def keep(
    run: Callable[[list[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    wanted: list[bool],
    key: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Copies of what `run` returns, and the key of its graph, which may be given."""
    # Of copies: a compiled graph may write over what its nodes have read.
    begin = leaves([own(t) for t in tensors], wanted)
    with recording(), torch.enable_grad():
        outputs = run(begin)
    key = no_key(tensors[0]) if key is None else key
    _graphs[key] = (outputs, begin)
    return [own(t.detach()) for t in outputs], key


def gradients(key: Tensor, grads: Sequence[Tensor]) -> list[Tensor] | None:
    """Of the wanted tensors, given those of the floating results; None for an unknown key."""
    graph = _graphs.pop(key, None)
    return None if graph is None else differentiate(graph[0], graph[1], grads)


def leaves(tensors: Sequence[Tensor], wanted: list[bool]) -> list[Tensor]:
    """The tensors as leaves of a graph."""
    return [t.detach().requires_grad_(one) for t, one in zip(tensors, wanted, strict=True)]


def differentiate(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the leaves that require one, given those of the floating outputs."""
    pairs = zip((t for t in outputs if t.is_floating_point()), grads, strict=True)
    pairs = [(t, g) for t, g in pairs if t.requires_grad]
    inputs = [t for t in leaves if t.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in inputs]
    results, grads = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(results, inputs, grads, allow_unused=True, materialize_grads=True)
    )


def those_wanted(
    gradients: Sequence[Tensor], tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Of the gradients of all floating tensors those that are wanted."""
    floats = [one for t, one in zip(tensors, wanted, strict=True) if t.is_floating_point()]
    return [g for g, one in zip(gradients, floats, strict=True) if one]
