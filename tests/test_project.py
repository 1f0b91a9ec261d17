"""The project itself: packaging and the one direction of imports. (What people read: test_docs.)"""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {  # folder: import name
    "atlas_blocks": "atlas_blocks",
    "kernels": "atlas_blocks.kernels",
    "compile_passes": "atlas_blocks.compile_passes",
    "recipes": "atlas_blocks.recipes",
}
FORBIDDEN = {  # folder: what it may not import
    "atlas_blocks": ["kernels", "compile_passes", "recipes"],
    "kernels": ["compile_passes", "recipes"],
    "compile_passes": ["kernels", "recipes"],
    "recipes": [],
}
# Inside of atlas_blocks: what stands on the left may import what stands in its line and below it.
LAYERS = (
    ("functional", "ops"),
    ("blocks",),
    ("omega", "kernel_attention", "attention", "newton_schulz", "documents"),
    ("graph",),
)


def run(*command: object, cwd: Path, **env: str) -> str:
    """Output of a command; the test fails with everything it printed."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def packages_in_tree() -> set[str]:
    """Import names of every folder that holds Python files."""
    names = set()
    for folder, name in SOURCES.items():
        for file in python_files(folder):
            inner = file.parent.relative_to(ROOT / folder).parts
            names.add(".".join((name, *inner)))
    return names


def imports(tree: ast.AST, at_top_only: bool = False) -> set[str]:
    """Absolute names imported anywhere in a file, or only outside functions."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            found |= imports(node, at_top_only)
    return found


def test_every_package_is_listed():
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("packages = [") : text.index("]", text.index("packages = ["))]
    listed = set(re.findall(r'"(atlas_blocks[\w.]*)"', block))
    assert listed == packages_in_tree()


def test_every_package_has_an_init():
    for folder in SOURCES:
        for file in python_files(folder):
            assert (file.parent / "__init__.py").exists(), f"{file.parent} has no __init__.py"


@pytest.mark.parametrize("folder", SOURCES)
def test_imports_point_one_way(folder):
    for file in python_files(folder):
        where = file.relative_to(ROOT).as_posix()
        tree = ast.parse(file.read_text())
        names = imports(tree)
        for other in FORBIDDEN[folder]:
            bad = [n for n in names if re.match(rf"atlas_blocks\.{other}\b", n)]
            assert not bad, f"{where} imports {bad}"
        bare = [n for n in imports(tree) if n.split(".")[0] in set(SOURCES) - {"atlas_blocks"}]
        assert not bare, f"{where} imports {bare} without atlas_blocks"


