"""Activation checkpointing that does not walk the memory twice."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy


def checkpoint_policy(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Selective activation checkpointing: keep what our ops return, compute the rest again.

    That is the output of the rule and the memory at the start of every chunk, from which its
    backward goes: the sequential part of a layer, and small beside its activations.

        contexts = partial(create_selective_checkpoint_contexts, checkpoint_policy)
        y, state = checkpoint(block, x, use_reentrant=False, context_fn=contexts)

    with checkpoint and create_selective_checkpoint_contexts of torch.utils.checkpoint. It sees ops:
    everything compiled, and in eager mode whatever a kernel serves. Where the definition runs
    in eager mode there is no op, and the walk is taken again as everything else.
    """
    ours = getattr(op, "namespace", None) == "atlas"
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE
