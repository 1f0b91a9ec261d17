"""What a trained model is for: generate and serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from atlas_blocks import check
from atlas_blocks.recipes import checkpoint as checkpoints
from atlas_blocks.recipes import runs, text
from atlas_blocks.recipes.command_line.arguments import Cache, device_of
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.generate import stream
from atlas_blocks.recipes.model import LanguageModel
from atlas_blocks.recipes.serving import server
from atlas_blocks.recipes.serving.service import Options
from atlas_blocks.recipes.serving.text import Writer

Trained = Annotated[
    Path, typer.Argument(help="The folder of a run, or a file that `train` or `demo` wrote.")
]


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
    cache: Cache = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Answer OpenAI's HTTP API: completions and chat, many at a time, until Ctrl-C."""
    check.between("port", port, 0, 65535)
    options = Options(max_batch, piece, prefix_cache, sessions, chat_template, threads)
    model, coder = _trained(checkpoint, device_of(device))
    server.run(model, coder, host, port, Console(), options, cache)


def _trained(checkpoint: Path, device: torch.device) -> tuple[LanguageModel, Tokenizer]:
    """A model and what its tokens are. Raises ValueError where that is not known."""
    saved = runs.newest(checkpoint)
    model, coder = checkpoints.load(saved, device), Tokenizer(checkpoints.tokenizer(saved))
    if coder.json is None and model.config.vocab_size > coder.vocab_size:
        vocabulary = f"a vocabulary of {model.config.vocab_size:,}"
        check.fail(f"checkpoint {saved}", "a tokenizer, or a model of bytes", vocabulary)
    return model, coder
