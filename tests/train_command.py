"""What the tests of `atlas-blocks train` share: a small model, and what a run has left."""

import torch
from safetensors.torch import load_file

from atlas_blocks.recipes import checkpoint, runs

NAME = "linear-attention-tiny"
SMALL = ("--batch", 1, "--length", 16, "--no-compile")


def flat(words):
    return " ".join(words.split())


def load(out):
    """The model and the run of the newest checkpoint in a folder."""
    path = runs.newest(out)
    model = checkpoint.load(path)
    return model, checkpoint.load_run(path, model)


def same(out, other):
    """Whether two runs ended at the same step with the same weights and optimizer, bit for bit."""
    ours, theirs = (load_file(runs.newest(place)) for place in (out, other))
    names = runs.newest(out).name == runs.newest(other).name and ours.keys() == theirs.keys()
    return names and all(torch.equal(ours[name], theirs[name]) for name in ours)
