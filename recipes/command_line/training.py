"""demo, prepare, tokenizer and train."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from atlas_blocks import check
from atlas_blocks.recipes import demo as demonstration
from atlas_blocks.recipes import display, files, run_data, runs
from atlas_blocks.recipes.command_line.arguments import Cache, device_of
from atlas_blocks.recipes.command_line.exits import INTERRUPTED, WRONG
from atlas_blocks.recipes.compile_cache import compile_cache
from atlas_blocks.recipes.data import Source, train_tokenizer
from atlas_blocks.recipes.data.shards import SHARD, is_prepared, training_documents
from atlas_blocks.recipes.data.tokenizer import BYTES, LEAST
from atlas_blocks.recipes.distributed import layout
from atlas_blocks.recipes.distributed.layout import Layout


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo_output"),
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of weights and text crops.")] = 0,
    compiled: Annotated[bool, typer.Option(help="Also time a step under torch.compile.")] = True,
) -> None:
    """Train a tiny hybrid and a Transformer on real text, compare, sample, save."""
    learnt = demonstration.run(Console(), out=out, steps=steps, seed=seed, compiled=compiled)
    if learnt is None:
        raise typer.Exit(INTERRUPTED)


TOKENIZER = "bytes, a tokenizer.json, or the size of a byte-level BPE to train on the data."


FIELD = "The key of JSON lines, or the column of tables, that holds the text."


HELD_OUT = "Share of the documents that is never trained on."


Data = Annotated[
    Path, typer.Argument(help="A folder, text, .jsonl, .parquet, or a Hugging Face dataset.")
]


def prepare(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help=TOKENIZER)] = BYTES,
    field: Annotated[str, typer.Option(help=FIELD)] = "text",
    held_out: Annotated[float, typer.Option(help=HELD_OUT)] = 0.05,
    shard_tokens: Annotated[
        int, typer.Option(help="Tokens after which a file takes no further document.")
    ] = SHARD,
) -> None:
    """Turn text into tokens once: memory-mapped files that `train --data` takes."""
    options = run_data.DataOptions(data, tokenizer, field, held_out)
    if is_prepared(data):
        check.fail("data", "text", f"{data} (prepared already)")
    run_data.prepared(Console(), Source(data, field), options, out, shard_tokens)


def tokenizer_command(
    data: Data,
    out: Annotated[Path, typer.Option(help="tokenizer.json to write.")],
    size: Annotated[int, typer.Option(help="Tokens, those of single bytes included.")] = 4096,
    field: Annotated[str, typer.Option(help=FIELD)] = "text",
    held_out: Annotated[float, typer.Option(help="Share of the documents left out.")] = 0.05,
) -> None:
    """Train a byte-level BPE on the documents that `prepare` does not hold out."""
    console, source = Console(), Source(data, field)
    check.at_least("size", size, LEAST)
    files.check_writable("out", out)
    with display.working(console, f"training a tokenizer of {size:,} tokens on {source.name}"):
        found = train_tokenizer(training_documents(source, held_out), size)
    found.write(out)
    console.print(f"[bold]{out}[/]: {found.name}")


def train(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="A name that `recipes` lists, or a config's .toml or .json file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoints, logs.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="What `prepare` wrote, or takes; the Python standard library if not given."
        ),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help=TOKENIZER)] = BYTES,
    field: Annotated[str, typer.Option(help=FIELD)] = "text",
    held_out: Annotated[float, typer.Option(help=HELD_OUT)] = 0.05,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 1000,
    batch: Annotated[int, typer.Option(help="Crops per micro-batch.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per crop.")] = 128,
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    optimizer: Annotated[
        str, typer.Option(help="adamw; or muon, for the matrices of the blocks.")
    ] = "adamw",
    schedule: Annotated[
        str, typer.Option(help="cosine, to a tenth; or wsd: as it is, then to zero.")
    ] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.1,
    decay: Annotated[float, typer.Option(help="Share of the steps, of wsd.")] = 0.2,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    carry: Annotated[
        bool, typer.Option("--carry", help="Documents longer than a crop keep their state.")
    ] = False,
    spike: Annotated[
        float,
        typer.Option(help="Standard deviations from which a loss is skipped; 0 for none."),
    ] = 8.0,
    patience: Annotated[int, typer.Option(help="Bad steps in a row before it stops.")] = 3,
    compile: Annotated[bool, typer.Option(help="Compile every block.")] = True,
    cache: Cache = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and of the order of data.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the run in --out as it was set up; --steps may be another."
        ),
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 200,
    keep: Annotated[int, typer.Option(help="Checkpoints that are kept, the newest.")] = 3,
    validate_every: Annotated[int, typer.Option(help="Steps between two validations.")] = 500,
    wandb: Annotated[str, typer.Option(help="Project of Weights & Biases to log to.")] = "",
    tensor: Annotated[
        int, typer.Option(help="Processes of torchrun that share the heads of every block.")
    ] = 1,
    sequence: Annotated[int, typer.Option(help="Processes of torchrun that share every crop.")] = 1,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Train a model on text; Ctrl-C and SIGTERM save what there is, --resume goes on.

    Started by torchrun, in several processes at once.
    """
    settings = {
        "steps": steps,
        "batch": batch,
        "length": length,
        "accumulate": accumulate,
        "lr": lr,
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup": warmup,
        "decay": decay,
        "weight_decay": weight_decay,
        "clip": clip,
        "carry": carry,
        "spike": spike,
        "patience": patience,
        "compile": compile,
        "bf16": bf16,
        "seed": seed,
    }
    options = run_data.DataOptions(data, tokenizer, field, held_out)
    keeping = runs.Keeping(out, save_every, keep, validate_every, wandb)
    given = _given(ctx, [*settings, "tokenizer", "field", "held_out"])
    # What torchrun has started again goes on from what was saved.
    again = resume or (layout.restarts() and runs.holds_run(out))
    start = runs.resume if again else runs.begin
    arguments = (recipe, keeping, settings, options, given)
    divided = Layout.of(layout.ranks(), tensor=tensor, sequence=sequence)
    # Every rank may use the folder: what is in it is written whole.
    with files.no_empty_folder(out), compile_cache(cache):
        if layout.ranks() == 1:
            console = Console()
            done = runs.train(console, keeping, start(console, *arguments, device_of(device)))
        else:
            done = _train_together(start, keeping, arguments, divided, device)
    if not done:
        raise typer.Exit(INTERRUPTED)


def _train_together(
    start: Any, keeping: runs.Keeping, arguments: tuple[Any, ...], divided: Layout, device: str
) -> bool:
    """As one of the processes that torchrun has started, of which the first alone speaks."""
    # Imported here: it takes a second.
    from atlas_blocks.recipes.distributed.parallel import Parallel

    where = device_of(layout.own_device(device))
    console = Console() if layout.leads() else Console(quiet=True)
    try:
        with layout.joined(where):
            run = start(console, *arguments, where, Parallel(divided, where))
            return runs.train(console, keeping, run)
    except (ValueError, FloatingPointError, OSError) as error:
        # They all come to the same end.
        if layout.leads():
            raise
        raise typer.Exit(2 if isinstance(error, ValueError) else WRONG) from error


def _given(ctx: typer.Context, names: Collection[str]) -> set[str]:
    """Those of the options that stand on the command line."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
