"""bench, and the laboratories: separation, capacity, ablate."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from atlas_blocks import check
from atlas_blocks.recipes import separation
from atlas_blocks.recipes.bench.subjects import BOTH, FORWARD, MODES, Size
from atlas_blocks.recipes.command_line.arguments import Cache, device_of, integers_of
from atlas_blocks.recipes.command_line.exits import WRONG, fail
from atlas_blocks.recipes.compile_cache import compile_cache


class _NameOrCommand(TyperGroup):
    """`bench NAME` for `bench model NAME`, where NAME is no command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["model", *args]
        return super().resolve_command(ctx, args)


bench = typer.Typer(
    cls=_NameOrCommand,
    help="Check and time: `bench NAME` a recipe or a block, eager and compiled; `bench kernels` "
    "the kernels beside other libraries'.",
    no_args_is_help=True,
    subcommand_metavar="NAME|kernels [OPTIONS]",
)


@bench.command("model")
def bench_model(
    name: Annotated[str, typer.Argument(help="A recipe, or a block such as AtlasMemory.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench_output"),
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Rows of a call.")] = 4,
    tokens: Annotated[int, typer.Option(help="T; of the prefix, where one is decoded.")] = 128,
    dim: Annotated[int, typer.Option(help="Width of a block; a recipe has its own.")] = 64,
    heads: Annotated[int, typer.Option(help="Heads of a block; a recipe has its own.")] = 4,
    rounds: Annotated[int, typer.Option(help="Samples of each.")] = 20,
    modes: Annotated[
        str | None, typer.Option(help=f"Such as forward,decode; of {', '.join(MODES)}.")
    ] = None,
    cold: Annotated[
        bool, typer.Option(help="Also time the first call in fresh processes; not with --peers.")
    ] = True,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="By the process's CPU time: on a shared machine.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="A .json of an earlier run: say what moved beyond noise.")
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="AtlasMemory beside memory layers of other libraries (the extra bench).",
        ),
    ] = False,
    cache: Cache = None,
) -> None:
    """Check a recipe or a block compiled against eager, then time both."""
    from atlas_blocks.recipes.bench import model as benchmark

    plan = benchmark.Plan(
        name=name,
        device=device_of(device),
        size=Size(batch=batch, tokens=tokens, dim=dim, heads=heads),
        modes=tuple(modes.split(",")) if modes else (FORWARD, BOTH) if peers else MODES,
        rounds=rounds,
        cold=cold and not peers,
        cpu_time=cpu_time,
        beside_peers=peers,
    )
    with compile_cache(cache):
        problem = benchmark.run(Console(), plan, out, against)
    if problem:
        raise typer.Exit(fail(problem, WRONG))


@bench.command()
def kernels(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench_output"),
    device: Annotated[
        str, typer.Option(help="cuda; or cpu, small and by the wall clock, to try the command.")
    ] = "cuda",
    dims: Annotated[str | None, typer.Option(help="Head widths, such as 64,128.")] = None,
    heads: Annotated[int | None, typer.Option(help="16 on a GPU if not given.")] = None,
    batch: Annotated[int | None, typer.Option(help="4 on a GPU if not given.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="T of the main comparison, 8192 on a GPU.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Samples of each, 30 on a GPU.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The first width, no sweep over T, few rounds.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every row, also at every length and width.")
    ] = False,
    compiled: Annotated[bool, typer.Option(help="Also compile the definition's steps.")] = True,
    cache: Cache = None,
) -> None:
    """Check every provider of the recurrence, then time it beside its rivals."""
    # Imported here: counting FLOPs loads Triton, which the other commands do without.
    from atlas_blocks.recipes.bench import kernels as benchmark

    if device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: cannot use {device!r}: no CUDA device is here (--device cpu runs the same "
            "by the wall clock, small)"
        )
    where = device_of(device)
    chosen = benchmark.plan(
        where,
        dims=None if dims is None else integers_of("dims", dims),
        heads=heads,
        batch=batch,
        tokens=tokens,
        rounds=rounds,
        everything=everything,
        quick=quick,
        compiled=compiled,
    )
    on_device = torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext()
    with compile_cache(cache), on_device:
        problem = benchmark.run(Console(), chosen, out)
    if problem:
        raise typer.Exit(fail(problem, WRONG))


def separation_command(
    task: Annotated[str, typer.Option(help="parity or overwrite.")] = "parity",
    out: Annotated[Path, typer.Option(help="JSON file for the results.")] = Path("separation.json"),
    seeds: Annotated[int, typer.Option(help="Runs of each model.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps of each run.")] = 500,
    depth: Annotated[int, typer.Option(help="Blocks of each model.")] = 2,
) -> None:
    """Where a Transformer fails and Dot succeeds: equal parameters, equal steps."""
    check.choice("task", task, separation.TASKS)
    for name, value in (("seeds", seeds), ("steps", steps), ("depth", depth)):
        check.at_least(name, value, 1)
    chosen = separation.TASKS[task]()
    separation.run(Console(), out=out, task=chosen, depth=depth, steps=steps, seeds=seeds)


def capacity(
    dim: Annotated[int, typer.Option(help="Width of keys and values.")] = 4,
    degrees: Annotated[str, typer.Option(help="Of the polynomial features.")] = "1,2,3",
    seeds: Annotated[int, typer.Option(help="Draws of the pairs.")] = 3,
    iterations: Annotated[int, typer.Option(help="Of the descent.")] = 800,
    longest: Annotated[int, typer.Option(help="Pairs that one pass is shown.")] = 64,
    unit_keys: Annotated[
        bool, typer.Option("--unit-keys", help="Keys of length 1, as in the layer.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("capacity_output"),
) -> None:
    """Measure how many pairs each memory stores: closed form, descent, one pass."""
    from atlas_blocks.recipes import capacity as laboratory

    config = laboratory.CapacityConfig(
        dim=dim,
        degrees=integers_of("degrees", degrees),
        seeds=seeds,
        iterations=iterations,
        longest=longest,
        unit_keys=unit_keys,
    )
    laboratory.run(Console(), config, out)


def ablate(
    task: Annotated[str, typer.Option(help="text or recall.")] = "text",
    only: Annotated[
        str, typer.Option(help="Switches, such as atlas,mag,window-1; all if not given.")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Of weights and data, for every switch.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps of each cell.")] = 300,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    pairs: Annotated[int, typer.Option(help="Of the recall task.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    dim: Annotated[int, typer.Option(help="Width of the models.")] = 64,
    heads: Annotated[int, typer.Option(help="Heads of the models.")] = 4,
    depth: Annotated[int, typer.Option(help="Blocks of the models.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("ablate_output"),
) -> None:
    """Train Atlas with one thing changed at a time; resumes what --out holds."""
    from atlas_blocks.recipes import ablation

    config = ablation.AblationConfig(
        task=task,
        switches=tuple(only.split(",")) if only else tuple(ablation.SWITCHES),
        seeds=seeds,
        steps=steps,
        batch=batch,
        length=length,
        pairs=pairs,
        lr=lr,
        dim=dim,
        heads=heads,
        depth=depth,
    )
    ablation.run(Console(), config, out)