def modules_of_atlas_blocks() -> dict[str, set[str]]:
    """Every module, by name, and those of atlas_blocks that it imports, wherever in the file."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in python_files("atlas_blocks")
    }
    found = {}
    for name, file in files.items():
        used = imports(ast.parse(file.read_text()))
        # `from package import module`, or `from module import name`.
        found[name] = {n if n in files else n.rpartition(".")[0] for n in used} & set(files)
    return found


def test_no_modules_import_each_other_in_a_circle():
    graph = modules_of_atlas_blocks()
    graph.pop("atlas_blocks")  # the face of all, imported before any of them
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in graph.get(module, ()):
                walk(other, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())
    assert len(done) > 50


def test_inside_of_atlas_blocks_imports_point_down():
    """Blocks use operations, operations use the graph; files at the top use none of them."""
    rank = {room: n for n, rooms in enumerate(LAYERS) for room in rooms}
    folders = {file.parent.name for file in python_files("atlas_blocks")} - {"atlas_blocks"}
    assert folders == set(rank)
    for module, used in modules_of_atlas_blocks().items():
        _, *rest = module.split(".")
        if not rest:
            continue
        mine = rank.get(rest[0], len(LAYERS))
        for other in used:
            theirs = rank.get(other.split(".")[1] if "." in other else "", len(LAYERS))
            assert theirs >= mine, f"{module} imports {other}"


def test_a_name_stands_for_one_thing():
    """Functions and classes of atlas_blocks, but for an operation's definition and its op."""
    places: dict[str, list[str]] = {}
    for file in python_files("atlas_blocks"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                where = file.relative_to(ROOT / "atlas_blocks").as_posix()
                places.setdefault(node.name, []).append(where)
    twice = {name: found for name, found in places.items() if len(found) > 1}
    rooms = {"omega_rule": "omega", "newton_schulz": "newton_schulz"}
    rooms["kernel_attention"] = "kernel_attention"
    assert twice == {n: [f"{room}/definition.py", f"{room}/op.py"] for n, room in rooms.items()}


def test_import_is_light(tmp_path):
    """Importing the library loads neither the kernels' compiler nor the command line's parts."""
    code = (
        "import sys, atlas_blocks; "
        "print([m for m in ('triton', 'rich', 'typer', 'matplotlib') if m in sys.modules])"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "[]"


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(tmp_path):
    """Build the wheel, install it alone into a fresh environment, use it from elsewhere."""
    source = tmp_path / "source"
    for folder in SOURCES:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")

    home = tmp_path / "elsewhere"
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    # Dependencies come from this environment: a path line lends its packages, and nothing in it
    # is executed, so the editable install of this checkout stays out.
    (lib,) = (home / "venv" / "lib").glob("python3*")
    import torch

    deps = Path(torch.__file__).parents[1]
    (lib / "site-packages" / "dependencies.pth").write_text(f"{deps}\n")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)

    names = ", ".join(SOURCES.values())
    code = f"import {names}; print(atlas_blocks.__file__, atlas_blocks.recipes.__file__)"
    for path in run(python, "-c", code, cwd=home).split():
        assert Path(path).is_relative_to(home), path
    package = lib / "site-packages" / "atlas_blocks"
    assert (package / "py.typed").exists()
    assert {p.name for p in (lib / "site-packages").iterdir()} == {
        "atlas_blocks",
        "dependencies.pth",
        next((lib / "site-packages").glob("atlas_blocks-*.dist-info")).name,
    }
    table = run(home / "venv" / "bin" / "atlas-blocks", "recipes", cwd=home, COLUMNS="160")
    assert "atlas-mag-tiny" in table


@pytest.mark.slow(compile_nodes=False)
def test_slow_tests_that_would_begin_too_late_are_skipped() -> None:
    slow = "tests/test_project.py::test_wheel_works_away_from_the_checkout"
    command = (sys.executable, "-m", "pytest", "-q", "-m", "slow", "-p", "no:cacheprovider", slow)
    assert "1 skipped" in run(*command, cwd=ROOT, SLOW_TESTS_UNTIL="0")


def test_no_file_is_unpickled() -> None:
    """What somebody sends must not run: safetensors and JSON hold everything that is loaded, and a
    benchmark reads tensors alone."""
    for folder in (*SOURCES, "benchmarks", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for call in unpickling(file.read_text()):
                assert folder == "benchmarks", f"{file}: {call}"
                assert call.startswith("torch.load("), f"{file}: {call}"
                assert "weights_only=True" in call, f"{file}: {call}"


def unpickling(source: str) -> list[str]:
    """Calls, and imported names, that may make any object of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called, call = ast.unparse(node.func), ast.unparse(node)
            asked = "allow_pickle=True" in call or "weights_only=False" in call
            if asked or called in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
                found.append(call)
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle"):
            hidden = {"load", "loads", "Unpickler"} & {name.name for name in node.names}
            found += [f"from {node.module} import {name}" for name in sorted(hidden)]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "from torch import load",
        "from pickle import loads",
        "pickle.Unpickler(f).load()",
        "np.load(f, allow_pickle=True)",
        "AutoModel.from_pretrained(x, weights_only=False)",
    ],
)
def test_every_way_to_unpickle_is_seen(source: str) -> None:
    assert unpickling(source)
