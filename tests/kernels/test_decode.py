"""The Triton decode step is the definition: under the interpreter on a CPU, or on a GPU.

The fixtures are those of test_recurrence.py; a step multiplies in float32 everywhere.
"""

from functools import partial
from typing import Any

import helpers
import pytest
import torch
from helpers import (
    STREAMS,
    UPDATES,
    HostData,
    difference,
    everything,
    omega_rule,
    omega_rule_step,
    rows,
    rule_inputs,
    tokens,
)
from marks import slow_as_it_is
from torch import Tensor

from atlas_blocks.functional import OmegaState
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.op import flatten
from atlas_blocks.omega.rule import Rule

pytest.importorskip("triton")
from atlas_blocks.kernels import decode
from atlas_blocks.kernels.tiles import recorded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2e-6  # relative to a tensor's largest entry
cast = partial(helpers.cast, device=DEVICE, gradients=False)


def begun(inputs: dict[str, Any], places: tuple[int, ...], options: dict[str, Any]) -> OmegaState:
    """The state of rows that have seen so many tokens each, with memory of its own."""
    states = [
        omega_rule(**tokens(rows(inputs, [i]), 0, n), **options)[1] for i, n in enumerate(places)
    ]
    return OmegaState.cat(states).map(torch.clone)


def token(inputs: dict[str, Any], t: int) -> dict[str, Any]:
    """The step's arguments for one token."""
    return {n: x[:, t] if n in STREAMS and x is not None else x for n, x in inputs.items()}


def steps(
    inputs: dict[str, Any], first: int, state: OmegaState, options: dict[str, Any]
) -> tuple[Tensor, OmegaState]:
    """y of the tokens from `first` on; the state is updated."""
    outputs = [
        omega_rule_step(**token(inputs, t), **options, state=state, provider="triton")
        for t in range(first, inputs["q"].shape[1])
    ]
    return torch.stack(outputs, 1), state


def assert_steps_are_the_definition(
    inputs: dict[str, Any], places: tuple[int, ...], streams: torch.dtype, **options: Any
) -> None:
    """Rows that stand at `places` take all tokens from the furthest on."""
    first, results = max(places), []
    for provider, dtype in (("definition", torch.float64), ("definition", None), ("triton", None)):
        # The same rounded tokens for all.
        x = cast(inputs, torch.float32, streams)
        if dtype is not None:
            x = cast(x, dtype, dtype)
        state = begun(x, places, options)
        if provider == "definition":
            results.append(omega_rule(**tokens(x, first, x["q"].shape[1]), **options, state=state))
        else:
            results.append(steps(x, first, state, options))
    true, definition, ours = map(everything, results)
    # The definition's own error is the measure: sums of gates near 1 lose digits.
    for i, (a, b, c) in enumerate(zip(ours, definition, true, strict=True)):
        gap, allowed = difference([a], [c]), 2 * difference([b], [c]) + ROUNDING
        if i == 0 and streams == torch.bfloat16:
            allowed += 2**-8  # the interpreter cuts digits off where a GPU rounds
        assert gap <= allowed, f"{'y' if i == 0 else f'state {i}'}: {gap:.2g} > {allowed:.2g}"


# What a step in place serves: no error waits for a chunk.
ONLINE = {"errors": "online", "chunk_size": 7}
SERVED = {
    "dot": (5, {"objective": "dot", "errors": "online", "chunk_size": 7}),
    "online": (1, ONLINE),
    "each token": (5, {"errors": "chunk", "chunk_size": 1}),
}


