"""`explain`: compile a model as the "atlas" backend does, and tell what happened."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import utils as dynamo
from torch._functorch import config as functorch

from atlas_blocks import check
from atlas_blocks.compile_passes.backend import PROVIDER, compile_graph
from atlas_blocks.compile_passes.graph_pass import PassRun
from atlas_blocks.compile_passes.report import Break, Graph, Recompile, Report
from atlas_blocks.compile_passes.survey import Survey
from atlas_blocks.graph import compiled_steps
from atlas_blocks.ops import use_provider
from atlas_blocks.state import State

# What the reasons of Dynamo mean for the one who wrote the line: words in them, and what helps.
HINTS = (
    (
        ("Tensor.item", ".item()", "_local_scalar_dense", "scalar_as"),
        "keep the value in a tensor (torch.where instead of if), or read it outside of the model",
    ),
    (
        ("data-dependent", "Data-dependent", "Data dependent", "nonzero"),
        "the path depends on values: compute both sides and torch.where, or branch outside",
    ),
    (("tolist",), "keep the values in a tensor, or read them outside of the model"),
    (("print", "builtin"), "drop it, or move it out of what is compiled"),
    (
        ("torch.compiler.disable", "torch._dynamo.disable", "graph_break()", "skipped"),
        "somebody switched the compiler off here: make the function an op (torch.library) instead",
    ),
    (("logging", "Logger"), "log outside of what is compiled, or torch._dynamo.config.ignore_..."),
)
DEFAULT_HINT = "rewrite the line in torch ops, move it out, or make it an op with torch.library"


def explain(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *more: Tensor | Sequence[Any] | Mapping[str, Any],
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Compile `model` and run it, forward and, where something requires a gradient, backward.

    inputs: of one call: a tensor, positional arguments in a tuple or list, or keywords in a dict.
    more: of further calls, which show what recompiles. dynamic, options: as of `compile`.
    A model in any place may break the graph: breaks are told, not raised. Parameters and their
    gradients stay as they are; what the forward itself writes to (buffers) is written.

    Caches are left aside, so that times are those of a cold start and every pass runs; like
    torch._dynamo.explain it begins with torch._dynamo.reset(). Returns the report; print it with
    rich for the tables. Raises ValueError where there is nothing to compile.
    """
    if not isinstance(model, nn.Module) and not callable(model):
        check.fail("model", "a module or a function", type(model).__name__)
    device = _device(model, inputs)
    balance = machine_balance(device.type)
    surveys: list[Survey] = []
    passes: list[PassRun] = []
    graphs: list[tuple[int, bool]] = []
    call = 0

    def backend(graph: fx.GraphModule, example: Sequence[Tensor]) -> Any:
        number = len(surveys)
        survey = Survey(number, balance[0] / balance[1])
        surveys.append(survey)
        symbolic = any(isinstance(n, torch.SymInt) for n in _sizes(example))
        graphs.append((call, symbolic))
        return compile_graph(
            graph,
            example,
            options={**(options or {}), "force_disable_caches": True},
            number=number,
            record=passes.append,
            survey=[survey],
        )

    torch._dynamo.reset()
    seen_breaks = len(dynamo.graph_break_reasons)
    # Told apart by identity, and held on to for that: torch keeps the last few alone.
    seen_compiles = dynamo.get_compilation_metrics()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    provider = (options or {}).get(PROVIDER, "auto")
    seconds, recompiles, tracing = [], [], 0.0
    traced_for = nullcontext() if provider == "auto" else use_provider(provider)
    with traced_for, functorch.patch(enable_autograd_cache=False):
        for call, arguments in enumerate((inputs, *more)):
            first, again = (_seconds(compiled, arguments) for _ in range(2))
            seconds.append(max(0.0, first - again))
            # What ops compile inside of their bodies is none of the model's graphs.
            recent = dynamo.get_compilation_metrics()
            metrics = [m for m in recent if all(m is not seen for seen in seen_compiles)]
            seen_compiles += metrics
            metrics = [m for m in metrics if m.co_filename not in compiled_steps.files]
            recompiles += [_recompile(call, m) for m in metrics if m.recompile_reason]
            tracing += sum(_tracing(m) for m in metrics)
    breaks = [_break(r) for r in dynamo.graph_break_reasons[seen_breaks:]]
    return Report(
        device=device.type,
        graphs=tuple(
            Graph(s.number, at, s.nodes.get("forward", 0), s.nodes.get("backward", 0), symbolic)
            for s, (at, symbolic) in zip(surveys, graphs, strict=True)
        ),
        breaks=tuple(dict.fromkeys(breaks)),
        ops=tuple(use for s in surveys for use in s.ops),
        work=tuple(w for s in surveys for w in s.work),
        recompiles=tuple(recompiles),
        passes=tuple(passes),
        compile_seconds=tuple(seconds),
        dynamo_seconds=tracing,
        balance=balance,
    )


