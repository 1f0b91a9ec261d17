"""A server in a thread or in a process of its own, and a plain HTTP client."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from atlas_blocks.recipes.serving.app import create_app
from atlas_blocks.recipes.serving.service import Service


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    @contextlib.contextmanager
    def sending(
        self, method: str, path: str, body: Any = None
    ) -> Iterator[http.client.HTTPConnection]:
        """The request is on its way; leaving closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, raw, {"Content-Type": "application/json"})
            yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def asking(
        self, method: str, path: str, body: Any = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer, whose body may still be on its way."""
        with self.sending(method, path, body) as connection:
            yield connection.getresponse()

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The status and the JSON of the answer."""
        with self.asking(method, path, body) as response:
            return response.status, json.loads(response.read())

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The one choice of a completion, with its token_ids."""
        status, body = self("POST", "/v1/completions", {"return_token_ids": True, **fields})
        assert status == 200, body
        return body["choices"][0]

    def stream(self, path: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Its events but for the last, which says that it is done."""
        with self.asking("POST", path, {"stream": True, **fields}) as response:
            assert response.status == 200
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        raise AssertionError("the stream ended early")

    def idle(self) -> dict[str, Any]:
        """/health, once nothing is going on."""
        while True:
            found = self("GET", "/health")[1]
            if found["running"] == found["waiting"] == 0:
                return found
            time.sleep(0.02)


@contextlib.contextmanager
def serving(service: Service) -> Iterator[Client]:
    """In a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Client(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def serving_process(*arguments: object) -> Iterator[tuple[Client, subprocess.Popen]]:
    """By the command."""
    command = [sys.executable, "-m", "atlas_blocks.recipes", "serve", *map(str, arguments)]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        # Ignored where the tests run in the background of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", told)
        assert found, told
        yield Client(int(found[1])), process
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
