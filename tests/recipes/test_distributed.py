"""Training in several processes is training in one: losses, checkpoints, and what torchrun starts
again. Processes are of one machine, by gloo."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed_runs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from atlas_blocks import DeepTransformerConfig, SlidingWindowAttentionConfig
from atlas_blocks.blocks.stacks import AtlasBlockConfig
from atlas_blocks.recipes import TrainingConfig, checkpoint, config, runs
from atlas_blocks.recipes.data import Packed, Split
from atlas_blocks.recipes.distributed import folders
from atlas_blocks.recipes.distributed.layout import Layout
from atlas_blocks.recipes.distributed.sequence import part_of

SCRIPT = Path(distributed_runs.__file__)
# tensor,sequence; the other processes are for the data.
TWO, FOUR = ("1,1", "2,1", "1,2"), ("1,1", "2,2", "1,4")


def torchrun(ranks, *command, restarts=0):
    """Started, with all that it says in one stream."""
    options = ["--standalone", "--nproc-per-node", ranks, "--max-restarts", restarts]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, (*options, *command))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process, code=0):
    """What it said."""
    said, _ = process.communicate(timeout=500)
    assert process.returncode == code, said
    return said


def check_curves(tmp_path, ranks, steps, recipes, layouts):
    """Runs of all recipes over all layouts have the losses of one process."""
    out = tmp_path / "losses.json"
    finished(torchrun(ranks, SCRIPT, out, steps, ",".join(recipes), *layouts))
    found = json.loads(out.read_text())
    assert len(found) == len(recipes) * len(layouts)
    for recipe in recipes:
        whole, sizes = distributed_runs.losses(recipe, steps)
        assert len(whole) == steps
        for layout in layouts:
            run = found[f"{recipe} {layout}"]
            if run["losses"] != pytest.approx(whole, rel=1e-4):
                # Muon magnifies rounding: the measure is what one rounding of the weights does.
                near, _ = distributed_runs.losses(recipe, steps, rounded=True)
                moved = max(abs(a / b - 1) for a, b in zip(near, whole, strict=True))
                assert run["losses"] == pytest.approx(whole, rel=5 * moved), layout
            check_shares(run["own"], sizes, ranks, *map(int, layout.split(",")))


def check_shares(own, sizes, ranks, tensor, sequence):
    """Each rank has its part of every weight, and of what belongs to heads its heads'."""
    data = ranks // tensor // sequence
    for name, size in sizes.items():
        if name.endswith(("qkv.weight", "out.weight", "gate.weight", "mlp.up.weight", "memory.0")):
            assert own[name] == size // data // tensor, name
        elif name.endswith("embedding.weight"):
            assert own[name] == size // data


@pytest.mark.slow(compile_nodes=False)
def test_two_processes_have_the_losses_of_one(tmp_path):
    check_curves(tmp_path, 2, 4, ["deltanet-tiny", "transformer-tiny"], ["2,1", "1,2"])


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_over_many_steps(tmp_path):
    check_curves(tmp_path, 2, 20, ["omeganet-tiny", "transformer-tiny", "atlas-hybrid-tiny"], TWO)


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one_over_many_steps(tmp_path):
    check_curves(tmp_path, 4, 20, ["omeganet-tiny", "transformer-tiny"], FOUR)
    check_curves(tmp_path, 4, 20, ["atlas-hybrid-tiny"], ["2,2"])


@pytest.mark.slow
def test_every_kind_of_block_goes_on_at_another_rank(tmp_path):
    recipes = ["atlas-mag-tiny", "atlas-mac-tiny", "lstm-tiny", "titans-mal-tiny", "swla-tiny"]
    check_curves(tmp_path, 2, 3, recipes, ["1,2"])
    check_curves(tmp_path, 2, 3, ["atlas-mag-tiny", "samba-tiny", "retnet-tiny"], ["2,1"])


# --- parts of the data --------------------------------------------------------------------------


def packed(batch=4, length=12):
    lengths = np.random.default_rng(1).integers(2, 40, 30)
    tokens = np.arange(lengths.sum()).astype(np.int64)
    return Packed(Split([tokens], [np.cumsum(lengths)]), batch, length, 2)


