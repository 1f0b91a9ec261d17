"""A model behind a port, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path
from typing import Any

from rich.console import Console

from atlas_blocks import check
from atlas_blocks.recipes.compile_cache import compile_cache
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.model import LanguageModel
from atlas_blocks.recipes.serving.service import Options, Service

# Seconds that answers have to be told that the server stops.
GRACE = 2


def run(
    model: LanguageModel,
    tokenizer: Tokenizer,
    host: str,
    port: int,
    console: Console,
    options: Options,
    cache: Path | None = None,
) -> None:
    """Serve, and say where.

    cache: folder for what is compiled, as `compile_cache` takes it. Raises ValueError for an option
    that cannot be followed and a host that is not this machine, OSError where the port is not free.
    """
    try:
        import uvicorn

        from atlas_blocks.recipes.serving.app import create_app
    except ImportError as error:
        what = f"the library {error.name}, got none (pip install 'atlas-blocks[serve]')"
        raise ValueError(f"serve: expected {what}") from None
    service = Service(model, tokenizer, options)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.getaddrinfo(host, port, family)  # create_server hides the kind of its error
        listening = socket.create_server((host, port), family=family)
    except (UnicodeError, socket.gaierror):  # the first of a name that can be none
        check.fail("host", "an address of this machine", host)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            check.fail("host", "an address of this machine", host)
        raise OSError(f"port: cannot listen at {host}:{port}: {error.strerror or error}") from error
    with listening, contextlib.ExitStack() as kept:
        kept.enter_context(compile_cache(cache))
        where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        console.print(f"serving [bold cyan]{service.name}[/] at {where}", highlight=False)
        config = uvicorn.Config(
            create_app(service), log_level="error", timeout_graceful_shutdown=GRACE
        )

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                # Or it would wait for answers that may have no end.
                service.engine.stop()
                super().handle_exit(sig, frame)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                await super().shutdown(sockets)
                # Then the signal comes once more, and may end the process at once.
                kept.close()

        Server(config).run(sockets=[listening])
