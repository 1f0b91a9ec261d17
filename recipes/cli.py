"""The command line; `atlas-blocks --help` lists the commands.

Bad input gets one line on stderr and exit code 2; a run that diverges, a kernel that is wrong, or a
file that cannot be written, one line and exit code 1; Ctrl-C and SIGTERM save what has been trained
and exit with 130.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from atlas_blocks import check, with_settings
from atlas_blocks.recipes import checkpoint as checkpoints
from atlas_blocks.recipes import commands, display, files, registry, runs, separation, text
from atlas_blocks.recipes import demo as demonstration
from atlas_blocks.recipes.arguments import device_of, setting_of
from atlas_blocks.recipes.bench.subjects import MODES, Size
from atlas_blocks.recipes.data import Source, Tokenizer, train_tokenizer
from atlas_blocks.recipes.data.shards import SHARD, is_prepared, training_documents
from atlas_blocks.recipes.data.sources import needed
from atlas_blocks.recipes.data.tokenizer import BYTES, LEAST
from atlas_blocks.recipes.distributed import layout
from atlas_blocks.recipes.distributed.layout import Layout
from atlas_blocks.recipes.generate import stream
from atlas_blocks.recipes.model import LanguageModel
from atlas_blocks.recipes.serving import server
from atlas_blocks.recipes.serving.service import Options
from atlas_blocks.recipes.serving.text import Writer

INTERRUPTED = 130
WRONG = 1

app = typer.Typer(
    help="ATLAS memory layers and hybrids: recipes, training, generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"atlas-blocks {checkpoints.version()} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """ATLAS memory layers and hybrids: recipes, training, generation."""


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
app.add_typer(bench, name="bench")
app.command("eval")(commands.evaluate)
app.command("stream")(commands.stream)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `atlas-blocks`; exits the process."""
    try:
        with _without_torch_warnings():
            code = app(arguments, prog_name="atlas-blocks", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does; the exit may not write to it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = WRONG
    except (ValueError, FloatingPointError, OSError) as error:
        code = _fail(str(error), 2 if isinstance(error, ValueError) else WRONG)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # Typer's usage errors carry a message for people; anything else is a bug and shows itself.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        # Without arguments the help was shown, and there is nothing to add.
        code = _fail(message(), 2) if message() else 2
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _without_torch_warnings() -> Iterator[None]:
    """Without what torch and its compiler say of their own parts: nobody here can act on it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Of treespecs that its export pickles, torch warns in the name of copyreg.
            warnings.filterwarnings("ignore", module=r"torch(\.|$)|copyreg$")
            yield
    finally:
        logging.disable(before)


def _fail(message: str, code: int) -> int:
    print(f"atlas-blocks: {' '.join(message.split())}", file=sys.stderr)
    return code


@app.command()
def recipes(
    part: Annotated[str, typer.Argument(help="Only names that contain this.")] = "",
) -> None:
    """List the recipes: pattern, parameters, memory state."""
    Console().print(display.recipe_table(part))


@app.command()
def show(
    source: Annotated[
        str,
        typer.Argument(
            help="A name that `recipes` lists; layers in turn at one of their sizes, such as "
            "'3*atlas+transformer-tiny'; a config's file, .toml or .json; a checkpoint, "
            "or the folder of a run."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Such as layers.0.mixer.window=32, or layers.*.mlp_width=128; repeatable."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The config, as a file that the commands take.")
    ] = False,
) -> None:
    """Show how a model is assembled."""
    saved = Path(source).exists() and not (registry.is_file(source) or source in registry.names())
    config = checkpoints.config(runs.newest(Path(source))) if saved else registry.config(source)
    config = with_settings(config, dict(map(setting_of, settings or [])))
    if as_json:
        print(config.to_json())
    else:
        Console().print(display.module_tree(config))


@app.command()
def explain(
    recipe: Annotated[str, typer.Argument(help="A name that `recipes` lists.")],
    lengths: Annotated[
        str, typer.Option(help="Tokens of each call, such as 128,160,192: shows what recompiles.")
    ] = "128",
    batch: Annotated[int, typer.Option(help="Rows of each call.")] = 2,
    provider: Annotated[str, typer.Option(help="Of the ops: auto, definition, triton...")] = "auto",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="No gradients.")] = False,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Compile a recipe and tell what happened: graphs, breaks, providers, passes, work."""
    # Imported here: it loads all of Inductor.
    from atlas_blocks.compile_passes import backend, diagnose

    if batch < 1:
        raise ValueError(f"batch: expected an int >= 1, got {batch}")
    where = device_of(device)
    calls = []
    for length in _integers("lengths", lengths):
        if length < 1:
            raise ValueError(f"lengths: expected integers >= 1, got {length}")
        calls.append(torch.randint(0, text.VOCAB_SIZE, (batch, length), device=where))
    model = registry.build(recipe).to(where).requires_grad_(not forward_only)
    console = Console()
    words = f"compiling {recipe}, without caches: up to a minute for each new graph"
    with display.working(console, words):
        report = diagnose.explain(model, *calls, options={backend.PROVIDER: provider})
    console.print(f"[bold cyan]{recipe}[/] on {device}, {batch} x {lengths} tokens")
    console.print(report)


@app.command()
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


@app.command()
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
    options = runs.DataOptions(data, tokenizer, field, held_out)
    if is_prepared(data):
        check.fail("data", "text", f"{data} (prepared already)")
    runs.prepared(Console(), Source(data, field), options, out, shard_tokens)


@app.command("tokenizer")
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


@app.command()
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
    options = runs.DataOptions(data, tokenizer, field, held_out)
    keeping = runs.Keeping(out, save_every, keep, validate_every, wandb)
    given = _given(ctx, [*settings, "tokenizer", "field", "held_out"])
    # What torchrun has started again goes on from what was saved.
    again = resume or (layout.restarts() and runs.holds_run(out))
    start = runs.resume if again else runs.begin
    arguments = (recipe, keeping, settings, options, given)
    divided = Layout.of(layout.ranks(), tensor=tensor, sequence=sequence)
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


Trained = Annotated[
    Path, typer.Argument(help="The folder of a run, or a file that `train` or `demo` wrote.")
]


@app.command()
def generate(
    checkpoint: Trained,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; repeatable. 'def ' if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Probability mass kept.")] = 0.95,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was there before is less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a continuation; repeatable.")
    ] = None,
    stop_id: Annotated[
        list[int] | None, typer.Option(help="A token that does; repeatable.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the first continuation; the next has one more.")
    ] = 0,
    batch: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Continue prompts, token by token, to the end of the document; Ctrl-C ends it with what there
    is."""
    if batch < 1:
        raise ValueError(f"batch: expected an int >= 1, got {batch}")
    if "" in (stop or []):
        check.fail("stop", "text", "none")
    where = device_of(device)
    model, coder = _trained(checkpoint, where)
    starts = [
        p.encode(errors="surrogateescape").decode(errors="replace") for p in prompt or ["def "]
    ]
    rows = [torch.from_numpy(t.astype("int64")).to(where) for t in coder.encode(starts)]
    ends = {*(stop_id or []), *([] if coder.end is None else [coder.end])}
    shown = [text.safe(start) for start in starts for _ in range(batch)]
    writers = [Writer(coder, stop or []) for _ in shown]

    def show(row: int, more: str) -> None:
        shown[row] += text.safe(more)
        if len(shown) == 1:  # as it comes
            print(text.safe(more), end="", flush=True)

    def stopped(row: int, token: int) -> bool:
        if token not in ends:
            show(row, writers[row].write(token))
        return token in ends or writers[row].stopped

    new = stream(
        model,
        [row for row in rows for _ in range(batch)],
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stopped=stopped,
    )
    if len(shown) == 1:
        print(shown[0], end="", flush=True)
    try:
        for _ in new:
            pass
        for row, writer in enumerate(writers):
            show(row, writer.end())
    finally:
        if len(shown) == 1:
            print()
        else:
            for number, whole in enumerate(shown, 1):
                print(f"--- {number} ---\n{whole}")


@app.command()
def serve(
    checkpoint: Trained,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(help="Sequences that go on together.")] = 16,
    piece: Annotated[
        int, typer.Option(help="Tokens of prompts that are read between two of their tokens.")
    ] = 512,
    prefix_cache: Annotated[
        int,
        typer.Option(help="MiB for states after prompts, so that what they share is read once."),
    ] = 256,
    sessions: Annotated[
        Path | None, typer.Option(help="Folder for named states; without it there are none.")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A .jinja file or tokenizer_config.json; ChatML if not given."),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(help="Of torch. Above 1 a text may depend on those beside it, by rounding."),
    ] = 1,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Answer OpenAI's HTTP API: completions and chat, many at a time, until Ctrl-C."""
    check.between("port", port, 0, 65535)
    options = Options(max_batch, piece, prefix_cache, sessions, chat_template, threads)
    model, coder = _trained(checkpoint, device_of(device))
    server.run(model, coder, host, port, Console(), options)