def test_the_crops_of_all_ranks_are_the_batch():
    whole = packed()
    for step in range(3):
        batches = whole(step)
        parts = [whole(step, range(first, first + 2)) for first in (0, 2)]
        for number, batch in enumerate(batches):
            tokens = torch.cat([part[number].tokens for part in parts], 1)
            assert torch.equal(tokens, batch.tokens)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_crops_are_the_crops(ranks):
    """In order, with bounds where documents begin or a crop is cut; a piece goes on from the rank
    before where its document does."""
    (whole, _), length = packed()(0), 12
    bounds = set(whole.cu_seqlens.tolist())
    parts = [part_of(whole, length, rank, ranks) for rank in range(ranks)]
    rows = torch.cat([part.tokens.view(4, -1) for part in parts], 1)
    assert torch.equal(rows, whole.tokens.view(4, length))
    assert all(torch.equal(part.targets, part.tokens + 1) for part in parts)
    for rank, part in enumerate(parts):
        size = length // ranks
        places = [crop * length + rank * size + i for crop in range(4) for i in range(size)]
        starts = part.cu_seqlens[:-1].tolist()
        for piece, start in enumerate(starts):
            place, crop = places[start], start // size
            begins = place in bounds
            assert begins or start % size == 0
            assert part.before[piece] == (-1 if begins else crop)
        assert part.last.tolist() == [
            sum(start < (crop + 1) * size for start in starts) - 1 for crop in range(4)
        ]
    assert (parts[0].before == -1).all()
    assert any((part.before >= 0).any() for part in parts[1:])


# --- before step 1 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "layout", "changes", "words"),
    [
        (
            "omeganet-tiny",
            (3, 1, 1),
            {},
            "batch: expected a multiple of the 3 ranks of data, got 8",
        ),
        ("omeganet-tiny", (1, 3, 1), {}, "length: expected a multiple of sequence = 3, got 128"),
        ("omeganet-tiny", (8, 1, 1), {}, ""),
        ("omeganet-tiny", (1, 1, 8), {}, "tensor: expected a divisor of 4, as heads of blocks.0.m"),
        ("atlas-mac-tiny", (1, 1, 2), {}, "whose heads .* got MemoryAsContext in blocks.0"),
        ("lstm-tiny", (1, 1, 2), {}, "whose heads .* got LSTM in blocks.0.mixer"),
        (
            "omeganet-tiny",
            (1, 2, 1),
            {"carry": True},
            "carry: expected tensor = 1 and sequence = 1",
        ),
        ("omeganet-tiny", (2, 1, 1), {"carry": True}, ""),
        (
            "omeganet-tiny",
            (1, 1, 2),
            {"optimizer": "muon"},
            "optimizer: expected adamw with tensor",
        ),
        ("omeganet-tiny", (2, 1, 1), {"optimizer": "muon"}, ""),
        ("atlas-mac-tiny", (1, 2, 1), {}, ""),
    ],
)
def test_what_cannot_be_divided_is_named(recipe, layout, changes, words):
    settings = TrainingConfig(steps=1, **changes)
    if not words:
        Layout(*layout).check(config(recipe), settings)
        return
    with pytest.raises(ValueError, match=words):
        Layout(*layout).check(config(recipe), settings)


@pytest.mark.parametrize(
    "mixer", [SlidingWindowAttentionConfig(window=8, kv_heads=2), DeepTransformerConfig()]
)
def test_heads_that_share_what_they_read_are_named(mixer):
    model = config("transformer-tiny").replace(layers=AtlasBlockConfig(mixer=mixer))
    with pytest.raises(ValueError, match=r"whose heads ranks can have apart .* blocks.0.mixer"):
        Layout(1, 1, 2).check(model, TrainingConfig(steps=1))


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (1, ("--tensor", 2), "divide the 1 process (torchrun --nproc-per-node), got 2 * 1 = 2"),
        (4, ("--sequence", 3), "divide the 4 processes (torchrun --nproc-per-node), got 1 * 3 = 3"),
        (4, ("--tensor", 0), "tensor: expected an int >= 1, got 0"),
    ],
)
def test_sizes_that_are_not_those_of_the_processes_are_named(
    run, tmp_path, monkeypatch, ranks, flags, words
):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    code, printed, err = run("train", "omeganet-tiny", "--out", tmp_path / "out", *flags)
    assert (code, printed) == (2, "")
    assert len(err.splitlines()) == 1
    assert words in err
    assert not (tmp_path / "out").exists()


# --- runs of the command line -------------------------------------------------------------------

NAME = "linear-attention-tiny"
SMALL = ("--batch", 4, "--length", 16, "--no-compile", "--save-every", 2, "--validate-every", 4)


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("".join(f"line {i} of a text that is long enough\n" for i in range(400)))
    return file


