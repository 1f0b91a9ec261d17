"""The commands that say what a model remembers: eval and stream."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from atlas_blocks import check
from atlas_blocks.recipes import evaluation, files, streaming
from atlas_blocks.recipes.command_line.arguments import device_of, setting_of
from atlas_blocks.recipes.command_line.exits import INTERRUPTED
from atlas_blocks.recipes.reading import open_reader

Model = Annotated[
    Path,
    typer.Argument(
        help="The folder of a run, a file that `train` wrote, or a folder of transformers."
    ),
]
Name = Annotated[str | None, typer.Option(help="Such as niah-1, babi-qa1, mqar.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Of the task, such as pairs=8; repeatable.")
]
Text = Annotated[Path | None, typer.Option(help="Text to hide facts in; the task's own if not.")]
Segment = Annotated[int, typer.Option(help="Tokens of a call: memory grows with it.")]
Device = Annotated[str, typer.Option(help="Such as cpu or cuda.")]


def _settings_of(settings: list[str] | None) -> dict[str, Any]:
    """Those of a task, by name."""
    return dict(setting_of(text, "NAME=VALUE, such as pairs=8") for text in settings or [])


def evaluate(
    checkpoint: Model,
    task: Name = None,
    file: Annotated[
        Path | None, typer.Option(help="In the place of a task: perplexity over this text.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens, such as 512,4k,1m: k is 1,024, m 1,048,576.")
    ] = "1k",
    samples: Annotated[int, typer.Option(help="Of each length.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    segment: Segment = 4096,
    settings: Settings = None,
    prose: Text = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; what it has is not done again.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    device: Device = "cpu",
) -> None:
    """Accuracy on a task, or perplexity over a file, by the length of what was read before."""
    plan = evaluation.Plan(
        lengths=evaluation.tokens_of("lengths", lengths),
        task=task,
        file=file,
        samples=samples,
        seed=seed,
        segment=segment,
        settings=_settings_of(settings),
        prose=prose,
    )
    reader = open_reader(checkpoint, device_of(device))
    record = evaluation.run(Console(quiet=as_json), reader, plan, out)
    if as_json:
        print(files.as_json(record), end="")


def stream(
    checkpoint: Model,
    tokens: Annotated[str, typer.Option(help="In all, such as 100k or 10m.")],
    task: Name = None,
    file: Annotated[
        Path | None, typer.Option(help="A text; one that is shorter begins again.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the task's text.")] = 0,
    segment: Segment = 4096,
    every: Annotated[
        str | None, typer.Option(help="Tokens between two lines and saves; a twentieth if not.")
    ] = None,
    settings: Settings = None,
    prose: Text = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the record and the state to resume from.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the stream in --out, as it was set up.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Read one long text with the state carried on; Ctrl-C and SIGTERM save it, --resume goes
    on."""

    def one(name: str, text: str) -> int:
        found = evaluation.tokens_of(name, text)
        if len(found) != 1:
            check.fail(name, "one number of tokens", repr(text))
        return found[0]

    plan = streaming.Plan(
        tokens=one("tokens", tokens),
        task=task,
        file=file,
        seed=seed,
        segment=segment,
        every=None if every is None else one("every", every),
        settings=_settings_of(settings),
        prose=prose,
    )
    reader = open_reader(checkpoint, device_of(device))
    if streaming.run(Console(), reader, plan, out, resume=resume) is None:
        raise typer.Exit(INTERRUPTED)
