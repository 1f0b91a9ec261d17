"""The studies: what each asks, of which task, of which models."""

from __future__ import annotations

import dataclasses
from typing import Any

from training import Crops, Study, Variant

from atlas_blocks import AtlasBlockConfig, MemoryCachingConfig
from atlas_blocks.recipes.architectures import ARCHITECTURES, Size
from atlas_blocks.recipes.tasks import MQARTask, NeedleTask, OverwriteTask, RecallTask


def _size(vocab_size: int, dim: int = 32) -> Size:
    """Two layers of two heads."""
    return Size(2, dim, 2, None, vocab_size=vocab_size, expansion=1, reach=16, multiple=8)


RECALL = RecallTask(length=64, pairs=6, keys=24)
SMALL = _size(RECALL.vocab_size)


def _changed(layers: str, *changes: tuple[str, dict[str, Any]]) -> dict[str, Variant]:
    """A recipe as it is, and with each of the changes."""
    found = {layers: Variant(layers)}
    return found | {f"{layers}, {label}": Variant(layers, given) for label, given in changes}


# For questions of many variants.
FEW = RecallTask(length=64, pairs=4, keys=12)
FEW_SIZE = _size(FEW.vocab_size)

STUDIES: dict[str, Study] = {}

STUDIES["recall"] = Study(
    what="Which recipes learn associative recall: 6 pairs of 24 keys in 64 tokens?",
    task=RECALL,
    size=SMALL,
    variants={name: Variant(name) for name in ARCHITECTURES},
)

STUDIES["settings"] = Study(
    what="What does one setting of a memory change in recall?",
    task=RECALL,
    size=SMALL,
    variants={
        label: variant
        for name in ("atlas", "atlas-plus-plus", "titans")
        for label, variant in _changed(
            name,
            *((f"chunk {n}", {"chunk_size": n}) for n in (16, 32, 64)),
            *((f"window {n}", {"window": n}) for n in (1, 4)),
            *((f"eta {n}", {"eta_init": n}) for n in (0.02, 0.05, 0.1, 0.2, 0.5)),
            ("own 0.5", {"own_init": 0.5}),
            ("lag 0.1", {"lag_init": 0.1}),
            ("momentum 0.1", {"momentum_init": 0.1}),
            ("momentum 0.9", {"momentum_init": 0.9}),
            ("no momentum", {"momentum": False}),
            ("decay to zero", {"decay_to": "zero"}),
        ).items()
    },
)

MQAR = MQARTask(length=48, pairs=8, vocab_size=64, random_filler=False)
STUDIES["state"] = Study(
    what="How much of MQAR is answered with how large a state: 8 pairs, 48 tokens, 64 words?",
    task=MQAR,
    size=_size(MQAR.vocab_size),
    variants={
        f"{name}, dim {dim}": Variant(name, size=_size(MQAR.vocab_size, dim))
        for dim in (16, 32)
        for name in (
            "gated-deltanet",
            "omeganet",
            "titans",
            "atlas",
            "dot",
            "swla",
            "transformer",
            "omeganet+transformer",
        )
    },
    steps=1000,
    lr=1e-2,
    enough=0.995,
    axis="state",
    equal=False,
)

NEEDLE = NeedleTask(length=832, new_tokens=16)
NEEDLE_SIZE = dataclasses.replace(_size(384, 64), expansion=2)
ONE_HEAD = dataclasses.replace(NEEDLE_SIZE, heads=1)
STUDIES["needle"] = Study(
    what="Trained on needles among at most 832 tokens: up to which length is one found?",
    task=NEEDLE,
    size=NEEDLE_SIZE,
    variants={
        "deltanet": Variant("deltanet"),
        "gated-deltanet": Variant("gated-deltanet"),
        "deltanet, one head": Variant("deltanet", size=ONE_HEAD),
        "deltanet, one head, states passed": Variant("deltanet", size=ONE_HEAD, passed=0.5),
    },
    lengths=(208, 208, 416, 832),
    tests=(208, 832, 8_320, 83_200, 1_048_576),
    steps=1500,
    batch=8,
    every=250,
    axis="tokens",
    equal=False,
)

