"""The command line; `atlas-blocks --help` lists the commands.

Bad input gets one line on stderr and exit code 2; a run that diverges, a kernel that is wrong, or a
file that cannot be written, one line and exit code 1; Ctrl-C and SIGTERM save what has been trained
and exit with 130.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from atlas_blocks.recipes import checkpoint as checkpoints
from atlas_blocks.recipes.command_line import measuring, models, reading, training, using
from atlas_blocks.recipes.command_line.exits import INTERRUPTED, WRONG, fail

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

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


COMMANDS = {
    "recipes": models.recipes,
    "show": models.show,
    "explain": models.explain,
    "demo": training.demo,
    "prepare": training.prepare,
    "tokenizer": training.tokenizer_command,
    "train": training.train,
    "eval": reading.evaluate,
    "stream": reading.stream,
    "generate": using.generate,
    "serve": using.serve,
    "export": models.export,
    "convert": models.convert,
    "separation": measuring.separation_command,
    "capacity": measuring.capacity,
    "ablate": measuring.ablate,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(measuring.bench, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `atlas-blocks`; exits the process."""
    keep_freed_memory()
    try:
        with _without_torch_warnings():
            code = app(arguments, prog_name="atlas-blocks", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does; the exit may not write to it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = WRONG
    except (ValueError, FloatingPointError, OSError) as error:
        code = fail(str(error), 2 if isinstance(error, ValueError) else WRONG)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        # Typer's usage errors carry a message for people; anything else is a bug and shows itself.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        # Without arguments the help was shown, and there is nothing to add.
        code = fail(message(), 2) if message() else 2
    sys.exit(code if isinstance(code, int) else 0)


def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MB of what is freed, in place of giving the memory of every larger
    tensor back to the system, which fills each of its pages with zeros again: of a token for 16
    sequences that was a sixth to a third of the time. Nothing where the user has set it, or it is
    another library."""
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)


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
