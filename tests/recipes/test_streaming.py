"""`stream`: an interrupted stream goes on to the same bits, and its memory does not grow."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from atlas_blocks.recipes import build, checkpoint, streaming
from atlas_blocks.recipes.reading import Reader

FILE = Path(streaming.__file__)


@pytest.fixture(params=["atlas-mag-tiny", "linear-attention-tiny"])
def trained(request, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, build(request.param, depth=1))
    return path


@pytest.fixture
def light(tmp_path):
    path = tmp_path / "light.safetensors"
    checkpoint.save(path, build("linear-attention-tiny", depth=1))
    return path


def record(out):
    return json.loads((out / "stream.json").read_text())


def after(calls, what):
    """Reader.read, which does `what` once it has been called so often."""
    whole, count = Reader.read, [0]

    def read(self, tokens, state=None):
        count[0] += 1
        if count[0] == calls:
            what()
        return whole(self, tokens, state)

    return read


def killed():
    raise RuntimeError("killed")


@pytest.mark.parametrize("source", ["file", "task"])
def test_a_stream_goes_on_to_the_same_bits(run, trained, tmp_path, monkeypatch, source):
    text = ("--file", FILE) if source == "file" else ("--task", "babi-qa2")
    command = ("stream", trained, *text, "--tokens", 2000, "--segment", 150, "--every", 600)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, _ = run(*command, "--out", whole)
    assert code == 0
    assert "tokens/s" in out
    with monkeypatch.context() as patched:
        # Ctrl-C: the segment in hand is finished, and all of it is saved.
        patched.setattr(Reader, "read", after(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
        code, out, _ = run(*command, "--out", parts)
        assert code == 130
        assert "interrupted after 450 of" in out
        assert record(parts)["done"] == 450
    with monkeypatch.context() as patched:
        # A kill: what the last line of the record has is there.
        patched.setattr(Reader, "read", after(7, killed))
        with pytest.raises(RuntimeError, match="killed"):
            run(*command, "--out", parts, "--resume")
        assert record(parts)["done"] == 1200
    with monkeypatch.context() as patched:
        patched.setattr(Reader, "read", after(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert run(*command, "--out", parts, "--resume")[0] == 130
        assert record(parts)["done"] == 1350
    assert run(*command, "--out", parts, "--resume")[0] == 0
    a, b = record(whole), record(parts)
    for name in ("done", "nats", "state_checksum", "answer", "settings"):
        assert a.get(name) == b.get(name)
    for found in (a, b):
        assert sum(line["tokens"] for line in found["stretches"]) == found["done"]
    assert a["done"] == (2000 if source == "file" else 2000 - 32)
    assert len(list(parts.glob("state-*"))) == 1
    # It is finished: to resume it reads nothing.
    monkeypatch.setattr(Reader, "read", None)
    assert run(*command, "--out", parts, "--resume")[0] == 0


def test_the_loss_is_that_of_one_pass(run, light, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"To be or not to be? " * 20)
    command = ("stream", light, "--file", text, "--tokens", 1000, "--segment", 96)
    assert run(*command, "--out", tmp_path / "out")[0] == 0
    found = record(tmp_path / "out")
    # A file that is shorter begins again.
    tokens = torch.tensor(list((text.read_bytes() * 3)[:1000]))
    with torch.no_grad():
        logits = checkpoint.load(light)(tokens[None]).logits[0]
    nats = F.cross_entropy(logits[:-1], tokens[1:], reduction="sum").item()
    assert found["nats"] == pytest.approx(nats, rel=1e-5)
    assert sum(line["tokens"] for line in found["stretches"]) == 1000


def test_a_file_begins_again_however_its_tokens_are_read(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(10)))
    held = streaming.Repeated(np.arange(10, dtype=np.uint16), 37)
    read = streaming.RepeatedBytes(path, 10, 37)
    for first, last in ((0, 3), (8, 12), (5, 36), (30, 50), (37, 40)):
        expected = [n % 10 for n in range(first, min(last, 37))]
        for source in (held, read):
            found = source.window(first, last)
            assert (found.tolist(), found.dtype) == (expected, torch.int64)


def test_errors_come_before_anything_is_read(run, light, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run("stream", light, "--file", FILE, "--tokens", "1k", "--out", out)[0] == 0
    monkeypatch.setattr(Reader, "read", None)
    base = ("stream", light, "--file", FILE, "--tokens", "1k")
    for arguments, words in (
        ((*base, "--out", out), f"out: {out} holds a stream; --resume continues it"),
        ((*base, "--resume"), "out: expected the folder of a stream to resume, got none"),
        ((*base, "--resume", "--out", tmp_path), "out: expected the folder of a stream to resume"),
        ((*base, "--resume", "--out", out, "--seed", 3), "seed: expected 0, as in"),
        ((*base, "--resume", "--out", out, "--segment", 9), "segment: expected 4096, as in"),
        ((*base, "--tokens", "1k,2k"), "tokens: expected one number of tokens"),
        ((*base, "--tokens", "1"), "tokens: expected an int >= 2"),
        ((*base, "--every", "0"), "every: expected an int >= 1"),
        ((*base, "--task", "niah-1"), "task: expected one of --task and --file, got both"),
        ((*base[:2], "--tokens", "1k"), "task: expected one of --task and --file, got neither"),
        ((*base[:2], "--task", "mqar", "--tokens", "1k"), "task: expected one in text: niah-1"),
        ((*base[:2], "--task", "niah-1", "--tokens", 90), "tokens: 90: length: expected at least"),
        ((*base[:3], tmp_path / "none", *base[4:]), "file: cannot read"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.startswith(f"atlas-blocks: {words}")


def test_a_state_that_grows_is_told(run, tmp_path):
    path = tmp_path / "attention.safetensors"
    checkpoint.save(path, build("transformer-tiny", depth=1))
    code, out, _ = run("stream", path, "--file", FILE, "--tokens", 500)
    assert code == 0
    assert "the state of this model grows with the text" in out


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(light, tmp_path):
    """In a process of its own, whose memory no other test has left in pieces."""
    out = tmp_path / "out"
    command = ("stream", light, "--task", "niah-2", "--tokens", "1m", "--every", "100k")
    words = [str(word) for word in (*command, "--out", out)]
    subprocess.run([sys.executable, "-m", "atlas_blocks.recipes", *words], check=True)
    lines = record(out)["stretches"]
    if lines[0]["peak_since_start"]:
        pytest.skip("the system does not let the peak be set back")
    assert len(lines) == 11
    assert lines[-2]["peak_bytes"] < 1.05 * lines[0]["peak_bytes"]
    assert {line["state_bytes"] for line in lines} == {lines[0]["state_bytes"]}