STUDIES["window"] = Study(
    what="What do the window c and the degree p of the features bring, where keys are many?",
    task=RecallTask(length=48, pairs=8, keys=16),
    size=_size(33),
    variants={
        f"c = {c}, {label}": Variant("omeganet", {"window": c, **features}, x=c)
        for label, features in (
            ("no features", {"feature_map": "identity"}),
            ("p = 2", {"degree": 2}),
            ("p = 3", {"degree": 3}),
        )
        for c in (1, 4, 16)
    },
    steps=1000,
    batch=16,
    axis="window c",
    equal=False,
)

STUDIES["muon"] = Study(
    what="What does Muon cost and bring: at every token, at some, and gradient descent?",
    task=FEW,
    size=FEW_SIZE,
    variants={
        **{
            f"Muon at every {n}": Variant("atlas", {"ns_every": n, "chunk_size": max(16, n)})
            for n in (1, 4, 16, 64)
        },
        "gradient descent": Variant("atlas", {"update": "gd", "ns_every": 1, "chunk_size": 16}),
        "gradient descent, chunk 64": Variant(
            "atlas", {"update": "gd", "ns_every": 1, "chunk_size": 64}
        ),
    },
    steps=1000,
    lr=1e-2,
    batch=16,
    axis="seconds",
)

STUDIES["switches"] = Study(
    what="The switches of the paper's Table 6, one at a time, where they matter for recall",
    task=FEW,
    size=FEW_SIZE,
    variants={
        **_changed(
            "atlas",
            ("linear memory", {"memory": "matrix"}),
            ("gated MLP", {"memory": "gated_mlp"}),
            ("without Muon", {"update": "gd", "ns_every": 1}),
            ("a window of 1", {"window": 1}),
            ("no polynomial features", {"feature_map": "identity"}),
        ),
        "atlas-mag": Variant("atlas-mag"),
        "atlas-mal": Variant("atlas-mal"),
    },
    steps=1000,
    lr=1e-2,
    batch=16,
)

OVERWRITE = OverwriteTask(writes=112, queries=32, keys=8, values=16)
STUDIES["errors"] = Study(
    what="Are online errors needed, as chunks get longer: 8 keys written anew for 256 tokens?",
    task=OVERWRITE,
    size=_size(OVERWRITE.vocab_size),
    variants={
        f"{errors}, b = {b}": Variant("gated-deltanet", {"errors": errors, "chunk_size": b}, x=b)
        for errors in ("online", "chunk")
        for b in (16, 64, 256)
    },
    lengths=(64, 128, 256),
    steps=1000,
    batch=8,
    axis="chunk b",
    equal=False,
)

TITANS = ARCHITECTURES["titans"](FEW_SIZE)
assert isinstance(TITANS, AtlasBlockConfig)


def _cached(**settings: Any) -> AtlasBlockConfig:
    """Titans with the memories of its segments of 16 tokens."""
    return TITANS.replace(mixer=MemoryCachingConfig(TITANS.mixer, segment=16, **settings))


STUDIES["caching"] = Study(
    what="Does Memory Caching remember longer: recall at 4 and 16 times the length of training?",
    task=FEW,
    size=FEW_SIZE,
    variants={
        "titans": Variant("titans"),
        "segments apart": Variant(_cached(reset=True)),
        "segments in a row": Variant(_cached()),
        "segments in a row, 2 read": Variant(_cached(top_k=2)),
    },
    tests=(64, 256, 1024),
    batch=16,
    axis="tokens",
)

STUDIES["tnt"] = Study(
    what="Does TNT train faster: a byte's loss and the time of a step at T = 2,048, equal bytes",
    task=Crops(length=2048),
    fresh=Crops(length=2048, held_out=True),
    size=dataclasses.replace(_size(256, 64), reach=128),
    variants={
        "titans, chunk 16": Variant("titans", {"chunk_size": 16}),
        "titans, chunk 64": Variant("titans", {"chunk_size": 64}),
        "tnt": Variant("tnt"),
    },
    steps=200,
    batch=2,
    every=200,
    samples=32,
    axis="seconds",
    equal=False,
)
