"""The recurrence with Newton-Schulz by the kernels is the definition, forward and backward."""

import pytest
import torch
from helpers import (
    MEMORIES,
    cast,
    difference,
    everything,
    named_leaves,
    omega_rule,
    omega_rule_op,
    rule_inputs,
    tokens,
)

pytest.importorskip("triton")
from atlas_blocks.kernels import newton_schulz as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 5e-2 if DEVICE == "cuda" else 1e-4


@pytest.fixture(autouse=True)
def _tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def run(rule, inputs, pieces, **options):
    """Output, state and every gradient of a sequence that comes in pieces."""
    state, outputs, first = None, [], 0
    for length in pieces:
        y, state = rule(**tokens(inputs, first, first + length), **options, state=state)
        outputs.append(y)
        first += length
    found = everything((torch.cat(outputs, 1), state))
    sum((t * torch.cos(torch.arange(t.numel(), device=t.device).view_as(t))).sum()
        for t in found if t.requires_grad).backward()  # fmt: skip
    return [t.detach() for t in found] + [
        t.grad.double() for t in named_leaves(inputs).values() if t.grad is not None
    ]


def triton_rule(**arguments):
    return omega_rule_op(**arguments, provider="triton")


@pytest.mark.parametrize("pieces", [(9,), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("ns_every", [1, 3])
@pytest.mark.parametrize("memory", MEMORIES)
def test_equals_the_definition(memory, ns_every, pieces):
    inputs = rule_inputs(
        memory, length=sum(pieces), heads=1, update="muon", exact_gates=ns_every == 3
    )
    assert_definition(inputs, pieces, memory=memory, ns_every=ns_every)


def test_packed_documents_equal_the_definition():
    inputs = rule_inputs("mlp", length=9, heads=1, update="muon", exact_gates=False)
    bounds = torch.tensor([0, 1, 6, 9], device=DEVICE)
    assert_definition(inputs, (9,), memory="mlp", cu_seqlens=bounds)


def assert_definition(inputs, pieces, **options):
    """The measure is the definition's own error in float32, by the same path."""
    options |= {"update": "muon", "chunk_size": 4}
    exact = cast(inputs, torch.float64, torch.float64, device=DEVICE)
    true = run(omega_rule, exact, pieces, **options)
    single = [cast(inputs, torch.float32, torch.float32, device=DEVICE) for _ in range(2)]
    plain = run(omega_rule, single[0], pieces, **options)
    ours = run(triton_rule, single[1], pieces, **options)
    assert len(ours) == len(true)
    for a, b, t in zip(ours, plain, true, strict=True):
        assert difference([a], [t]) <= 2 * difference([b], [t]) + ROUNDING


def test_every_newton_schulz_is_the_kernels(monkeypatch):
    """One launch for each weight and chunk, and in the backward a recomputation and a gradient."""
    seen = []
    launch = kernels.launch
    monkeypatch.setattr(
        kernels,
        "launch",
        lambda kernel, *a, **k: (
            seen.append((kernel.fn.__name__, a[0][0])),
            launch(kernel, *a, **k),
        ),
    )
    inputs = rule_inputs("mlp", batch=2, length=8, heads=1, update="muon", exact_gates=False)
    options = {"memory": "mlp", "update": "muon", "chunk_size": 4}
    y, _ = triton_rule(**cast(inputs, torch.float32, torch.float32, device=DEVICE), **options)
    # 2 weights, 2 chunks; 2 rows of 4 tokens.
    assert seen == 4 * [("_resident_forward", 8)]
    y.sum().backward()
    assert sorted(seen[4:]) == 4 * [("_resident_backward", 8)] + 4 * [("_resident_forward", 8)]


def test_what_it_does_not_serve_it_says():
    inputs = rule_inputs(length=2, heads=1, key_width=132, value_width=132, update="muon")
    with pytest.raises(ValueError, match="smaller side 132 is beyond the kernels' 128"):
        triton_rule(**cast(inputs, torch.float32, torch.float32, device=DEVICE), update="muon")
