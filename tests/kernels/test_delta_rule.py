"""flash-linear-attention's gated delta rule, given our gates, is the Omega rule token by token."""

import dataclasses
import importlib
import itertools
import warnings
from typing import Any

import pytest
import torch
from helpers import (
    Recorder,
    assert_close,
    cast,
    difference,
    leaves,
    named_leaves,
    omega_rule_op,
    rule_inputs,
    tokens,
)
from torch import Tensor

from atlas_blocks import ops
from atlas_blocks.graph import providers
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.op import OmegaCall, describe, flatten
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Inductor's own import
    from atlas_blocks.compile_passes.graph_pass import Passes
    from atlas_blocks.compile_passes.lower_ops import LowerOps, op_nodes

pytest.importorskip("triton")
from atlas_blocks.kernels import delta_rule

TOKENWISE = {"chunk_size": 1}
RULE = Rule("matrix", "l2", "gd", 5, 1, 1, "chunk", 1)
# Online errors are those of the memory before each token whatever the chunk.
FORMS = (TOKENWISE, {"chunk_size": 5, "errors": "online"})
ARGUMENTS = ("q", "k", "v", "alpha", "eta", "theta", "gamma", "weights", "feature_map")


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, scale: float,
    initial_state: Tensor, output_final_state: bool, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Theirs, written out: the state [B, H, K, V] decays, then each key's value is replaced."""
    assert output_final_state
    if cu_seqlens is not None:
        alone = [
            gated_delta_rule(
                *(t[:, i:j] for t in (q, k, v)), g=g[:, i:j], beta=beta[:, i:j], scale=scale,
                initial_state=initial_state[[n]], output_final_state=True,
            )
            for n, (i, j) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
        ]  # fmt: skip
        return torch.cat([y for y, _ in alone], 1), torch.cat([s for _, s in alone])
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        write = beta[:, t, :, None] * error
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def inputs_of(**changes: Any) -> dict[str, Any]:
    return rule_inputs(**{"window": 1, "momentum": False, "exact_gates": False} | changes)


