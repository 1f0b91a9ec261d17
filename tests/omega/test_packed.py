"""Packed documents in the rule: each as if alone, as an op too."""

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    MEMORIES,
    STEPS,
    STREAMS,
    assert_close,
    difference,
    everything,
    leaves,
    named_leaves,
    omega_rule,
    omega_rule_op,
    rule_inputs,
    tokens,
)
from torch import Tensor

from atlas_blocks.documents.op import checked_bounds
from atlas_blocks.functional import OmegaState
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.definition import run
from atlas_blocks.omega.groups import chunk_count
from atlas_blocks.omega.memories import MEMORIES as STRUCTURES
from atlas_blocks.omega.op import Settings, flatten, unflatten
from atlas_blocks.omega.rule import Rule

OPS = torch.ops.atlas
CHUNK, WINDOW = 4, 3
# Of one token, shorter than the window, than a chunk, of one length, of several chunks.
BOUNDS = [0, 1, 3, 10, 13, 16, 25, 27]
PLACES = (0, 3, 4, 9, 2, 2, 1)  # tokens that each document has had before
NAMES = ("q", "k", "v", *STREAMS[3:6], "gamma", "weights", "feature_map")


def begun(inputs: dict[str, Any], options: dict[str, Any]) -> OmegaState:
    """A state whose documents stand at PLACES."""
    return OmegaState.cat(
        [omega_rule(**tokens(inputs, 0, n), **options)[1].detach() for n in PLACES]
    )


def apart(
    rule: Any, inputs: dict[str, Any], state: OmegaState | None, **options: Any
) -> tuple[Tensor, OmegaState]:
    """Every document alone."""
    outputs, states = [], []
    for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        before = None if state is None else state[[i]]
        y, after = rule(**tokens(inputs, a, b), **options, state=before)
        outputs.append(y)
        states.append(after)
    return torch.cat(outputs, 1), OmegaState.cat(states)