def _seconds(compiled: Any, arguments: Any) -> float:
    """Of one call, forward and backward; gradients of parameters end as they were."""
    began = time.perf_counter()
    if isinstance(arguments, Mapping):
        output = compiled(**arguments)
    elif isinstance(arguments, Tensor):
        output = compiled(arguments)
    else:
        output = compiled(*arguments)
    wanted = [t for t in tensors_in(output) if t.requires_grad and t.is_floating_point()]
    if wanted:
        torch.autograd.grad([t.sum() for t in wanted], _leaves(wanted), allow_unused=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What requires a gradient of these, wherever the model has it from."""
    found: list[Tensor] = [t for t in tensors if t.grad_fn is None]
    queue: list[Any] = [t.grad_fn for t in tensors]
    seen = {None}
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        queue += [n for n, _ in node.next_functions]
        found += [node.variable] if hasattr(node, "variable") else []
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts, states and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    if isinstance(value, State):
        return value.tensors()
    if dataclasses.is_dataclass(value):
        return [t for f in dataclasses.fields(value) for t in tensors_in(getattr(value, f.name))]
    return []


def _device(model: Any, inputs: Any) -> torch.device:
    own = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    found = [*own, *tensors_in(inputs)]
    if not found:
        check.fail("inputs", "tensors, in them or in the model", "none")
    return found[0].device


def _sizes(example: Sequence[Any]) -> list[Any]:
    return [n for t in example for n in (t.shape if isinstance(t, Tensor) else (t,))]


def _tracing(metrics: Any) -> float:
    whole, inside = metrics.entire_frame_compile_time_s, metrics.backend_compile_time_s
    return (whole or 0.0) - (inside or 0.0)


def _break(reason: Any) -> Break:
    frame = reason.user_stack[-1] if reason.user_stack else None
    lines = [line.strip() for line in str(reason.reason).splitlines() if line.strip()]
    text = next((line for line in lines), "")
    detail = next((x for x in lines if x.startswith("Explanation:")), "")
    whole = " ".join([*lines, frame.line or "" if frame else ""])
    hint = next((h for words, h in HINTS if any(w in whole for w in words)), DEFAULT_HINT)
    return Break(
        file=frame.filename if frame else "?",
        line=(frame.lineno or 0) if frame else 0,
        code=(frame.line or "").strip() if frame else "",
        reason=" ".join(x for x in (text, detail.removeprefix("Explanation:").strip()) if x),
        hint=hint,
    )


def _recompile(call: int, metrics: Any) -> Recompile:
    return Recompile(
        call=call,
        function=metrics.co_name or "?",
        file=metrics.co_filename or "?",
        line=metrics.co_firstlineno or 0,
        guard=" ".join((metrics.recompile_reason or "").split()),
    )


@functools.cache
def machine_balance(device: str) -> tuple[float, float]:
    """(FLOPs, bytes) per second of a float32 matrix product and of a copy, the best of a few."""
    n = 1024
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    source = torch.empty(32 * 2**20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)

    def best(work: Any) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    with torch.no_grad():
        return 2 * n**3 / best(lambda: a @ b), 2 * source.numel() / best(
            lambda: target.copy_(source)
        )
