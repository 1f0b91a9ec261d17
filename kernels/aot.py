"""Compile every kernel that ships for GPUs that are not here, and see what it needs of them.

    python -m atlas_blocks.kernels.aot [--quick] [--chip sm_90] [--memory mlp]

Prints registers, spilled bytes and shared memory, and exits with 1 where a kernel spills, needs
more shared memory than the chip has, or does not compile. The kernels are found by running the
provider's own host code on tensors without storage, so what is checked is what runs.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atlas_blocks.kernels import decode, newton_schulz, omega_rule
from atlas_blocks.kernels.tiles import INTERPRETED, Launch, recorded
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.memories import MEMORIES, weight_shapes
from atlas_blocks.omega.op import flatten
from atlas_blocks.omega.rule import Rule
from atlas_blocks.omega.state import OmegaState, initial_state

# Largest shared memory of one program (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Configuration(NamedTuple):
    """What the compilation of the recurrence depends on."""

    dtype: torch.dtype
    key_width: int
    value_width: int
    window: int
    momentum: bool
    objective: str = "l2"
    errors: str = "online"
    decay_to: str = "zero"
    begun: bool = True  # with a state from an earlier call
    chunk: int = 64
    memory: str = "matrix"
    step: bool = False  # a decode step instead of a forward and a backward

    def __str__(self) -> str:
        return (
            f"{self.memory} {str(self.dtype).removeprefix('torch.')} "
            f"D={self.key_width} V={self.value_width} c={self.window} b={self.chunk}"
            f" {self.objective} {self.errors} {self.decay_to}"
            f"{' momentum' if self.momentum else ''}{' state' if self.begun else ''}"
            f"{' step' if self.step else ''}"
        )


class Orthogonalisation(NamedTuple):
    """What the compilation of Newton-Schulz depends on."""

    dtype: torch.dtype
    rows: int
    columns: int
    steps: int = 5

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"newton_schulz {kind} [{self.rows}, {self.columns}] {self.steps} steps"


DEEP = ("mlp", "gated_mlp")
QUICK: list[Configuration | Orthogonalisation] = [
    Configuration(torch.bfloat16, 64, 64, 16, True),
    Configuration(torch.bfloat16, 64, 64, 1, True, step=True),
]
QUICK_DEEP = [
    Configuration(torch.bfloat16, 64, 64, 16, True, decay_to="initial", memory=memory)
    for memory in DEEP
]
QUICK += [Orthogonalisation(torch.float32, 64, n) for n in (64, 256)]


def configurations() -> Iterator[Configuration | Orthogonalisation]:
    """Everything that ships: widths stand for the tiles they lead to, 2145 for a polynomial map."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    widths = ((16, 16), (64, 64), (128, 128), (256, 256), (2145, 64))
    for dtype, (d, v), momentum in itertools.product(dtypes, widths, (True, False)):
        yield Configuration(dtype, d, v, 16, momentum)
        yield Configuration(dtype, d, v, 1, momentum, step=True)
        # An input's dtype changes how it is loaded, nothing else.
        if dtype == torch.bfloat16:
            yield Configuration(dtype, d, v, 1, momentum)
            yield Configuration(dtype, d, v, 64, momentum)
            yield Configuration(dtype, d, v, 16, momentum, begun=False)
            yield Configuration(dtype, d, v, 16, momentum, errors="chunk")
            yield Configuration(dtype, d, v, 16, momentum, objective="dot")
            yield Configuration(dtype, d, v, 16, momentum, objective="dot", step=True)
            yield Configuration(dtype, d, v, 1, momentum, decay_to="initial", step=True)
    dtype = torch.bfloat16
    for memory, (d, v), momentum in itertools.product(DEEP, widths, (True, False)):
        if v <= omega_rule.LARGEST_DEEP_VALUE:
            yield Configuration(dtype, d, v, 16, momentum, decay_to="initial", memory=memory)
    for memory, decay_to in itertools.product(DEEP, ("zero", "initial")):
        kinds: dict[str, Any] = {"decay_to": decay_to, "memory": memory}
        yield Configuration(dtype, 64, 64, 1, True, **kinds)
        yield Configuration(dtype, 64, 64, 16, True, **kinds)
        yield Configuration(dtype, 64, 64, 64, True, **kinds)
        yield Configuration(dtype, 64, 64, 16, True, begun=False, **kinds)
        yield Configuration(dtype, 64, 64, 16, True, errors="chunk", **kinds)
        yield Configuration(dtype, 64, 64, 16, True, objective="dot", **kinds)
    sizes = [(d, d) for d in (16, 32, 64, 128)]
    sizes += [(16, 64), (48, 48), (64, 128), (64, 256), (256, 64), (64, 2145)]
    sizes += [(128, 512), (512, 128), (100, 2145)]
    for rows, columns in sizes:
        yield Orthogonalisation(torch.float32, rows, columns)
    for dtype in (torch.bfloat16, torch.float16):
        for columns in (64, 256):
            yield Orthogonalisation(dtype, 64, columns)


