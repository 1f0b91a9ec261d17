"""What serving gives: tokens/s of many answers at once beside one, and a long context read once.

    OMP_NUM_THREADS=1 python benchmarks/serving.py throughput --json FILE [RECIPE ...]
    OMP_NUM_THREADS=1 python benchmarks/serving.py session --json FILE [RECIPE] [--tokens 1000000]

Both serve a recipe as it is initialised by the command `atlas-blocks serve`, in a process of its
own. The load of the machine before and after is in the result.

throughput: streamed answers over HTTP, one at a time and --batch at once, in turn; tokens/s by the
clock, and by the CPU time of the server, where others are on the machine. An answer alone is
computed in a batch of 4 rows, as always, so that it is what it is among others.
session: random tokens read into a session by one server, and questions about it to that server and
to another, started later, that takes the session up from its file; tokens must be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from atlas_blocks.recipes import build, checkpoint
from atlas_blocks.recipes.bench.report import stamp
from atlas_blocks.recipes.counts import at_least
from atlas_blocks.recipes.files import write_json

RECIPES = ["atlas-tiny", "atlas-mag-tiny", "gated-deltanet-tiny", "omeganet-tiny"]
TICK = os.sysconf("SC_CLK_TCK")


class Server:
    """`atlas-blocks serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process, self.port = process, port

    def post(self, **fields: Any) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/v1/completions", json.dumps(fields))
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"the server answered {response.status}: {response.read().decode()}")
        return response

    def tokens(self, **fields: Any) -> list[int]:
        """Of a whole answer."""
        with self.post(return_token_ids=True, **fields) as response:
            return json.loads(response.read())["choices"][0]["token_ids"]

    def streamed(self, **fields: Any) -> int:
        """How many tokens came, one by one."""
        with self.post(stream=True, return_token_ids=True, **fields) as response:
            lines = [line for line in response if line.startswith(b"data: {")]
        return sum(len(json.loads(line[6:])["choices"][0]["token_ids"]) for line in lines)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK


@contextlib.contextmanager
def serving(*arguments: object) -> Iterator[Server]:
    command = [sys.executable, "-m", "atlas_blocks.recipes", "serve", *map(str, arguments)]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            found = re.search(r":(\d+)\s*$", told)
            if found is None:
                raise SystemExit(f"no server: {told}")
            yield Server(process, int(found[1]))
        finally:
            process.terminate()


def saved(recipe: str, folder: Path) -> Path:
    """A checkpoint of the recipe as it is initialised."""
    torch.manual_seed(0)
    path = folder / f"{recipe}.safetensors"
    checkpoint.save(path, build(recipe, vocab_size=256))
    return path


def random_tokens(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(count)]


# --- throughput -------------------------------------------------------------------------------


def throughput(a: argparse.Namespace, record: dict[str, Any], folder: Path) -> None:
    for recipe in a.recipes or RECIPES:
        options = ("--max-batch", a.batch, "--prefix-cache", 0)
        with serving(saved(recipe, folder), *options) as server:
            record["rows"].append({"recipe": recipe, **measured(server, a)})
        write_json(a.json, record)
        row = record["rows"][-1]
        print(
            f"{recipe}: {row['one']['tokens_per_s']:.0f} tokens/s alone, "
            f"{row['many']['tokens_per_s']:.0f} with {a.batch} at once: {row['ratio']:.1f} times "
            f"(by CPU time {row['ratio_of_cpu']:.1f})",
            flush=True,
        )


def measured(server: Server, a: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[tuple[float, float]]] = {"one": [], "many": []}

    def ask(number: int) -> int:
        prompt = random_tokens(a.prompt, number)
        return server.streamed(prompt=prompt, max_tokens=a.tokens, seed=number)

    with ThreadPoolExecutor(a.batch) as pool:
        list(pool.map(ask, range(a.batch)))  # warms up
        for number in range(a.rounds):
            for kind, count in (("one", 1), ("many", a.batch)):
                began, cpu = time.perf_counter(), server.cpu_seconds()
                tokens = sum(pool.map(ask, range(number, number + count)))
                seconds, used = time.perf_counter() - began, server.cpu_seconds() - cpu
                found[kind].append((tokens / seconds, tokens / used))
    row: dict[str, Any] = {}
    for kind, rates in found.items():
        clock, cpu = zip(*rates, strict=True)
        row[kind] = {
            "tokens_per_s": statistics.median(clock),
            "tokens_per_cpu_s": statistics.median(cpu),
            "rounds": clock,
        }
    for name, rate in (("ratio", "tokens_per_s"), ("ratio_of_cpu", "tokens_per_cpu_s")):
        row[name] = row["many"][rate] / row["one"][rate]
    return row


# --- session ----------------------------------------------------------------------------------


def session(a: argparse.Namespace, record: dict[str, Any], folder: Path) -> None:
    recipe = (a.recipes or RECIPES)[0]
    arguments = (saved(recipe, folder), "--sessions", folder, "--piece", a.piece)
    asked = {"prompt": random_tokens(5, 1), "session": "book", "save_session": False}
    questions = [
        {**asked, "max_tokens": 100, "temperature": 0},
        {**asked, "max_tokens": 100, "temperature": 1.0, "seed": 7},
    ]
    row: dict[str, Any] = {"recipe": recipe, "tokens": a.tokens}
    with serving(*arguments) as server:
        began, cpu = time.perf_counter(), server.cpu_seconds()
        for start in range(0, a.tokens, a.part):
            part = random_tokens(min(a.part, a.tokens - start), start)
            server.tokens(prompt=part, session="book", max_tokens=0)
            print(f"{start + len(part):,} tokens read", flush=True)
        row["read_seconds"] = time.perf_counter() - began
        row["read_cpu_seconds"] = server.cpu_seconds() - cpu
        expected = [server.tokens(**question) for question in questions]
    row["file_bytes"] = (folder / "book.safetensors").stat().st_size
    with serving(*arguments) as server:
        began = time.perf_counter()
        server.tokens(**questions[0] | {"max_tokens": 1})
        row["taken_up_seconds"] = time.perf_counter() - began
        row["same_tokens"] = [server.tokens(**question) for question in questions] == expected
    record["rows"].append(row)
    print(json.dumps(row, indent=2))
    if not row["same_tokens"]:
        raise SystemExit("the other process gave other tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    runs = {"throughput": throughput, "session": session}
    for kind in runs:
        p = kinds.add_parser(kind)
        p.add_argument("recipes", nargs="*")
        p.add_argument("--json", type=Path, required=True)
        if kind == "throughput":
            p.add_argument("--batch", type=at_least(1), default=16)
            p.add_argument("--prompt", type=at_least(1), default=32, help="tokens of each")
            p.add_argument("--tokens", type=at_least(1), default=128, help="of each answer")
            p.add_argument("--rounds", type=at_least(1), default=5)
        else:
            p.add_argument("--tokens", type=at_least(1), default=1_000_000)
            p.add_argument("--part", type=at_least(1), default=100_000, help="tokens of a request")
            p.add_argument("--piece", type=at_least(1), default=2048)
    a = parser.parse_args()
    what = {name: value for name, value in vars(a).items() if name not in ("kind", "json")}
    record = {
        "benchmark": f"serving {a.kind}",
        "what": what,
        **stamp(torch.device("cpu")),
        "load_before": os.getloadavg(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        runs[a.kind](a, record, Path(folder))
    record |= {"load_after": os.getloadavg(), "complete": True}
    write_json(a.json, record)


if __name__ == "__main__":
    main()