def _trained(checkpoint: Path, device: torch.device) -> tuple[LanguageModel, Tokenizer]:
    """A model and what its tokens are. Raises ValueError where that is not known."""
    saved = runs.newest(checkpoint)
    model, coder = checkpoints.load(saved, device), Tokenizer(checkpoints.tokenizer(saved))
    if coder.json is None and model.config.vocab_size > coder.vocab_size:
        vocabulary = f"a vocabulary of {model.config.vocab_size:,}"
        check.fail(f"checkpoint {saved}", "a tokenizer, or a model of bytes", vocabulary)
    return model, coder


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A file that `train` wrote, or a recipe's name.")],
    out: Annotated[Path, typer.Option(help="Package to write, a .pt2 file.")],
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 1,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Compile one token's step ahead of time: a package that runs without Python."""
    # Imported here: exporting loads the whole compiler.
    from atlas_blocks.recipes.export import package

    if batch < 1:
        raise ValueError(f"batch: expected an int >= 1, got {batch}")
    where = device_of(device)
    if out.suffix != ".pt2":
        check.fail("out", "a file name that ends in .pt2", out)
    torch.manual_seed(0)
    saved = Path(source)
    is_saved = saved.is_file() and not registry.is_file(source)
    model = checkpoints.load(saved, where) if is_saved else registry.build(source).to(where)
    files.check_writable("out", out)
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=where)
    console = Console()
    with torch.no_grad():
        state = model(tokens[:, :0]).state
    with display.working(console, "compiling one token's step: up to a minute for each block"):
        package(model, tokens, state, out)
    console.print(
        f"[bold]{out}[/]: (tokens [{batch}, 1], {len(state.tensors())} tensors of the state) -> "
        "(logits, the state after the token)"
    )


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="The folder of a run or a file that `train` wrote; or a folder that transformers' "
            "save_pretrained wrote of such a model."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write for transformers; the other way, a .safetensors.")
    ],
) -> None:
    """Turn a checkpoint into a folder for Hugging Face transformers, or back."""
    needed("transformers", "convert", "hf")
    # Imported here: transformers is an extra, and slow to import.
    from atlas_blocks.recipes.hugging_face import convert as conversion

    if conversion.is_folder(source):
        conversion.to_checkpoint(source, out)
    else:
        conversion.to_folder(runs.newest(source), out)
    Console().print(f"[bold]{out}[/]")


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
    cold: Annotated[bool, typer.Option(help="Also time the first call in fresh processes.")] = True,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="By the process's CPU time: on a shared machine.")
    ] = False,
    against: Annotated[
        Path | None, typer.Option(help="A .json of an earlier run: say what moved beyond noise.")
    ] = None,
) -> None:
    """Check a recipe or a block compiled against eager, then time both."""
    from atlas_blocks.recipes.bench import model as benchmark

    plan = benchmark.Plan(
        name=name,
        device=device_of(device),
        size=Size(batch=batch, tokens=tokens, dim=dim, heads=heads),
        modes=MODES if modes is None else tuple(modes.split(",")),
        rounds=rounds,
        cold=cold,
        cpu_time=cpu_time,
    )
    problem = benchmark.run(Console(), plan, out, against)
    if problem:
        raise typer.Exit(_fail(problem, WRONG))


@app.command("separation")
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
        dims=None if dims is None else _integers("dims", dims),
        heads=heads,
        batch=batch,
        tokens=tokens,
        rounds=rounds,
        everything=everything,
        quick=quick,
        compiled=compiled,
    )
    with torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext():
        problem = benchmark.run(Console(), chosen, out)
    if problem:
        raise typer.Exit(_fail(problem, WRONG))


@app.command()
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
        degrees=_integers("degrees", degrees),
        seeds=seeds,
        iterations=iterations,
        longest=longest,
        unit_keys=unit_keys,
    )
    laboratory.run(Console(), config, out)


@app.command()
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


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: expected integers such as 64,128, got {text!r}") from None
