"""Every bad argument of the rule: one ValueError with its name, what was expected, what came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import omega_rule, omega_rule_reference, rule_inputs

ZEROS = torch.zeros


def state_of(length: int = 4, **changes: Any) -> Any:
    options = {"chunk_size": 4, **{n: changes.pop(n) for n in list(changes) if n in OPTIONS}}
    memory = options.get("memory", "matrix")
    x = rule_inputs(memory, **{"batch": 2, "length": length, "window": 3, **changes})
    return omega_rule(**x, **options)[1]


OPTIONS = ("memory", "objective", "errors", "chunk_size")

# name: (changed arguments, text). Plain: batch 2, 5 tokens, 2 heads, Dk = Dv = 3, c = 3, matrix.
CASES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "q has three axes": (
        lambda: {"q": ZEROS(2, 5, 3)},
        r"q: expected shape \[B, T, H, Dk\] = \[any, any, any, any\], got \[2, 5, 3\]",
    ),
    "q is a list": (lambda: {"q": [1.0]}, r"q: expected a tensor \[B, T, H, Dk\], got list"),
    "q is integer": (lambda: {"q": ZEROS(2, 5, 2, 3).long()}, "q: expected dtype .*torch.int64"),
    "k has another width": (
        lambda: {"k": ZEROS(2, 5, 2, 4)},
        r"k: expected shape \[B, T, H, Dk\] = \[2, 5, 2, 3\], got \[2, 5, 2, 4\]",
    ),
    "k has another length": (lambda: {"k": ZEROS(2, 6, 2, 3)}, r"k: .* got \[2, 6, 2, 3\]"),
    "k has another batch": (lambda: {"k": ZEROS(1, 5, 2, 3)}, r"k: .* got \[1, 5, 2, 3\]"),
    "k is complex": (
        lambda: {"k": ZEROS(2, 5, 2, 3, dtype=torch.complex64)},
        "k: expected dtype .*, got torch.complex64",
    ),
    "v has other heads": (
        lambda: {"v": ZEROS(2, 5, 3, 3)},
        r"v: expected shape .*, got \[2, 5, 3, 3\]",
    ),
    "alpha has a width": (
        lambda: {"alpha": ZEROS(2, 5, 2, 1)},
        r"alpha: expected shape \[B, T, H\] = \[2, 5, 2\], got \[2, 5, 2, 1\]",
    ),
    "eta is a number": (lambda: {"eta": 0.1}, r"eta: expected a tensor \[B, T, H\], got float"),
    "theta has another length": (
        lambda: {"theta": ZEROS(2, 4, 2)},
        r"theta: expected shape .*, got \[2, 4, 2\]",
    ),
    "gamma has no window": (
        lambda: {"gamma": ZEROS(2, 5, 2)},
        r"gamma: expected shape \[B, T, H, rule.window\] .*, got \[2, 5, 2\]",
    ),
    "gamma has a window of 0": (
        lambda: {"gamma": ZEROS(2, 5, 2, 0)},
        "window: expected an int >= 1, got 0",
    ),
    "weights is a tensor": (
        lambda: {"weights": ZEROS(2, 3, 3)},
        "weights: expected a list of 1 tensors for memory='matrix', got",
    ),
    "weights are too few": (
        lambda: {"memory": "mlp"},
        "weights: expected a list of 2 tensors for memory='mlp', got 1",
    ),
    "a weight has another width": (
        lambda: {"weights": [ZEROS(2, 3, 4)]},
        r"weights\[0\]: expected shape \[H, Dv, Dphi\] = \[2, 3, 3\], got \[2, 3, 4\]",
    ),
    "a weight does not fit the hidden width": (
        lambda: {"memory": "mlp", "weights": [ZEROS(2, 3, 5), ZEROS(2, 4, 3)]},
        r"weights\[1\]: expected shape \[H, hidden, Dphi\] = \[2, 5, 3\], got \[2, 4, 3\]",
    ),
    "a weight has no heads": (
        lambda: {"weights": [ZEROS(3, 3)]},
        r"weights\[0\]: expected shape .*, got \[3, 3\]",
    ),
    "memory is unknown": (
        lambda: {"memory": "tree"},
        "memory: expected one of gated_mlp, matrix, mlp, got 'tree'",
    ),
    "objective is unknown": (
        lambda: {"objective": "l1"},
        "objective: expected one of dot, l2, got 'l1'",
    ),
    "update is unknown": (lambda: {"update": None}, "update: expected one of gd, muon, got None"),
    "chunk is 0": (lambda: {"chunk_size": 0}, "chunk_size: expected an int >= 1, got 0"),
    "chunk is negative": (lambda: {"chunk_size": -4}, "chunk_size: expected an int >= 1, got -4"),
    "chunk is a float": (lambda: {"chunk_size": 4.0}, "chunk_size: expected an int >= 1, got 4.0"),
    "ns_steps is negative": (lambda: {"ns_steps": -1}, "ns_steps: expected an int >= 0, got -1"),
    "ns_every is 0": (lambda: {"ns_every": 0}, "ns_every: expected an int >= 1, got 0"),
    "state is a dict": (
        lambda: {"state": state_of().to_dict()},
        "state: expected an OmegaState or None, got dict",
    ),
    "state is of another memory": (
        lambda: {"state": state_of(memory="mlp")},
        r"state.weights: expected shapes \[\(2, 2, 3, 3\)\], got",
    ),
    "state has another batch": (
        lambda: {"state": state_of(batch=3)},
        r"state.weights: expected shapes .*, got \[\[3, 2, 3, 3\]\]",
    ),
    "state lacks momentum": (
        lambda: {"state": state_of(momentum=False)},
        r"state.momentum: expected shapes .*, got \[\]",
    ),
    "state has momentum too many": (
        lambda: {"theta": None, "state": state_of()},
        r"state.momentum: expected shapes \[\], got",
    ),
    "state is of another window": (
        lambda: {"state": state_of(window=2)},
        r"state.keys: expected shape \[B, n, H, Dk\] = \[2, 5, 2, 3\], got \[2, 4, 2, 3\]",
    ),
    "errors are no word": (
        lambda: {"errors": True},
        "errors: expected one of chunk, online, got True",
    ),
    "online errors with Muon": (
        lambda: {"errors": "online", "update": "muon"},
        "errors: expected \"chunk\" with update='muon', got 'online'",
    ),
    "state of a rule that does no chunk again": (
        lambda: {"memory": "matrix", "objective": "l2", "state": state_of(objective="dot")},
        r"state.chunk_start: expected shapes \[\(2, 2, 3, 3\)\], got \[\]",
    ),
    "state of a rule that does chunks again": (
        lambda: {"objective": "dot", "state": state_of()},
        r"state.chunk_start: expected shapes \[\], got",
    ),
    "state is of another chunk": (
        lambda: {"state": state_of(chunk_size=5)},
        r"state.keys: expected shape \[B, n, H, Dk\] = \[2, 5, 2, 3\], got \[2, 6, 2, 3\]",
    ),
    "state has other gates": (
        lambda: {"state": state_of().replace(eta=ZEROS(2, 0, 2))},
        r"state.eta: expected shape \[B, n, H\] = \[2, 5, 2\], got \[2, 0, 2\]",
    ),
    "state has the gamma of another window": (
        lambda: {"state": state_of().replace(gamma=ZEROS(2, 5, 2, 2))},
        r"state.gamma: expected shape \[B, n, H, c\] = \[2, 5, 2, 3\], got \[2, 5, 2, 2\]",
    ),
    "state has no scale of a head": (
        lambda: {"state": state_of().replace(scale=ZEROS(2))},
        r"state.scale: expected shape \[B, H\] = \[2, 2\], got \[2\]",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_argument_is_named(case: str) -> None:
    changes, message = CASES[case]
    arguments = rule_inputs("matrix", batch=2, length=5, window=3) | {"chunk_size": 4} | changes()
    with pytest.raises(ValueError, match=message):
        omega_rule(**arguments)


def test_the_reference_names_the_same() -> None:
    for case in ("k has another width", "weights are too few", "state lacks momentum"):
        changes, message = CASES[case]
        x = rule_inputs("matrix", batch=2, length=5, window=3) | {"chunk_size": 4} | changes()
        with pytest.raises(ValueError, match=message):
            omega_rule_reference(**x)


def test_a_weight_on_another_device_is_named() -> None:
    x = rule_inputs("matrix")
    x["weights"] = [w.to("meta") for w in x["weights"]]
    with pytest.raises(ValueError, match=r"weights\[0\]: expected device cpu, got meta"):
        omega_rule(**x)
