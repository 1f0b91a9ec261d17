"""The rule for rows at different places of their chunks, a token of each in one batch.

The definition takes the rows of each place apart, which is less work where they are all at one.
This takes them together, by one_token.py: what a row gets does not depend on where the
others are. More tokens than one are the definition's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from atlas_blocks.graph.providers import Provider
from atlas_blocks.omega.definition import run
from atlas_blocks.omega.one_token import one_token
from atlas_blocks.omega.op import Settings, unflatten

NAME = "one_token"


def _supports(call: Any) -> str | None:
    return "it has no backward" if call.needs_grad else None


def _forward(tensors: list[Tensor], settings: Settings, *_: Any) -> list[Tensor]:
    a = unflatten(tensors, settings)
    alone = a.q.shape[1] == 1 and a.q.shape[0] > 0 and a.state is not None and a.cu_seqlens is None
    y, state = one_token(a) if alone else run(a)
    return list(_apart([y, *state.tensors()], tensors))


def _apart(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Copies of what shares memory: an op may return neither an input nor a tensor twice."""
    seen = {t.untyped_storage()._cdata for t in inputs}
    for t in results:
        yield t.clone() if t.untyped_storage()._cdata in seen else t
        seen.add(t.untyped_storage()._cdata)


def _backward(*arguments: Any) -> list[Tensor]:
    raise NotImplementedError("the provider 'one_token' has no backward")


PROVIDER = Provider(NAME, _supports, _forward, _backward, saves=False)