def launches(c: Configuration | Orthogonalisation, chip: str) -> list[Launch]:
    """The kernels of a forward and a backward, or of a decode step."""
    number = int(chip.removeprefix("sm_"))
    with recorded(number) as found:
        if isinstance(c, Orthogonalisation):
            if newton_schulz.refused_shape(c.rows, c.columns) is None:
                s = torch.empty(4096, c.rows, c.columns, dtype=c.dtype, device="meta")
                newton_schulz.PROVIDER.forward(s, c.steps, "jordan")
                newton_schulz.PROVIDER.backward(s, s, c.steps, "jordan")
        elif c.step:
            _decode_step(c)
        else:
            _forward_and_backward(c)
    return found


def _forward_and_backward(c: Configuration) -> None:
    a = _arguments(c, 8192)
    tensors, settings = flatten(a)
    y, *rest = omega_rule.PROVIDER.forward(tensors, settings, True)
    groups = OmegaState.groups(a.rule, c.momentum)
    count = MEMORIES[c.memory].weights * sum(groups.values()) + len(OmegaState.REST)
    grads = [y, *rest[: count - 1]]
    omega_rule.PROVIDER.backward(grads, tensors, rest[count:], settings)


def _decode_step(c: Configuration) -> None:
    a = _arguments(c, 1)
    assert a.state is not None
    *streams, first = flatten(a._replace(state=None))[0]
    settings = flatten(a)[1]
    streams = [t.squeeze(1) for t in streams]
    # M_0 is among a step's tensors only where decay leads there.
    streams += [first] if c.decay_to == "initial" else []
    decode.PROVIDER.forward(streams, a.state.tensors(), settings)


