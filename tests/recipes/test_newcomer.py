"""From the page to a trained hybrid of one's own, as it is written there."""

import re
import shlex
from pathlib import Path

from atlas_blocks.recipes import config

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
HEADING = "## A hybrid of your own in six commands\n"
# A run is short here.
QUICK = ["--steps", "12", "--batch", "2", "--length", "32", "--no-compile"]


def commands():
    _, heading, rest = PAGE.read_text().partition(HEADING)
    assert heading
    return re.findall(r"^ {4}(\S.*)", rest.partition("\n## ")[0], re.MULTILINE)


def test_six_commands_lead_to_a_hybrid_of_ones_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = Path("texts")
    texts.mkdir()
    for number in range(40):
        lines = (f"Once {i} times {number} was {i * number}.\n" for i in range(number % 7, 30))
        (texts / f"{number}.txt").write_text("".join(lines))
    install, *others = commands()
    assert len(others) <= 5
    assert install.startswith("pip install ")
    assert "[train]" in install
    printed = ""
    for line in others:
        name, *words = shlex.split(line)
        assert name == "atlas-blocks"
        target = words[words.index(">") + 1] if ">" in words else None
        words = words[: words.index(">")] if target else words
        code, printed, err = run(*words, *(QUICK if words[0] == "train" else ()))
        assert code == 0, (line, err)
        if target:
            Path(target).write_text(printed)
    assert printed.startswith("Once ")
    mixers = [type(layer.mixer).__name__ for layer in config("mine.json").layers]
    assert mixers == 2 * (3 * ["AtlasMemoryConfig"] + ["SlidingWindowAttentionConfig"])
    assert len(list(Path("mine").glob("step-*.safetensors"))) == 1
