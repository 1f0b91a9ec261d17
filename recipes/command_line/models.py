"""What a model is made of, and what is made of it: recipes, show, explain, export, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from atlas_blocks import check, with_settings
from atlas_blocks.recipes import checkpoint as checkpoints
from atlas_blocks.recipes import display, files, registry, runs, text
from atlas_blocks.recipes.command_line.arguments import device_of, integers_of, setting_of
from atlas_blocks.recipes.data.sources import needed


def recipes(
    part: Annotated[str, typer.Argument(help="Only names that contain this.")] = "",
) -> None:
    """List the recipes: pattern, parameters, memory state."""
    Console().print(display.recipe_table(part))


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
    for length in integers_of("lengths", lengths):
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
