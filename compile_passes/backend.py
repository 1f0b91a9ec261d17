"""The "atlas" backend of torch.compile: Inductor with our passes, given to one compile at a time.

`torch.compile(model, backend="atlas")` finds it by its entry point, with nothing imported. Nothing
process-wide is changed: passes travel as options of the compile, and Inductor's cache of graphs
knows them by their uuids.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule

from atlas_blocks import Block, check
from atlas_blocks.compile_passes.clean_up import CleanUp
from atlas_blocks.compile_passes.graph_pass import GraphPass, Passes, PassRun
from atlas_blocks.compile_passes.lower_ops import LowerOps
from atlas_blocks.compile_passes.select_attention import SelectAttention
from atlas_blocks.graph import one_program
from atlas_blocks.graph.providers import drop_provider, keep_provider, use_provider

M = TypeVar("M", bound="nn.Module | Callable[..., Any]")
N = TypeVar("N", bound=nn.Module)

# Graphs of one block's code: kinds of block, each with and without gradients, at two lengths.
GRAPHS = 64

# Options of ours, beside Inductor's: lower_ops' mode, and the passes to leave out.
PROVIDER, DISABLE = "atlas.provider", "atlas.disable"
PASSES: dict[str, Callable[[str], GraphPass]] = {
    SelectAttention.name: lambda provider: SelectAttention(),
    LowerOps.name: LowerOps,
    CleanUp.name: lambda provider: CleanUp(),
}


def compile(
    model: M,
    *,
    provider: str = "auto",
    disable: Collection[str] = (),
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> M:
    """`torch.compile(model, backend="atlas")` with its choices spelt out.

    provider: of the ops, and while the model is traced too: "definition" keeps the memory rule one
    node, "inline" takes it into the graph, "triton" and others raise ValueError at the first call
    where they cannot serve, "auto" chooses. disable: names of passes to leave out, of `PASSES`.
    fullgraph, dynamic, mode, options: as of torch.compile; options are Inductor's.
    Returns what torch.compile does. Raises ValueError for an unknown provider or pass.
    """
    ours = {PROVIDER: provider, DISABLE: tuple(disable)}
    make_passes(ours)
    # torch takes a mode or options, and these are options.
    settings = {**_mode_options(mode, dynamic), **(options or {}), **ours}
    compiled: Any = torch.compile(
        model, backend="atlas", fullgraph=fullgraph, dynamic=dynamic, options=settings
    )
    if provider == "auto":
        return compiled
    if isinstance(model, nn.Module):
        return _keeping(compiled, provider)
    return _traced_for(provider, compiled)


def compile_blocks(
    model: N,
    *,
    provider: str = "auto",
    disable: Collection[str] = (),
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> N:
    """Every outermost `Block` of a model compiled by itself, in place; returns the model.

    Blocks of one kind share one compilation, so that it takes as long for twelve layers as for two;
    what lies between them stays eager. The arguments are those of `compile`. Raises ValueError as
    it does, and for a model without a block.
    """
    blocks = list(_outermost(model)) if isinstance(model, nn.Module) else []
    if not blocks:
        check.fail("model", "a module with blocks of atlas_blocks in it", type(model).__name__)
    ours = {PROVIDER: provider, DISABLE: tuple(disable)}
    make_passes(ours)
    settings: dict[str, Any] = {"dynamic": dynamic, "options": {**(options or {}), **ours}}
    # Dynamo counts the graphs of all blocks by the code that they share.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        settings["recompile_limit"] = GRAPHS
    for block in blocks:
        block.compile(backend="atlas", **settings)
        drop_provider(block)
        if provider != "auto":
            keep_provider(block, provider)
    return model


def _outermost(module: nn.Module) -> Iterator[Block]:
    if isinstance(module, Block):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)


class _Keeping(OptimizedModule):
    """A compiled module that keeps a provider, also copied and pickled; torch's own is then built
    anew, of its model alone."""

    provider = "auto"

    def __reduce__(self) -> Any:
        return _built_anew, (self._orig_mod, self.dynamo_ctx, self.provider)


def _built_anew(model: nn.Module, context: Any, provider: str) -> nn.Module:
    return _keeping(OptimizedModule(model, context), provider)


def _keeping(compiled: Any, provider: str) -> Any:
    compiled.__class__ = _Keeping
    compiled.provider = provider
    return keep_provider(compiled, provider)


def _traced_for(provider: str, function: Any) -> Any:
    """The function, whose ops ask for the provider, and so do those of what it is traced to."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with use_provider(provider):
            return function(*arguments, **named)

    return call


def atlas(
    graph: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend itself, as Dynamo calls it."""
    return compile_graph(graph, inputs, mode=mode, options=options)


def compile_graph(
    graph: fx.GraphModule,
    inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    number: int = 0,
    record: Callable[[PassRun], None] = lambda run: None,
    survey: Sequence[Callable[[fx.Graph], None]] = (),
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs, the `number`-th; `survey` sees what our passes leave."""
    settings = {**_mode_options(mode, None), **(options or {})}
    theirs = settings.pop("post_grad_custom_pre_pass", None) or ()
    theirs = theirs if isinstance(theirs, (list, tuple)) else (theirs,)
    passes = make_passes(settings)
    for name in (PROVIDER, DISABLE):
        settings.pop(name, None)
    early = [p for p in passes if p.before_autograd]
    late = [p for p in passes if not p.before_autograd]
    Passes(early, number, record)(graph.graph)
    graph.recompile()
    settings["post_grad_custom_pre_pass"] = Passes(late, number, record, (*theirs, *survey))
    return one_program.inductor(graph, inputs, settings)


def make_passes(options: Mapping[str, Any]) -> list[GraphPass]:
    """The passes that these options leave on."""
    disabled = options.get(DISABLE, ())
    disabled = (disabled,) if isinstance(disabled, str) else disabled
    for name in disabled:
        check.choice("disable", name, PASSES)
    provider = options.get(PROVIDER, "auto")
    return [make(provider) for name, make in PASSES.items() if name not in disabled]


def _mode_options(mode: str | None, dynamic: bool | None) -> dict[str, Any]:
    """Inductor's options for a mode of torch.compile."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode, dynamic)) if mode and mode != "default" else {}