def command(name, data, out, steps, *flags):
    return ("-m", "atlas_blocks.recipes", "train", name, "--data", data, "--out", out,
            "--steps", steps, *SMALL, *flags)  # fmt: skip


def logged(out, name="loss"):
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return {line["step"]: line[name] for line in map(json.loads, lines) if name in line}


def same(out, other):
    """Whether two runs ended at the same step with the same tensors, bit for bit."""
    ours, theirs = (load_file(runs.newest(place)) for place in (out, other))
    names = runs.newest(out).name == runs.newest(other).name and ours.keys() == theirs.keys()
    return names and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow(compile_nodes=False)
def test_a_run_goes_on_in_another_number_of_processes(run, tmp_path, data):
    """Two, then one, whose files are those that every command reads; the log has all."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    said = finished(torchrun(2, *command(NAME, data, out, 8, "--tensor", 2)))
    assert said.count("held out: on") == 1
    assert "tensor 2" in said
    names = {p.name for p in out.glob("step-*")}
    assert names == {
        "step-00000004.dcp", "step-00000006.dcp", "step-00000008.dcp", "step-00000008.safetensors"
    }  # fmt: skip
    assert not list(out.glob("*.partial*"))
    code, _, err = run(*command(NAME, data, out, 10, "--resume")[2:])
    assert code == 0, err
    assert run(*command(NAME, data, whole, 8)[2:])[0] == 0
    assert run(*command(NAME, data, whole, 10, "--resume")[2:])[0] == 0
    assert logged(out) == pytest.approx(logged(whole), rel=1e-4)
    assert logged(out, "held_out_loss") == pytest.approx(logged(whole, "held_out_loss"), rel=1e-4)
    assert list(logged(out)) == list(range(1, 11))
    ours, theirs = (checkpoint.load(runs.newest(place)) for place in (out, whole))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()
    code, printed, err = run("generate", out, "--prompt", "line", "--tokens", 5)
    assert code == 0, err
    assert printed.startswith("line")


class Evil:
    """What makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def flipped(content):
    """With one bit in the middle another."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_damaged_folder_is_named(run, tmp_path, data):
    """Whatever of it is not what was written."""
    out = tmp_path / "run"
    assert run(*command(NAME, data, out, 2)[2:])[0] == 0
    folder = out / "step-00000002.dcp"
    folders.from_file(runs.newest(out), folder)
    runs.newest(out).unlink()
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    record = json.loads(whole["run.json"])
    evil = pickle.dumps(Evil(folder / "executed"))
    sizes = record["files"] | {".metadata": len(evil)}
    evil = {"files": sizes, "checksum": None}, evil
    damages = [
        ({"__0_0.distcp": whole["__0_0.distcp"][:-9]}, "bytes in __0_0.distcp, got"),
        ({".metadata": None}, "bytes in .metadata, got none"),
        ({"run.json": b"{"}, "cannot read"),
        ({"run.json": None}, "cannot read"),
        (
            {"run.json": json.dumps(record | {"format": "x"}).encode()},
            "one that atlas-blocks wrote",
        ),
        (
            {"run.json": json.dumps(record | {"step": -1}).encode()},
            "step: expected an integer from",
        ),
        ({"run.json": json.dumps(record | {"config": "{}"}).encode()}, "config: "),
        ({"run.json": json.dumps(record | {"step": 1}).encode()}, "it is damaged"),
        ({"__0_0.distcp": flipped(whole["__0_0.distcp"])}, "it is damaged"),
        ({"run.json": json.dumps({**record, **evil[0]}).encode(), ".metadata": evil[1]}, "none of"),
        ({}, ""),
    ]
    for changes, words in damages:
        for name, content in (whole | changes).items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        code, _, err = run(*command(NAME, data, out, 4, "--resume")[2:])
        assert (code, words in err) == (2 if words else 0, True), (words, err)
        assert len(err.splitlines()) == (1 if words else 0), err
    assert not (folder / "executed").exists()


@pytest.mark.slow
def test_a_checkpoint_of_four_goes_on_with_any_number(run, tmp_path, data):
    name, out, whole = "3*gated-deltanet+transformer-tiny", tmp_path / "four", tmp_path / "whole"
    # At higher rates these weights carry a rounding to 1e-3 within ten steps.
    rate = ("--lr", 5e-4)
    assert run(*command(name, data, whole, 8, *rate)[2:])[0] == 0
    assert run(*command(name, data, whole, 12, "--resume")[2:])[0] == 0
    finished(torchrun(4, *command(name, data, out, 8, "--tensor", 2, "--sequence", 2, *rate)))
    # Only what four processes wrote.
    (out / "step-00000008.safetensors").unlink()
    for ranks, *flags in [(2, "--tensor", 2), (1,)]:
        copy = tmp_path / f"{ranks} {flags}"
        shutil.copytree(out, copy)
        finished(torchrun(ranks, *command(name, data, copy, 12, *flags, "--resume")))
        assert logged(copy) == pytest.approx(logged(whole), rel=1e-4), (ranks, flags)
    # What one process has begun, several go on with.
    finished(torchrun(2, *command(name, data, whole, 14, "--resume", "--tensor", 2)))
    assert max(logged(whole)) == 14
    assert runs.newest(whole).name == "step-00000014.safetensors"


@pytest.mark.slow
def test_blocks_are_compiled_where_the_data_alone_is_divided(run, tmp_path, data):
    out, whole = tmp_path / "out", tmp_path / "whole"
    said = finished(torchrun(2, *command(NAME, data, out, 6), "--compile"))
    assert "every block is compiled" in said
    assert run(*command(NAME, data, whole, 6)[2:])[0] == 0
    assert logged(out) == pytest.approx(logged(whole), rel=1e-3)


@pytest.mark.slow
def test_states_that_are_carried_are_those_of_the_crops_on_any_rank(run, tmp_path, data):
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = ("--carry", "--accumulate", 2)
    for steps, more in ((4, flags), (6, ("--resume",)), (8, ("--resume",))):
        assert run(*command("swla-tiny", data, whole, steps, *more)[2:])[0] == 0
    finished(torchrun(2, *command("swla-tiny", data, out, 4, *flags)))
    (out / "step-00000004.safetensors").unlink()
    assert run(*command("swla-tiny", data, out, 6, "--resume")[2:])[0] == 0
    finished(torchrun(2, *command("swla-tiny", data, out, 8, "--resume")))
    assert list(logged(out)) == list(range(1, 9))
    assert logged(out) == pytest.approx(logged(whole), rel=1e-4)


@pytest.mark.slow
def test_a_killed_rank_costs_no_more_than_an_interval(tmp_path, data):
    """SIGKILL to one of two; torchrun starts both again, and they end as if nothing had been."""
    name, out, whole = "atlas-hybrid-tiny", tmp_path / "killed", tmp_path / "whole"
    finished(torchrun(2, *command(name, data, whole, 10, "--sequence", 2)))
    process = torchrun(2, *command(name, data, out, 10, "--sequence", 2), restarts=1)
    died = wait_for(process, out, 5)
    os.kill(workers(process)[-1], signal.SIGKILL)
    said = finished(process)
    began = [int(line.split()[2]) for line in said.splitlines() if line.startswith("from step")]
    assert began, said
    assert died - 2 <= began[0] <= 10
    assert list(logged(out)) == list(range(1, 11))
    assert logged(out) == logged(whole)
    assert same(out, whole)


@pytest.mark.slow
def test_sigterm_stops_all_ranks_after_the_same_step(run, tmp_path, data):
    out = tmp_path / "stopped"
    process = torchrun(2, *command(NAME, data, out, 400))
    wait_for(process, out, 3)
    process.terminate()
    said, _ = process.communicate(timeout=100)
    assert "interrupted after step" in said, said
    step = max(logged(out))
    assert step < 400
    assert runs.newest(out).name == f"step-{step:08d}.safetensors"
    assert (out / f"step-{step:08d}.dcp" / "run.json").is_file()
    code, _, err = run(*command(NAME, data, out, step + 2, "--resume")[2:])
    assert code == 0, err
    assert max(logged(out)) == step + 2


@pytest.mark.slow
def test_one_rank_says_what_is_wrong(tmp_path, data):
    out = tmp_path / "out"
    said = finished(torchrun(2, *command("atlas-mac-tiny", data, out, 4, "--tensor", 2)), 1)
    assert said.count("atlas-blocks: tensor: expected blocks whose heads ranks can have apart") == 1
    assert not list(out.glob("step-*"))


def workers(process):
    """The processes that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in children.split()]


def wait_for(process, out, step):
    """The step that a run has come to, once that is `step`."""
    for _ in range(1200):
        assert process.poll() is None, process.communicate()[0]
        now = max(logged(out), default=-math.inf)
        if now >= step:
            return now
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")
