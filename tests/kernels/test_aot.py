"""The offline check: kernels compile for chips that are not here, and none spills."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from atlas_blocks.kernels.aot import SHARED_MEMORY, Usage


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "atlas_blocks.kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_no_kernel_spills_on_hopper() -> None:
    done = check("--quick", "--chip", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout
    for kernel in ("matrix.walk_forward", "online.invert", "matrix_backward.gradients", "decode."):
        assert kernel in done.stdout


@pytest.mark.slow
def test_no_kernel_spills_on_any_chip() -> None:
    done = check("--quick")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_no_kernel_of_a_deep_memory_spills_on_any_chip() -> None:
    done = check("--quick", "--memory", "gated_mlp")
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in ("keys.keys_forward", "online.online_forward", "writes_backward.outer_backward"):
        assert kernel in done.stdout


def test_a_fault_is_a_spill_or_too_much_shared_memory() -> None:
    for chip, shared in SHARED_MEMORY.items():
        assert Usage(255, 0, shared).fault(chip) is None
        assert "spills 8 bytes" in str(Usage(32, 8, 0).fault(chip))
        assert "shared memory" in str(Usage(32, 0, shared + 1).fault(chip))


def test_the_interpreter_compiles_nothing_and_says_so() -> None:
    done = check("--quick", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "TRITON_INTERPRET" in done.stderr