def gradients(result: tuple[Tensor, OmegaState], wanted: dict[str, Tensor]) -> list[Tensor]:
    """Of a loss that weighs everything."""
    floats = [t for t in everything(result) if t.requires_grad]
    weights = (torch.linspace(1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in floats)
    loss = sum(((t * w).sum() for t, w in zip(floats, weights, strict=True)), torch.zeros(()))
    return list(torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_packed_documents_equal_each_alone(
    memory: str, update: str, with_state: bool, errors: str
) -> None:
    inputs = rule_inputs(
        memory, length=BOUNDS[-1], window=WINDOW, features="polynomial", update=update
    )
    options = {"memory": memory, "update": update, "chunk_size": CHUNK, "errors": errors}
    options["decay_to"] = "initial" if memory == "mlp" else "zero"
    state = begun(inputs, options) if with_state else None
    found = []
    for run_it in (omega_rule, apart):
        x = leaves(inputs)
        before = None if state is None else state.map(lambda t: t.clone())
        wanted = named_leaves(x)
        if before is not None:
            floats = [t for t in before.tensors() if t.is_floating_point()]
            wanted |= {f"state {i}": t.requires_grad_() for i, t in enumerate(floats)}
        if run_it is omega_rule:
            result = omega_rule(**x, **options, state=before, cu_seqlens=torch.tensor(BOUNDS))
        else:
            result = apart(omega_rule, x, before, **options)
        found.append((result, gradients(result, wanted)))
    (ours, our_grads), (true, true_grads) = found
    assert_close(ours, true)
    assert difference(our_grads, true_grads) < 1e-9


def packed_call(
    memory: str,
    update: str,
    errors: str,
    momentum: bool,
    with_state: bool,
    bounds: list[int] = BOUNDS,
) -> tuple[list[Tensor], Settings]:
    """The op's arguments."""
    inputs = rule_inputs(
        memory, length=BOUNDS[-1], window=WINDOW, features="sketch", update=update,
        momentum=momentum,
    )  # fmt: skip
    decay_to = "initial" if memory == "mlp" else "zero"
    rule = Rule(memory, "l2", update, 5, 1, CHUNK, errors, WINDOW, decay_to)
    options = {"memory": memory, "update": update, "chunk_size": CHUNK, "errors": errors}
    options["decay_to"] = decay_to
    state = begun(inputs, options) if with_state else None
    arguments = Arguments(*(inputs[n] for n in NAMES), rule, state, torch.tensor(bounds))
    return flatten(arguments)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_ops_are_the_rule_under_autograd(
    memory: str, update: str, errors: str, with_state: bool
) -> None:
    """And torch's own checks of them pass; chunk starts have a size that no bound decides."""
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for momentum in (False, True):
        tensors, settings = packed_call(memory, update, errors, momentum, with_state)
        for save in (False, True):
            arguments = (tensors, *settings.flat(), "definition", save)
            torch.library.opcheck(OPS.omega_rule.default, arguments, {}, **checks)
        outputs = OPS.omega_rule.default(tensors, *settings.flat(), "definition", True)
        count = STRUCTURES[memory].weights * (2 if settings.momentum else 1) + 1
        outputs, saved = outputs[:-count], outputs[-count:]
        slots = chunk_count(BOUNDS[-1], CHUNK, with_state, len(BOUNDS) - 1)
        assert {t.shape[:2] for t in saved} == {(1, slots)}
        grads = [torch.randn_like(t) for t in outputs[:-1]]
        arguments = (grads, tensors, saved, *settings.flat(), "definition")
        torch.library.opcheck(OPS.omega_rule_backward.default, arguments, {}, **checks)
        ours = OPS.omega_rule_backward.default(*arguments)

        leaf = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        y, after = run(unflatten(leaf, settings))
        assert difference(outputs, [y, *after.tensors()]) < 1e-12
        pairs = zip((y, *after.tensors()[:-1]), grads, strict=True)
        results, given = zip(*(p for p in pairs if p[0].requires_grad), strict=True)
        wanted = [t for t in leaf if t.requires_grad]
        true = torch.autograd.grad(results, wanted, given, materialize_grads=True)
        assert difference(ours, true) < 1e-9


@pytest.mark.parametrize("with_state", [False, True])
def test_chunk_starts_of_documents_follow_each_other(with_state: bool) -> None:
    tensors, settings = packed_call("mlp", "gd", "online", True, with_state)
    a = unflatten(tensors, settings)
    starts = OPS.omega_rule.default(tensors, *settings.flat(), "definition", True)[-5:]
    slot = 0
    for i, (first, stop) in enumerate(itertools.pairwise(BOUNDS)):
        place = PLACES[i] if with_state else 0
        before = None if a.state is None else a.state[[i]]
        for n in range(stop - first):
            if n > 0 and (place + n) % CHUNK:
                continue
            streams = {name: getattr(a, name)[:, first : first + n] for name in STREAMS}
            alone = a._replace(**streams, state=before, cu_seqlens=None)
            _, there = run(alone)
            true = (*there.chunk_start, *there.momentum_start, there.scale)
            assert difference([t[0, slot] for t in starts], [t[0] for t in true]) < 1e-10
            slot += 1
    assert not any(t[0, slot:].any() for t in starts)


def test_bounds_that_do_not_fit_are_refused() -> None:
    inputs = rule_inputs(length=9, batch=1)
    message = r"cu_seqlens: expected strictly rising bounds from 0 to T = 9, got \["
    for bounds in ([0, 4], [1, 9], [0, 5, 5, 9], [0, 7, 5, 9], [9]):
        with pytest.raises(ValueError, match=message):
            omega_rule(**inputs, cu_seqlens=torch.tensor(bounds))
        rule = Rule("matrix", "l2", "gd", 5, 1, CHUNK, "chunk", 2)
        a = Arguments(*(inputs[n] for n in NAMES), rule, None, torch.tensor(bounds))
        tensors, settings = flatten(a)
        with pytest.raises(ValueError, match=message):
            OPS.omega_rule.default(tensors, *settings.flat(), "definition", False)
    with pytest.raises(ValueError, match="q: expected a batch of 1 with cu_seqlens, got 2"):
        omega_rule(**rule_inputs(length=9, batch=2), cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="cu_seqlens: expected dtype"):
        omega_rule(**inputs, cu_seqlens=torch.tensor([0.0, 9.0]))
    _, state = omega_rule(**inputs)
    with pytest.raises(ValueError, match=r"state\.weights: expected shapes"):
        omega_rule(**inputs, state=state, cu_seqlens=torch.tensor([0, 4, 9]))


def test_eager_is_the_definition() -> None:
    inputs, cu_seqlens = rule_inputs(length=9), torch.tensor([0, 4, 9], dtype=torch.int32)
    ours, true = (rule(**inputs, cu_seqlens=cu_seqlens) for rule in (omega_rule_op, omega_rule))
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(true), strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_checked_bounds_are_an_op(dtype: torch.dtype) -> None:
    bounds = torch.tensor([0, 4, 9], dtype=dtype)
    torch.library.opcheck(OPS.document_bounds.default, (bounds, 9))
    found = checked_bounds(bounds, 9)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 4, 9]
