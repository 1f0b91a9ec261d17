"""The command line: what it prints, and one line with exit code 2 for bad input."""

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from atlas_blocks.recipes import build, checkpoint, demo, display, names, training
from atlas_blocks.recipes.command_line import main as cli
from atlas_blocks.recipes.command_line import using
from atlas_blocks.recipes.timing import StepTiming


def test_recipes_lists_every_name(run):
    code, out, _ = run("recipes")
    assert code == 0
    assert all(name in out for name in names())
    assert "12 x MAG(mlp, Muon, c=16 | window 512)" in out


def test_recipes_of_one_kind(run):
    code, out, _ = run("recipes", "titans-mag")
    assert code == 0
    assert "titans-mag-1.3b" in out
    assert "atlas-mag" not in out


def test_show_prints_the_tree(run):
    code, out, _ = run("show", "atlas-mag-tiny")
    assert code == 0
    assert "MemoryAsGate" in out
    assert "blocks (2 alike)" in out


FAULTS = """
import resource, torch
from atlas_blocks.recipes.command_line.main import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        x = [torch.ones(500_000) for _ in range(20)]  # 2 MB each
        del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc")
@pytest.mark.slow(compile_nodes=False)
def test_commands_do_not_give_freed_memory_back_at_every_tensor():
    def faults(**env):
        command = [sys.executable, "-c", FAULTS]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | env
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=kept)
        return int(done.stdout)

    pages = 20 * 20 * 500_000 * 4 // 4096
    assert faults() < pages / 20
    # What the user has set stays.
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > pages / 4


def test_what_torch_warns_of_its_own_parts_is_not_shown(run, monkeypatch):
    def noisy(part):
        warnings.warn_explicit("old", FutureWarning, "ir.py", 1, module="torch._inductor.ir")
        warnings.warn_explicit("old", FutureWarning, "copyreg.py", 1, module="copyreg")
        logging.getLogger("torch._inductor.ir").warning("no c-shim")
        return part

    monkeypatch.setattr(display, "recipe_table", noisy)
    assert run("recipes", "anything") == (0, "anything\n", "")
    assert logging.root.manager.disable < logging.WARNING
    # Ours are.
    ours = ("ours", UserWarning, "a.py", 1, "atlas_blocks.ops")
    monkeypatch.setattr(display, "recipe_table", lambda part: warnings.warn_explicit(*ours))
    with pytest.raises(UserWarning, match="ours"):
        cli.main(["recipes", "anything"])


def test_generate_shows_every_byte_when_it_is_there(monkeypatch, tmp_path):
    """And Ctrl-C leaves what there is."""
    checkpoint.save(tmp_path / "model", build("linear-attention-tiny", depth=1))
    shown = []
    monkeypatch.setattr("builtins.print", lambda *text, **how: shown.append("".join(text)))

    def stream(model, rows, *, stopped, **options):
        for token in b"a\xc3\xa9\n":
            assert not any([stopped(row, token) for row in range(len(rows))])
            yield torch.tensor([token] * len(rows))
            seen.append("".join(shown))
        raise KeyboardInterrupt

    monkeypatch.setattr(using, "stream", stream)
    for batch, expected in (("1", ["> a", "> a", "> aé", "> aé\n"]), ("2", [""] * 4)):
        shown, seen = [], []
        with pytest.raises(SystemExit) as left:
            cli.main(["generate", str(tmp_path / "model"), "--prompt", "> ", "--batch", batch])
        assert left.value.code == 130
        assert seen == expected
        assert "".join(shown).count("> aé") == int(batch)


def test_generate_wants_a_model_of_bytes(run, tmp_path):
    checkpoint.save(tmp_path / "model", build("linear-attention-tiny", depth=1, vocab_size=300))
    code, out, err = run("generate", tmp_path / "model")
    assert (code, out) == (2, "")
    assert "expected a tokenizer, or a model of bytes, got a vocabulary of 300" in err


def test_train_resume_generate(run, tmp_path):
    saved, small = tmp_path / "run", ("--steps", 3, "--batch", 2, "--length", 16)
    code, out, _ = run("train", "transformer-tiny", "--out", saved, *small, "--no-compile")
    assert code == 0
    assert "bits per byte" in out
    assert run("train", "transformer-tiny", "--out", saved)[0] == 2  # would overwrite
    assert run("train", "atlas-tiny", "--out", saved, "--resume")[0] == 2  # another recipe
    assert run("train", "transformer-tiny", "--out", saved, "--resume")[0] == 0
    code, out, _ = run("generate", saved, "--prompt", "abc", "--tokens", 5, "--batch", 2)
    assert code == 0
    assert out.count("abc") == 2


def test_demo_writes_its_results(run, tmp_path):
    code, out, _ = run("demo", "--steps", 2, "--out", tmp_path / "demo", "--no-compiled")
    assert code == 0
    assert "bits per byte" in out
    figures = json.loads((tmp_path / "demo" / "figures.json").read_text())
    assert figures["versions"]["torch"] == torch.__version__
    assert set(figures["models"]) == {"atlas-mag-tiny", "transformer-tiny"}
    assert figures["training_step"] == {}
    assert (tmp_path / "demo" / "loss.png").stat().st_size > 1000
    assert run("generate", tmp_path / "demo" / "atlas-mag-tiny.safetensors", "--tokens", 2)[0] == 0


@pytest.mark.slow(compile_nodes=False)
def test_where_compiling_fails_the_demo_says_so_and_trains_eager(run, tmp_path, monkeypatch):
    failed = StepTiming(12.0, problem="InvalidCxxCompiler: none")
    monkeypatch.setattr(demo, "time_step", lambda *_, **__: failed)
    code, out, _ = run("demo", "--steps", 1, "--out", tmp_path)
    assert code == 0
    assert "compiling failed: InvalidCxxCompiler: none" in " ".join(out.split())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert not any(model["compiled"] for model in figures["models"].values())


@pytest.mark.slow
def test_the_demo_trains_compiled_as_it_would_eager(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "HYBRID", "linear-attention-tiny")
    monkeypatch.setitem(demo.COLOURS, "linear-attention-tiny", "tab:blue")
    found = {}
    for how in ((), ("--no-compiled",)):
        out = tmp_path / str(len(how))
        assert run("demo", "--steps", 3, "--out", out, *how)[0] == 0
        found[how] = json.loads((out / "figures.json").read_text())
    compiled, eager = found.values()
    assert all(timing["ratio"] for timing in compiled["training_step"].values())
    for name, model in compiled["models"].items():
        assert model["compiled"]
        assert model["losses"] == pytest.approx(eager["models"][name]["losses"], rel=1e-3)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("demo", "--no-compiled", "--out"), "atlas-mag-tiny.safetensors"),
        (("train", "atlas-mag-tiny", "--batch", 1, "--no-compile", "--out"), "model"),
    ],
)
def test_ctrl_c_leaves_a_usable_checkpoint(run, tmp_path, monkeypatch, command, file):
    update = training.update

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return update(*arguments, **options)

    monkeypatch.setattr(training, "update", interrupted)
    out = tmp_path if command[0] == "demo" else tmp_path / file
    code, printed, _ = run(*command, out, "--steps", 50)
    assert code == 130
    assert "interrupted" in printed
    assert run("generate", tmp_path / file, "--tokens", 2)[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "atlas-huge"),
        ("show",),
        ("shwo", "atlas-tiny"),
        ("recipes", "--unknown"),
        ("recipes", "giant"),
        ("train", "atlas-tiny"),
        ("train", "atlas-tiny", "--out", "x", "--steps", "many"),
        ("train", "atlas-tiny", "--out", "x", "--steps", "-1"),
        ("train", "atlas-tiny", "--out", "x", "--data", "/no/such/place"),
        ("train", "atlas-tiny", "--out", "x", "--device", "abacus"),
        ("train", "atlas-tiny", "--out", "x", "--resume"),
        ("generate", "/no/such/file"),
        ("generate", "/no/such/file", "--batch", "0"),
        ("demo", "--steps", "0"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("atlas-blocks: ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
def test_explain_prints_the_report(run):
    code, out, _ = run("explain", "linear-attention-tiny", "--lengths", "40", "--batch", 1)
    assert code == 0
    for words in ("one graph a call, no breaks", "omega_rule", "inline", "lower_ops", "GFLOP"):
        assert words in out


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
def test_explain_takes_the_file_of_a_hybrid(run, tmp_path):
    code, shown, _ = run("show", "transformer+sliding-window-tiny", "--json")
    assert code == 0
    file = tmp_path / "mine.json"
    file.write_text(shown)
    code, out, _ = run("explain", file, "--lengths", "40", "--batch", 1)
    assert code == 0
    for words in ("one graph a call, no breaks", "attention", "GFLOP"):
        assert words in out


@pytest.mark.filterwarnings("ignore")
def test_explain_names_what_is_wrong(run):
    for arguments, words in (
        (("no-such-recipe",), "recipe: 'no-such-recipe' is unknown"),
        (("atlas-tiny", "--lengths", "12,x"), "lengths: expected integers such as"),
        (("atlas-tiny", "--lengths", "0"), "lengths: expected integers >= 1, got 0"),
        (("atlas-tiny", "--batch", 0), "batch: expected an int >= 1, got 0"),
    ):
        code, _, err = run("explain", *arguments)
        assert code == 2
        assert words in err