@pytest.mark.parametrize("features", [slow_as_it_is("identity"), "polynomial", "sketch"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("served", SERVED)
def test_twenty_steps_are_the_definition(served: str, momentum: bool, features: str) -> None:
    """Gates are 0 and 1 at some tokens."""
    window, options = SERVED[served]
    inputs = rule_inputs(length=20, window=window, features=features, momentum=momentum)
    assert_steps_are_the_definition(inputs, (0,), torch.float32, **options)


@pytest.mark.parametrize("momentum", [False, True])
def test_steps_that_are_limited(momentum: bool) -> None:
    """Strong writes of long keys, which the largest key that S holds limits."""
    inputs = rule_inputs(length=40, window=1, momentum=momentum)
    lengths = 1 + torch.rand(40, 1, 1, generator=torch.Generator().manual_seed(1))
    inputs["k"], inputs["eta"] = lengths * inputs["k"], 8 * inputs["eta"]
    assert_steps_are_the_definition(inputs, (0,), torch.float32, **ONLINE)


@pytest.mark.parametrize("served", SERVED)
def test_retention_towards_the_initial_memory(served: str) -> None:
    window, options = SERVED[served]
    inputs = rule_inputs(length=20, window=window)
    assert_steps_are_the_definition(inputs, (0,), torch.float32, decay_to="initial", **options)


@pytest.mark.parametrize("streams", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("served", SERVED)
def test_rows_at_different_positions(served: str, streams: torch.dtype) -> None:
    """At the sequence's start, before a whole window has been seen, and later."""
    window, options = SERVED[served]
    inputs = rule_inputs(batch=4, length=23, window=window, features="polynomial")
    assert_steps_are_the_definition(inputs, (0, 3, 8, 17), streams, **options)


@pytest.mark.parametrize("served", SERVED)
def test_wide_memories_are_tiled(served: str) -> None:
    """300 features are three blocks, 40 and 13 values are five and two."""
    window, options = SERVED[served]
    for value_width in (40, 13):
        inputs = rule_inputs(
            length=6, heads=1, window=window, key_width=300, value_width=value_width
        )
        assert_steps_are_the_definition(inputs, (0,), torch.float32, **options)


def test_a_batch_of_none() -> None:
    inputs = cast(rule_inputs(batch=1, length=2, window=1), torch.float32, torch.float32)
    state = begun(inputs, (0,), ONLINE)[:0].map(torch.clone)
    y, _ = steps(rows(inputs, []), 0, state, ONLINE)
    assert y.shape == (0, 2, 2, 3)


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
def test_a_step_asks_nothing_of_the_host(features: str, served: str) -> None:
    """What a CUDA graph cannot hold: values read back, shapes from data, data from the host.

    On tensors without storage, the kernel only noted. The second call is looked at: the first one
    may still fill what is kept.
    """
    window, options = SERVED[served]
    inputs = rule_inputs(length=1, window=window, features=features)
    x = cast(inputs, torch.float32, torch.bfloat16)
    how = {"objective": "l2"} | options
    rule = Rule("matrix", update="gd", ns_steps=5, ns_every=1, window=window, **how)
    streams = [x[n] for n in ("q", "k", "v", "alpha", "eta", "theta", "gamma")]
    tensors, settings = flatten(Arguments(*streams, x["weights"], x["feature_map"], rule, None))
    state = begun(x, (0,), options).tensors()
    tensors = [t.to("meta") for t in [*(t[:, 0] for t in tensors[:7]), *tensors[8:]]]  # no M_0
    state = [t.to("meta") for t in state]
    with recorded(90) as launches, HostData() as host:
        decode.PROVIDER.forward(tensors, state, settings)
        first = len(host.found)
        decode.PROVIDER.forward(tensors, state, settings)
    assert first <= (features == "polynomial")  # the table that is kept
    assert host.found[first:] == []
    assert len(launches) == 2


def assert_refused(words: str, inputs: dict[str, Any], **options: Any) -> None:
    state = begun(inputs, (0,), options)
    with pytest.raises(ValueError, match=words):
        omega_rule_step(**token(inputs, 0), **options, state=state, provider="triton")


def test_what_it_cannot_serve_is_refused_with_the_reason() -> None:
    def inputs(memory: str = "matrix", window: int = 1) -> dict[str, Any]:
        x = rule_inputs(memory, length=1, window=window)
        return cast(x, torch.float32, torch.float32)

    assert_refused(f"update {UPDATES[1]} has no kernel", inputs(), update="muon")
    assert_refused("memory mlp has no kernel", inputs("mlp"), memory="mlp")
    assert_refused("window 65 is beyond the kernels' 64", inputs(window=65), objective="dot")
    assert_refused("the start of chunks of 64 it needs the whole chunk", inputs())
    online = {"errors": "online", "chunk_size": 1}
    assert_refused("with a window of 2, online errors need the whole", inputs(window=2), **online)
    assert_refused("float64", cast(inputs(), torch.float64, torch.float64), **ONLINE)


def test_a_position_elsewhere_is_refused() -> None:
    inputs = cast(rule_inputs(length=1, window=1), torch.float32, torch.float32)
    state = begun(inputs, (0,), ONLINE)
    elsewhere = OmegaState(**{**vars(state), "position": state.position.to("meta")})
    with pytest.raises(ValueError, match=r"reads state\.position on .*, not meta"):
        omega_rule_step(**token(inputs, 0), **ONLINE, state=elsewhere, provider="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("features", ["identity", "polynomial", "sketch"])
def test_a_cuda_graph_replays_the_step(features: str) -> None:
    """One step captured, then twenty tokens through it; rows at different positions."""
    inputs = rule_inputs(batch=2, length=25, window=1, features=features)
    inputs, options = cast(inputs, torch.float32, torch.bfloat16), ONLINE
    state = begun(inputs, (0, 4), options)
    kept = state.map(torch.clone)
    true, _ = steps(inputs, 5, state.map(torch.clone), options)
    buffers = {n: x.clone() if isinstance(x, Tensor) else x for n, x in token(inputs, 4).items()}

    def step() -> Tensor:
        return omega_rule_step(**buffers, **options, state=state, provider="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for t, old in zip(state.tensors(), kept.tensors(), strict=True):
        t.copy_(old)
    for t in range(5, 25):
        for name, x in token(inputs, t).items():
            if isinstance(x, Tensor):
                buffers[name].copy_(x)
        graph.replay()
        assert torch.equal(y, true[:, t - 5])
