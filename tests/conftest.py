"""One thread a process (tests are many small operations), the same examples on every run."""

import os
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# tests/helpers.py is imported as `helpers`.
sys.path.insert(0, str(Path(__file__).parent))

# Without a GPU Triton kernels run under its interpreter, which must be known before any is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Its own import warns, and warnings will be errors.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch._inductor.compile_fx

    from atlas_blocks.graph import compiled_steps

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


# Seconds since 1970: slow tests that would begin later are skipped, and so named. A machine of
# continuous integration may be half as fast as another, and has the same time.
UNTIL = float(os.environ.get("SLOW_TESTS_UNTIL", "inf"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > UNTIL and item.get_closest_marker("slow"):
        pytest.skip("SLOW_TESTS_UNTIL has passed")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quick_compiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes compile nothing for themselves but in slow tests and those that ask for it."""
    slow = request.node.get_closest_marker("slow")
    if slow is None or not slow.kwargs.get("compile_nodes", True):
        monkeypatch.setattr(compiled_steps, "BACKEND", None)


@pytest.fixture
def nodes_compile(_quick_compiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do, without Inductor."""
    monkeypatch.setattr(compiled_steps, "BACKEND", "aot_eager")
    torch._dynamo.reset()
