"""What the rule holds: linear in T, and no weight per token under gradient descent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ERRORS, MEMORIES, STEPS, UPDATES, draw, leaves, omega_rule, rule_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_blocks.functional import kernel_attention


class LargestTensor(TorchDispatchMode):
    """The most entries of any tensor that an operation returns, views without copies excepted."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                # By storage: an expanded view holds nothing.
                held = t.untyped_storage().nbytes() // t.element_size()
                self.numel = max(self.numel, min(held, t.numel()))
        return out


def peak_bytes(call: Callable[[], None]) -> int:
    """The most bytes that the call's own allocations held at one time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(events) > 100
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def forward_and_backward(inputs: dict[str, Any], **options: Any) -> Callable[[], None]:
    x = leaves(inputs)

    def call() -> None:
        y, _ = omega_rule(**x, **options)
        y.square().sum().backward()

    return call


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_gradient_descent_never_forms_a_weight_per_token(memory: str, errors: str) -> None:
    chunk, window, heads, width = 16, 4, 2, 24
    largest = []
    for length in (128, 256):
        x = rule_inputs(
            memory,
            length=length,
            heads=heads,
            key_width=6,
            value_width=width,
            window=window,
            features="polynomial",
        )
        with LargestTensor() as mode:
            forward_and_backward(x, memory=memory, chunk_size=chunk, errors=errors)()
        largest.append(mode.numel)
        features = 28  # C(6 + 2, 2)
        # A token's largest rows: features, or scores of all keys that its chunk sees, with some
        # room for the halo; its weight would have width x features = 672 entries.
        row = max(features, chunk + window - 1) * (chunk + max(window, chunk)) / chunk
        assert mode.numel <= 1.5 * length * heads * row
        assert 1.5 * row < width * features / 6
    assert largest[1] <= 2.05 * largest[0]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_peak_memory_of_forward_and_backward_is_linear_in_the_length(
    memory: str, update: str
) -> None:
    peaks = []
    for length in (96, 192):
        x = rule_inputs(memory, length=length, heads=1, window=4, update=update)
        call = forward_and_backward(x, memory=memory, update=update, chunk_size=16)
        call()  # leaves have their gradients already; kernels have what they allocate once
        peaks.append(peak_bytes(call))
    assert peaks[1] < 2.2 * peaks[0]


def test_muon_keeps_no_weight_per_token_for_the_backward() -> None:
    """Twice the tokens cost less than one weight for each of those added."""
    peaks = []
    for length in (128, 256):
        x = rule_inputs(
            "matrix",
            length=length,
            heads=1,
            key_width=6,
            value_width=48,
            window=4,
            features="polynomial",
            update="muon",
        )
        call = forward_and_backward(x, update="muon", chunk_size=16)
        call()
        peaks.append(peak_bytes(call))
    weight_bytes = 48 * 28 * 8
    assert peaks[0] > 16 * weight_bytes  # those of one chunk are there while it is computed
    assert (peaks[1] - peaks[0]) / 128 < weight_bytes


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_what_is_saved_for_the_backward_is_linear_in_the_length(memory: str, update: str) -> None:
    saved = []
    for length in (96, 192):
        x = leaves(rule_inputs(memory, length=length, heads=1, window=4, update=update))
        storages: dict[int, int] = {}

        def pack(t: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, _ = omega_rule(**x, memory=memory, update=update, chunk_size=16)
        saved.append(sum(storages.values()))
        y.sum().backward()
    assert saved[1] < 2.2 * saved[0]


@pytest.mark.parametrize(("objective", "window"), [("dot", 1), ("l2", 1), ("l2", 4)])
def test_exact_phi_star_takes_quadratic_time_and_linear_memory(objective: str, window: int) -> None:
    """Peak of forward and backward; the scores alone would be the square of the length."""
    peaks = []
    for length in (512, 1024):
        q, k, v = (
            F.normalize(draw(1, length, 1, 4, seed=i), dim=-1).requires_grad_() for i in range(3)
        )
        gate = torch.full((1, length, 1), 0.9, dtype=torch.float64, requires_grad=True)
        gamma = (0.1 * gate[..., None]).repeat(1, 1, 1, window).detach().requires_grad_()
        options = {"objective": objective, "scale": 1.0, "chunk_size": 16}

        def call(x: tuple = (q, k, v), gate: Any = gate, gamma: Any = gamma, o: Any = options):
            kernel_attention(*x, alpha=gate, eta=gate, gamma=gamma, **o)[0].sum().backward()

        call()
        peaks.append(peak_bytes(call))
    assert peaks[1] < 2.1 * peaks[0]
    assert peaks[1] < 0.8 * 1024**2 * 8


@pytest.mark.parametrize(("update", "errors"), STEPS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_state_has_one_size_and_owns_its_memory(memory: str, update: str, errors: str) -> None:
    options = {"memory": memory, "update": update, "chunk_size": 16, "errors": errors}
    sizes = set()
    for length in (0, 1, 15, 16, 40, 160, 3000 if update == "gd" else 161):
        x = rule_inputs(memory, length=length, heads=1, window=5, update=update)
        with torch.no_grad():
            _, state = omega_rule(**x, **options)
        sizes.add(state.nbytes)
        for t in state.tensors():
            assert t.untyped_storage().nbytes() <= t.nbytes
    assert len(sizes) == 1