def _arguments(c: Configuration, length: int) -> Arguments:
    batch, heads = 4, 16

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    tokens = (batch, length, heads)
    gate = new(*tokens)
    q, v = new(*tokens, c.key_width, dtype=c.dtype), new(*tokens, c.value_width, dtype=c.dtype)
    shapes = weight_shapes(c.memory, c.key_width, c.value_width, 4 * c.value_width)
    weights = [new(heads, *shape) for shape in shapes]
    rule = Rule(c.memory, c.objective, "gd", 5, 1, c.chunk, c.errors, c.window, c.decay_to)
    theta = gate if c.momentum else None
    state = initial_state(q, v, weights, rule, c.momentum) if c.begun else None
    gamma = new(*tokens, c.window)
    return Arguments(q, q, v, gate, gate, theta, gamma, weights, None, rule, state)


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs: registers a thread, spilled and shared bytes."""

    registers: int
    spilled: int
    shared: int

    def fault(self, chip: str) -> str | None:
        """Why this does not ship, or None."""
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_MEMORY[chip]:
            return f"needs {self.shared} bytes of shared memory, {chip} has {SHARED_MEMORY[chip]}"
        return None


def compile_for(one: Launch, chip: str) -> Usage:
    """Compile a recorded launch for "sm_80", "sm_90" or "sm_100"."""
    names = one.kernel.arg_names
    options = {k: v for k, v in one.settings.items() if k in ("num_warps", "num_stages", "maxnreg")}
    values = dict(zip(names, one.arguments, strict=False))
    values |= {k: v for k, v in one.settings.items() if k not in options}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float) and not one.kernel.params[i].is_constexpr:
            signature[name] = "fp32"
        elif isinstance(value, int) and one.kernel.params[i].do_not_specialize:
            signature[name] = "i32"
        elif value is None or one.kernel.params[i].is_constexpr or value == 1:
            # The runtime, too, compiles a 1 in.
            signature[name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(one.kernel, signature, constants, aligned)
    target = GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        report = _cuobjdump("-res-usage", cubin)
        found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
        stack = found["STACK"] + found["LOCAL"]
        # A frame that no instruction stores to or loads from is not a spill.
        if stack and not re.search(r"\b(STL|LDL)\b", _cuobjdump("-sass", cubin)):
            stack = 0
    return Usage(found["REG"], stack, compiled.metadata.shared)


def _cuobjdump(what: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


def _check(work: tuple[Configuration | Orthogonalisation, int, str]) -> tuple[str, Usage | str]:
    """Compile one launch of a configuration: the kernel's name and what it needs, or the error."""
    c, index, chip = work
    one = launches(c, chip)[index]
    name = f"{one.kernel.__module__.rpartition('.')[2]}.{one.kernel.__name__.strip('_')}"
    try:
        return name, compile_for(one, chip)
    except Exception as error:
        return name, f"{type(error).__name__}: {error}"


def check(
    chips: list[str], found: list[Configuration | Orthogonalisation], console: Console
) -> int:
    """Compile and print; the number of faults."""
    work, seen = [], set()
    for c, chip in itertools.product(found, chips):
        for index, one in enumerate(launches(c, chip)):
            shapes = tuple(
                t.dtype if isinstance(t, Tensor) else None if p.do_not_specialize else t
                for t, p in zip(one.arguments, one.kernel.params, strict=False)
            )
            key = (chip, one.kernel.__name__, shapes, tuple(map(str, one.settings.items())))
            if key not in seen:
                seen.add(key)
                work.append((c, index, chip))
    table = Table("configuration", "kernel", "chip", "registers", "spilled", "shared", "fault")
    faults = 0
    with ProcessPoolExecutor() as pool:
        for (c, _, chip), (name, usage) in zip(work, pool.map(_check, work), strict=True):
            fault = usage if isinstance(usage, str) else usage.fault(chip)
            numbers = ("", "", "")
            if isinstance(usage, Usage):
                numbers = (str(usage.registers), str(usage.spilled), str(usage.shared))
            if fault:
                faults += 1
                console.print(f"{c}: {name} on {chip} {fault}", style="red", soft_wrap=True)
            table.add_row(str(c), name, chip, *numbers, fault or "")
    console.print(table)
    console.print(f"{len(work)} compilations, {faults} faults")
    return faults


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m atlas_blocks.kernels.aot", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the default layer's alone")
    parser.add_argument("--chip", choices=list(SHARED_MEMORY), action="append")
    parser.add_argument("--memory", choices=list(MEMORIES), action="append")
    given = parser.parse_args(arguments)
    if INTERPRETED:
        print(
            "aot: TRITON_INTERPRET is set; nothing compiles under the interpreter", file=sys.stderr
        )
        return 2
    found = QUICK if given.quick else list(configurations())
    if given.memory:
        # A deep memory has many kernels: a quick check has them only when asked.
        found = [*QUICK, *QUICK_DEEP] if given.quick else found
        found = [c for c in found if getattr(c, "memory", None) in given.memory]
    width = None if sys.stdout.isatty() else 160
    return 1 if check(given.chip or list(SHARED_MEMORY), found, Console(width=width)) else 0


if __name__ == "__main__":
    sys.exit(main())
