"""What a person reads, the README and docs/: examples run, and what they name is there."""

import ast
import functools
import importlib.util
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "atlas_blocks",
    "kernels",
    "compile_passes",
    "recipes",
    "benchmarks",
    "examples",
    "tests",
    "docs",
)
FENCE = re.compile(r"^```(\w*).*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
# An example of minutes has this on the line before it, which no reader sees.
SLOW = "<!-- slow -->\n"
# Words of torch, transformers and the C library that our code does not use.
ELSEWHERE = {
    "AOTI_RUNTIME_CHECK_INPUTS",
    "MALLOC_MMAP_THRESHOLD_",
    "_init_weights",
    "batch_size",
    "cache_implementation",
    "from_pretrained",
    "post_init",
    "save_pretrained",
    "target_modules",
    "use_cache",
}


class Page(NamedTuple):
    name: str
    text: str

    @property
    def prose(self) -> str:
        """Without its fenced blocks."""
        return FENCE.sub("", self.text)

    @property
    def spans(self) -> list[str]:
        """What stands in backticks."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @property
    def shell(self) -> list[str]:
        """Indented lines, without comments, and what stands in backticks."""
        lines = re.findall(r"^ {4}(\S.*)", self.prose, re.MULTILINE)
        return [line.partition(" #")[0].strip() for line in lines] + self.spans


FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {f.relative_to(ROOT).as_posix(): f.read_text() for f in FILES}
EVERY_PAGE = pytest.mark.parametrize("page", [Page(*item) for item in PAGES.items()], ids=PAGES)
README = Page("README.md", PAGES["README.md"])


def examples() -> Iterator[Any]:
    for name, text in PAGES.items():
        fences = [m for m in FENCE.finditer(text) if m[1] == "python"]
        for number, found in enumerate(fences):
            slow = text[: found.start()].endswith(SLOW)
            # The compiler warns of its own parts.
            marks = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")] if slow else []
            yield pytest.param(found[2], id=f"{name}-{number}", marks=marks)


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """What an example adds to the library's tables is gone afterwards."""
    from atlas_blocks import Config, State
    from atlas_blocks.compile_passes import PASSES
    from atlas_blocks.graph import providers
    from atlas_blocks.omega.feature_maps import FEATURE_MAPS
    from atlas_blocks.omega.memories import MEMORIES
    from atlas_blocks.omega.objectives import OBJECTIVES
    from atlas_blocks.omega.updates import UPDATES
    from atlas_blocks.recipes import registry

    # Of the ops' providers those that the examples add to: what the library registers when it is
    # first needed would not come again.
    tables: list[dict[Any, Any]] = [
        Config._classes,
        State._classes,
        FEATURE_MAPS,
        MEMORIES,
        OBJECTIVES,
        UPDATES,
        PASSES,
        registry.ARCHITECTURES,
    ]
    iterations = providers._PROVIDERS["newton_schulz"]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    providers._PROVIDERS["newton_schulz"] = iterations
    registry._recipe.cache_clear()


# Inductor's first import in a process warns of its own parts.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.usefixtures("as_it_was")
@pytest.mark.parametrize("example", list(examples()))
def test_examples_run(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "example.py"
    file.write_text(example)
    if request.node.get_closest_marker("slow"):
        torch._dynamo.reset()
    runpy.run_path(str(file), run_name="example")


# --- names --------------------------------------------------------------------------------------


@EVERY_PAGE
def test_names_of_the_library_are_there(page: Page) -> None:
    for span in page.spans:
        name = span.partition("(")[0]
        if re.fullmatch(r"atlas_blocks(\.\w+)+", name):
            pkgutil.resolve_name(name)


@functools.cache
def identifiers() -> set[str]:
    """All that the sources define, take, use or call by a string."""
    found = set(re.findall(r"\w+", (ROOT / "Makefile").read_text()))
    for folder in ("atlas_blocks", "kernels", "compile_passes", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                for field in ("name", "id", "arg", "attr", "value"):
                    name = getattr(node, field, None)
                    found |= {name} if isinstance(name, str) else set()
    return found


@EVERY_PAGE
def test_words_of_code_are_words_of_the_code(page: Page) -> None:
    """Such as `chunk_size` and `AtlasMemoryConfig`."""
    for span in page.spans:
        name = re.sub(r"(=.*|\(.*\))$", "", span)
        if re.fullmatch(r"[A-Za-z]\w*", name) and re.search(r"_|[a-z][A-Z]", name):
            assert name in identifiers() | ELSEWHERE, f"{page.name}: `{span}`"


@EVERY_PAGE
def test_files_are_there(page: Page) -> None:
    words = [word for line in page.shell for word in line.split()]
    for word in words:
        if word.partition("/")[0] in FOLDERS and re.fullmatch(r"[\w./-]+/[\w./-]*", word):
            assert (ROOT / word).exists() or word.startswith("benchmarks/results/decode_NAME"), word


def test_folders_are_those_of_the_tree() -> None:
    table = re.findall(r"^\| `(\w+)/` \|", PAGES["docs/extending.md"], re.MULTILINE)
    tops = {p.relative_to(ROOT).parts[0] for p in ROOT.rglob("*.py") if p.parent != ROOT}
    hidden = {"build", "dist", "demo_output", "shared"}
    assert set(table) == {t for t in tops if t not in hidden and not t.startswith(".")} | {"docs"}


def test_recipes_are_those_of_the_code() -> None:
    from atlas_blocks.recipes.registry import ARCHITECTURES, SIZES

    page = PAGES["docs/recipes.md"]
    text = page[page.index("## The architectures") : page.index("## Sizes")]
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == set(ARCHITECTURES)
    assert all(f"`{size}`" in text for size in SIZES)
    assert f"{len(ARCHITECTURES)} architectures" in README.text


@EVERY_PAGE
def test_recipes_that_are_named_are_there(page: Page) -> None:
    from atlas_blocks.recipes.registry import ARCHITECTURES

    for name in re.findall(r"recipe `([\w-]+)`", page.prose):
        assert name in ARCHITECTURES, name


def test_sections_that_the_code_cites_are_there() -> None:
    headings = set(re.findall(r"^## (\d+b?)\.", PAGES["docs/specification.md"], re.MULTILINE))
    cited: set[str] = set()
    for folder in ("atlas_blocks", "kernels", "compile_passes", "recipes", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            for numbers in re.findall(
                r"specification (?:sections? )?((?:\d+b?(?:, | and )?)+)", text
            ):
                cited |= set(re.findall(r"\d+b?", numbers))
    assert cited
    assert cited <= headings


# --- commands -----------------------------------------------------------------------------------


def test_make_has_what_is_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for name, text in PAGES.items() for line in Page(name, text).shell]
    named = {words[1] for line in lines if (words := line.split())[:1] == ["make"]}
    assert {"demo", "test", "docs"} <= named <= targets
    assert {"make demo", "make test"} <= {line.strip() for line in README.shell}


@EVERY_PAGE
def test_the_command_line_has_what_is_named(page: Page) -> None:
    import typer

    from atlas_blocks.recipes.command_line.main import app

    top: Any = typer.main.get_command(app)
    for line in page.shell:
        if line.startswith("torchrun "):
            # Several processes at once, of the same command line.
            line = "atlas-blocks" + line.partition(" -m atlas_blocks.recipes")[2]
        if not line.startswith("atlas-blocks ") or line == "atlas-blocks --help":
            continue
        command, words = top, shlex.split(line)[1:]
        while hasattr(command, "commands"):
            # `bench NAME` is `bench model NAME`.
            nested = command is not top and words[0] not in command.commands
            command = command.commands["model" if nested else words.pop(0)]
        options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        assert {w.partition("=")[0] for w in words if w.startswith("--")} <= options, line


def test_extras_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    paragraph = README.text.partition("Extras:")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == extras


# --- form ---------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.text.splitlines()) <= 130


def test_results_of_benchmarks_say_where_they_come_from() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        name = re.sub(r"^decode_.*", "decode_NAME.json", file.name)
        assert f"`{name}`" in text, name


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README.prose)
    inside = [link for link in links if not link.startswith("https://")]
    assert len(inside) > 5
    for link in inside:
        assert (ROOT / link).is_file(), link


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning_and_a_network(tmp_path: Path) -> None:
    """Links and anchors between pages are checked as it is built; pages load nothing from afar."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = {f.stem for f in (tmp_path / "site").glob("*.html")}
    assert pages == {Path(name).stem for name in PAGES if name != "README.md"} | {"404"}
    for file in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\" >]+)", file.read_text()
        )
        assert not loaded, f"{file.name} loads {loaded}"