def call_of(**changes: Any) -> OmegaCall:
    """A call on a GPU that the provider serves, but for these facts."""
    x = cast(inputs_of(key_width=16, value_width=16), torch.float32, torch.float32)
    call = describe(Arguments(*(x[n] for n in ARGUMENTS), rule=RULE, state=None), True)
    return dataclasses.replace(call, **{"device": "cuda", "dtype": torch.bfloat16} | changes)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider in float64 on a CPU, as "served": the recurrence above for their kernels."""
    table = {op: dict(entries) for op, entries in providers._PROVIDERS.items()}
    monkeypatch.setattr(providers, "_PROVIDERS", table)
    monkeypatch.setattr(delta_rule, "_gated_delta_rule", lambda: gated_delta_rule)
    mine = dataclasses.replace(delta_rule.PROVIDER, name="served", supports=lambda call: None)
    ops.register_provider("omega_rule", mine, automatic_on=())


def run(
    inputs: dict[str, Any],
    provider: str,
    pieces: tuple[int, ...],
    form: dict[str, Any] = TOKENWISE,
) -> tuple[Any, Any, Any]:
    """y and the state after these pieces, and the gradients of a loss that weighs all of them."""
    x, state, outputs, first = leaves(inputs), None, [], 0
    for length in pieces:
        piece = tokens(x, first, first + length)
        y, state = omega_rule_op(**piece, **form, state=state, provider=provider)
        outputs.append(y)
        first += length
    assert state is not None
    y = torch.cat(outputs, 1)
    floats = [y, *(t for t in state.tensors() if t.is_floating_point())]
    loss = sum((t * torch.linspace(1, 2, t.numel()).to(t).view(t.shape)).sum() for t in floats)
    named = named_leaves(x)
    gradients = torch.autograd.grad(loss, list(named.values()))
    return y.detach(), state.detach(), dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pieces", [(9,), (4, 0, 1, 4), (0, 9)])
@pytest.mark.parametrize("strength", [1, 15])
@pytest.mark.usefixtures("served")
def test_it_is_the_rule_token_by_token(
    strength: int, pieces: tuple[int, ...], form: dict[str, Any]
) -> None:
    """strength: online errors limit some steps of the stronger."""
    inputs = inputs_of(batch=2, key_width=4, value_width=3)
    inputs["eta"] *= strength
    inputs["alpha"][:, ::3], inputs["eta"][:, ::4], inputs["gamma"][:, ::5] = 1.0, 0.0, 1.0
    *ours, our_gradients = run(inputs, "served", pieces, form)
    *true, true_gradients = run(inputs, "definition", pieces, form)
    assert_close(tuple(ours), tuple(true))
    for name, gradient in true_gradients.items():
        gap = difference([our_gradients[name]], [gradient])
        assert gap < 1e-10, f"gradient of {name}: {gap:.3g}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("served")
def test_packed_documents_are_each_alone(form: dict[str, Any]) -> None:
    inputs = inputs_of(length=18, key_width=4, value_width=3)
    found = []
    for provider in ("served", "definition"):
        x, state, outputs = leaves(inputs), None, []
        for first, bounds in ((0, [0, 4, 5, 9]), (9, [0, 2, 6, 9])):
            piece, cu_seqlens = tokens(x, first, first + 9), torch.tensor(bounds)
            y, state = omega_rule_op(
                **piece, **form, state=state, cu_seqlens=cu_seqlens, provider=provider
            )
            outputs.append(y)
        assert state is not None
        assert state.position.tolist() == [6, 5, 7]
        loss = torch.cat(outputs, 1).square().sum() + state.weights[0].square().sum()
        found.append([*outputs, *torch.autograd.grad(loss, list(named_leaves(x).values()))])
    assert difference(*found) < 1e-10


@pytest.mark.usefixtures("served")
def test_a_retention_of_zero_is_a_very_small_one() -> None:
    """Equal to the rule at that retention, but for the gradient that ends there."""
    zero, small = inputs_of(length=12), inputs_of(length=12)
    zero["alpha"][:, ::3], small["alpha"][:, ::3] = 0.0, delta_rule.LEAST_ALPHA
    *ours, our_gradients = run(zero, "served", (12,))
    *true, true_gradients = run(small, "definition", (12,))
    assert_close(tuple(ours), tuple(true))
    assert not our_gradients["alpha"][:, ::3].any()
    true_gradients["alpha"][:, ::3] = 0.0
    for name, gradient in true_gradients.items():
        gap = difference([our_gradients[name]], [gradient])
        assert gap < 1e-8, f"gradient of {name}: {gap:.3g}"


@pytest.mark.parametrize("length", [0, 6])
@pytest.mark.usefixtures("served")
def test_opcheck_passes_and_nothing_is_saved(length: int) -> None:
    x = inputs_of(batch=2, length=length)
    tensors, settings = flatten(Arguments(*(x[n] for n in ARGUMENTS), rule=RULE, state=None))
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    forward = torch.ops.atlas.omega_rule.default
    backward = torch.ops.atlas.omega_rule_backward.default
    for save in (False, True):
        arguments = (tensors, *settings.flat(), "served", save)
        torch.library.opcheck(forward, arguments, {}, **checks)
        assert len(forward(*arguments)) == 1 + 2 + len(OmegaState.REST)  # y, M, M^(0), the rest
    grads = [torch.ones_like(t) for t in forward(*arguments)[:-1]]
    torch.library.opcheck(backward, (grads, tensors, [], *settings.flat(), "served"), {}, **checks)


# Dynamo instantiates every autograd.Function that it traces, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("served")
def test_a_graph_traced_for_it_is_its_own() -> None:
    """Compiled = eager; a pass gives no other provider a backward that lacks the chunk starts."""
    torch._dynamo.reset()

    def compiled(traced: str, lowered: str, inputs: dict[str, Any]) -> tuple[Tensor, Recorder]:
        recorder = Recorder(Passes([LowerOps(lowered)]))
        call = torch.compile(
            lambda x: omega_rule_op(**x, **TOKENWISE, provider=traced)[0],
            backend=recorder,
            fullgraph=True,
        )
        return call(inputs), recorder

    inputs = inputs_of()
    x, (true, _, gradients) = leaves(inputs), run(inputs, "definition", (9,))
    y, recorder = compiled("served", "auto", x)
    assert difference([y], [true]) < 1e-10
    (y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum().backward()
    assert all(named_leaves(x)[name].grad is not None for name in gradients)
    assert {n.provider for g in recorder.graphs for n in op_nodes(g)} == {"served"}
    for traced, lowered in (("definition", "served"), ("served", "definition")):
        with pytest.raises(RuntimeError, match=f"was traced for '{traced}'"):
            compiled(traced, lowered, leaves(inputs))
        y, recorder = compiled(traced, lowered, inputs)
        assert difference([y], [true]) < 1e-10
        assert [n.provider for n in op_nodes(recorder.graphs[0])] == [lowered]


def test_what_it_refuses() -> None:
    def rule(**changes: Any) -> dict[str, Rule]:
        return {"rule": dataclasses.replace(RULE, **changes)}

    for changes, words in (
        (rule(memory="mlp"), "it is the delta rule, memory matrix, not mlp"),
        (rule(objective="dot"), "objective l2, not dot"),
        (rule(update="muon"), "update gd, not muon"),
        (rule(decay_to="initial"), "decay_to zero, not initial"),
        (rule(window=2), "window 1, not 2"),
        (rule(chunk_size=16), "chunk_size 1, not 16"),
        ({"feature_map": "polynomial"}, "feature map identity, not polynomial"),
        ({"momentum": True}, "momentum False, not True"),
        ({"dtype": torch.float16}, "dtype of q torch.float16 is not served"),
        ({"state_dtype": torch.float64}, "state dtype torch.float64 is not served"),
        ({"key_width": 300}, "key width 300 is beyond the kernels' 256"),
        ({"device": "cpu"}, "it needs a CUDA device, not cpu"),
    ):
        reason = delta_rule.PROVIDER.supports(call_of(**changes))
        assert reason is not None
        assert words in reason


def test_a_gpu_takes_it_by_itself_and_its_refusals_are_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delta_rule, "_backward_is_broken", lambda: False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "fla" else find(n))
    assert "pip install 'atlas-blocks[fla]'" in str(delta_rule.PROVIDER.supports(call_of()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: True if n == "fla" else find(n))
    choice = ops.explain_choice("omega_rule", call_of())
    assert (choice.provider, set(choice.refusals)) == ("fla", {"triton", "inline", "one_token"})
    assert choice.refusals["triton"] == "'fla' is preferred"
    chunks = call_of(rule=dataclasses.replace(RULE, chunk_size=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert providers.choose("omega_rule", "auto", "auto", "cuda", chunks) == "triton"
    choice = ops.explain_choice("omega_rule", call_of(value_width=300, key_width=300))
    refused = {"triton", "fla", "inline", "one_token"}
    assert (choice.provider, set(choice.refusals)) == ("definition", refused)


@pytest.mark.parametrize(
    ("version", "capability", "served"),
    [("3.6.0", 9, False), ("3.7.0", 9, False), ("3.7.1", 9, True), ("3.3.1", 9, True),
     ("3.6.0", 8, True), ("3.10.0", 9, True)],
)  # fmt: skip
def test_a_hopper_gpu_needs_a_triton_of_its_backward(
    version: str, capability: int, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: True if n == "fla" else find(n))
    monkeypatch.setattr(delta_rule, "no_device", lambda *call: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(delta_rule.triton, "__version__", version)
    assert (delta_rule.PROVIDER.supports(call_of()) is None) == served
    assert delta_rule.PROVIDER.supports(call_of(needs_grad=False)) is None


def fla() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        return pytest.importorskip("fla.ops.gated_delta_rule")


def test_the_recurrence_written_out_is_theirs() -> None:
    x = cast(inputs_of(batch=2, key_width=4), torch.float32, torch.float32, gradients=False)
    state = torch.randn(2, 2, 4, 3)
    arguments = {"g": x["alpha"].log(), "beta": x["eta"], "scale": 1.0, "initial_state": state}
    arguments["output_final_state"] = True
    ours = gated_delta_rule(x["q"], x["k"], x["v"], **arguments)
    theirs = fla().naive_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], **arguments)
    assert difference(ours, theirs) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 128])
def test_on_a_gpu_it_is_the_definition(dtype: torch.dtype, width: int) -> None:
    """Errors against float64, relative to a tensor's largest entry, of both in this dtype."""
    fla()
    exact = inputs_of(batch=2, length=200, key_width=width, value_width=width)
    rounded = cast(exact, torch.float32, dtype, device="cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        results = [run(rounded, name, (64, 1, 135)) for name in ("definition", "fla")]
    finally:
        torch.set_float32_matmul_precision(before)
    y, state, gradients = run(exact, "definition", (64, 1, 135))
    true = {"y": y, "memory": state.weights[0]} | gradients
    errors = []
    for y, state, gradients in results:
        found = {"y": y, "memory": state.weights[0]} | gradients
        errors.append({n: difference([found[n].double().cpu()], [true[n]]) for n in true})
    for name, gap in errors[1].items():
        assert gap <= 2 * errors[0][name] + 1e-2, f"{name}: {gap:.2g}"
