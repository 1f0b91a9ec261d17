"""Models whose layers differ: patterns of names, settings, files, blocks of one's own."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import AverageConfig, difference, everything
from marks import slow_as_it_is
from torch import nn

from atlas_blocks import (
    AtlasBlockConfig,
    AtlasMemoryConfig,
    Config,
    MemoryAsGateConfig,
    SlidingWindowAttentionConfig,
    State,
    with_settings,
)
from atlas_blocks.recipes import (
    LanguageModelConfig,
    TrainingConfig,
    build,
    checkpoint,
    config,
    describe,
    export,
    generate,
    names,
    register_block,
    registry,
    train,
)
from atlas_blocks.recipes.architectures import ARCHITECTURES, SIZES

TINY = SIZES["tiny"]
OLD = Path(__file__).parent / "files" / "block_and_depth.safetensors"
MEMORY = AtlasBlockConfig(AtlasMemoryConfig(update="gd", window=2, chunk_size=4, gate_rank=2))
WINDOW = AtlasBlockConfig(SlidingWindowAttentionConfig(window=5, kv_heads=1), 12, "relu2")


def small(layers, depth: int | None = None, **changes) -> LanguageModelConfig:
    return LanguageModelConfig("small", 11, 8, 2, depth, layers, **changes)


@pytest.fixture
def _own_names():
    """What a test registers is gone after it."""
    before = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)
    registry._recipe.cache_clear()


# --- patterns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "depth", "expected"),
    [
        ("3*samba+lstm", None, "sssl"),
        ("3*samba+lstm", 8, "ssslsssl"),
        ("3*samba+lstm", 6, "ssslss"),  # cut
        (" 2 * samba + lstm ", 3, "ssl"),
        ("samba+lstm+samba", 4, "slss"),
        ("lstm", 2, "ll"),
        (["2*samba", "lstm"], 4, "ssls"),
    ],
)
def test_a_pattern_is_repeated_up_to_the_depth_and_cut(pattern, depth, expected) -> None:
    blocks = {"s": ARCHITECTURES["samba"](TINY), "l": ARCHITECTURES["lstm"](TINY)}
    found = LanguageModelConfig("x", 9, TINY.dim, TINY.heads, depth, pattern)
    assert found.layers == tuple(blocks[letter] for letter in expected)
    assert found.depth == len(expected)


def test_a_name_means_at_a_width_what_it_means_in_the_recipes_of_that_width() -> None:
    sizes = [(TINY.dim, TINY.heads), (16, 2)]
    windows = [
        LanguageModelConfig("x", 9, *size, layers="sliding-window").layers[0].mixer.window
        for size in sizes
    ]
    assert windows == [TINY.reach, SIZES["170m"].reach]


def test_the_hybrids_are_their_patterns() -> None:
    for hybrid, pattern in (
        ("atlas-hybrid", "3*atlas+transformer"),
        ("sliding-window-hybrid", "3*sliding-window+atlas"),
    ):
        for size in SIZES:
            ours, typed = config(f"{hybrid}-{size}"), config(f"{pattern}-{size}")
            assert ours.replace(name="") == typed.replace(name="")
            assert ours.depth == max(4, SIZES[size].depth)
        assert config(f"2*{hybrid}+lstm-tiny").depth == 9


@pytest.mark.parametrize(
    ("layers", "depth", "message"),
    [
        (
            "3*atlass+lstm",
            None,
            "layers: expected names of recipes, .*, got 'atlass'; did .* atlas",
        ),
        (
            "atlas-tiny",
            None,
            "layers: expected names of recipes, .*, got 'atlas-tiny'; .*mean atlas",
        ),
        ("zzz", None, "got 'zzz'$"),
        *[
            (form, None, "layers: expected a pattern of names such as '3.atlas.transformer', got ")
            for form in (
                "",
                "3*",
                "*lstm",
                "lstm+",
                "0*lstm",
                "-1*lstm",
                "1.5*lstm",
                "l stm",
                "9999*lstm",
            )
        ],
        ("3*samba+lstm", 3, "depth: expected at least 4, one turn of layers, got 3"),
        ("lstm", 0, "depth: expected an int >= 1, got 0"),
        ((), None, "layers: expected block configs, or a pattern of names .*, got none"),
        (None, 2, "layers: expected layers or block, got neither"),
        (7, 2, "layers: expected a block config, got int"),
        ((MEMORY, 7), None, r"layers\.1: expected a block config, got int"),
        (
            (AtlasMemoryConfig(),),
            None,
            r"layers\.0: expected a block config, as AtlasBlockConfig makes .*, got AtlasMemoryCon",
        ),
    ],
)
def test_what_is_no_sequence_of_layers_is_named(layers, depth, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(layers, depth)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("3*atlas+transfomer-tiny", "got 'transfomer'; did you mean transformer"),
        ("3*atlas+transformer-tinny", "did you mean 3.atlas.transformer-tiny"),
        ("3*atlas+transformer", "did you mean .*3.atlas.transformer-tiny"),
        ("3*gated-deltanet+transformer", "did you mean 3.gated-deltanet.transformer-tiny"),
        ("3*atlas+-tiny", "layers: expected a pattern of names"),
        ("atlas-hybird-tiny", "recipe: 'atlas-hybird-tiny' is unknown; did you mean atlas-hybrid"),
    ],
)
def test_what_is_no_pattern_at_a_size_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(name)


# --- configs ------------------------------------------------------------------------------------


def test_one_block_is_short_for_layers_that_are_all_alike() -> None:
    by_keyword = LanguageModelConfig("small", 11, 8, 2, depth=3, block=MEMORY)
    assert by_keyword == small(MEMORY, 3) == small((MEMORY,) * 3)
    assert by_keyword.replace(block=WINDOW) == small(WINDOW, 3)
    with pytest.raises(ValueError, match="layers: expected layers or block, got both"):
        small(MEMORY, 3, block=MEMORY)
    with pytest.raises(ValueError, match="layers: expected layers or block, got both"):
        small(MEMORY, 3).replace(layers=WINDOW, block=MEMORY)


def test_another_depth_repeats_or_cuts_the_turn() -> None:
    turn = (MEMORY, MEMORY, WINDOW)
    assert small(turn, 7).turn == turn
    assert small(turn, 7).replace(depth=9) == small(3 * turn)
    assert small(turn, 9).replace(depth=4) == small(turn, 4)
    with pytest.raises(ValueError, match="depth: expected at least 3, one turn of layers, got 2"):
        small(turn).replace(depth=2)
    assert small((WINDOW, MEMORY, MEMORY)).turn == (WINDOW, MEMORY, MEMORY)


@pytest.mark.parametrize("layers", [MEMORY, (MEMORY, WINDOW), (MEMORY, WINDOW, WINDOW)])
def test_json_holds_one_turn_and_gives_all_layers_back(layers) -> None:
    model = small(layers, 7)
    assert Config.from_json(model.to_json()) == model
    assert hash(Config.from_json(model.to_json())) == hash(model)
    data = json.loads(model.to_json())
    assert len(data["layers"]) == len(model.turn)
    # As older files have it.
    if len(model.turn) == 1:
        data["block"] = data.pop("layers")[0]
        assert Config.from_dict(data) == model


def test_settings_reach_one_layer_or_every_one() -> None:
    model = small((MEMORY, WINDOW), 4)
    changed = with_settings(model, {"layers.2.mixer.window": 3})
    other = AtlasBlockConfig(MEMORY.mixer.replace(window=3))
    assert changed == small((MEMORY, WINDOW, other, WINDOW))
    every = with_settings(model, {"layers.*.mlp_width": 5})
    assert {layer.mlp_width for layer in every.layers} == {5}
    # Room is made before it is used.
    longer = with_settings(model, {"layers.5.mlp_width": 5, "depth": 6})
    assert longer.layers[5] == WINDOW.replace(mlp_width=5)
    named = with_settings(model, {"layers": "3*samba+lstm", "depth": 5, "tie_embeddings": False})
    assert named == small("3*samba+lstm", 5, tie_embeddings=False)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("layers.4.mlp_width", 5, r"layers: expected a place from 0 to 3, or \*, got '4'"),
        ("layers.x.mlp_width", 5, r"layers: expected a place from 0 to 3, or \*, got 'x'"),
        ("layers.0.mixer.window", 0, r"layers\.0\.mixer\.window: expected an int >= 1, got 0"),
        ("layers.1.mixer.windw", 3, r"layers\.1\.mixer: SlidingWindow.* field: .*, got 'windw'"),
        ("layers", "3*atlass", "^layers: expected names of recipes, .*, got 'atlass'"),
        ("depth", 1, "depth: expected at least 2, one turn of layers, got 1"),
        ("dept", 1, "LanguageModelConfig field: expected one of .*depth.*, got 'dept'"),
        ("name", 1, "name: expected a string, got 1"),
        ("tie_embeddings", "no", "tie_embeddings: expected True or False, got 'no'"),
        ("heads", 3, "heads: expected a divisor of dim = 8, got 3"),
    ],
)
def test_a_setting_that_does_not_fit_a_model_is_named(path, value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_settings(small((MEMORY, WINDOW), 4), {path: value})


def test_counts_of_layers_that_differ_are_those_of_the_model() -> None:
    turn = (MEMORY, WINDOW, AtlasBlockConfig(AverageConfig()), MemoryAsGateConfig(MEMORY.mixer))
    model = small(turn, 6, tie_embeddings=False)
    assert registry.parameter_count(model) == model.build().parameter_count()
    with torch.no_grad():
        _, state = model.build()(torch.zeros(1, 9, dtype=torch.int64))
    assert describe.state_bytes(model, 9) == state.nbytes
    told = describe.pattern(model.replace(depth=10))
    assert told.startswith("2 x [(mlp, gradient descent, c=2) + (window 5, 1 kv heads) + (AverageC")
    assert told.endswith("] + (mlp, gradient descent, c=2) + (window 5, 1 kv heads)")


# --- the models -----------------------------------------------------------------------------------


def test_a_hybrid_from_a_pattern_trains_streams_and_comes_back(tmp_path) -> None:
    torch.manual_seed(0)
    model = build("3*gated-deltanet+transformer-tiny")
    data = torch.arange(4096).mul(37).remainder(97).to(torch.uint8)
    before = [p.clone() for p in model.parameters()]
    train(model, data, TrainingConfig(steps=1, batch=2, length=40))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    checkpoint.save(tmp_path / "model", model)
    assert checkpoint.config(tmp_path / "model") == model.config
    loaded, text = checkpoint.load(tmp_path / "model").double(), torch.randint(256, (2, 70))
    with torch.no_grad():
        whole = model.double()(text)
        first = loaded(text[:, :33])
        second = loaded(text[:, 33:], first.state)
    logits = torch.cat([first.logits, second.logits], 1)
    assert difference(everything((logits, second.state)), everything(whole)) < 1e-10


def test_a_checkpoint_of_one_block_and_a_depth_loads() -> None:
    """A file that version 0.1 wrote before layers could differ, and the logits it gave then."""
    model = checkpoint.load(OLD)
    assert model.config.depth == 2
    assert model.config.turn == (checkpoint.config(OLD).layers[1],)
    then = [-0.857248, 0.48383, 0.426965, -0.24434, -0.521652, -0.329078, 0.445927, -0.042444]
    then += [0.100854, 0.460065, 0.146075, 0.072871, 0.029577, 0.414935, 0.007181, 0.175845]
    now = model(torch.arange(12)[None]).logits[0, -1]
    torch.testing.assert_close(now, torch.tensor(then), atol=2e-5, rtol=1e-4)


def test_a_step_of_layers_that_differ_is_exported() -> None:
    torch.manual_seed(0)
    model, text = (
        small((MEMORY, WINDOW, AtlasBlockConfig(AverageConfig()))).build(),
        torch.arange(9),
    )
    with torch.no_grad():
        _, state = model(text[None, :4])
        program = export.export_plain_step(model, text[None, 4:5], state)
        step, tensors = program.module(), state.tensors()
        for t in range(4, 9):
            logits, *tensors = step(text[None, t : t + 1], *tensors)
            true, state = model(text[None, t : t + 1], state)
    assert difference(everything((logits, None)), everything((true, None))) < 1e-4


@pytest.mark.parametrize(
    "layers",
    [
        slow_as_it_is("3*gated-deltanet+transformer"),
        slow_as_it_is((MEMORY, WINDOW, AtlasBlockConfig(AverageConfig()))),
    ],
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_hybrid_is_one_graph(layers: str) -> None:
    """Forward and backward, and one more for every other length."""
    torch._dynamo.reset()
    model = small(layers).build().double()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    parameters = list(model.parameters())
    for length in (130, 150, 200):
        text = torch.randint(11, (2, length))
        results = []
        for function in (compiled, model):
            logits, state = function(text)
            grads = torch.autograd.grad(logits.square().sum(), parameters)
            results.append([*everything((logits, state)), *grads])
        assert difference(*results) < 1e-6
    assert len(graphs) <= 2


# --- blocks of one's own --------------------------------------------------------------------------


class Halves(nn.Module):
    """A block of somebody's, with a residual of its own: x + (the mean so far) / 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x, state=None):
        total, count = (
            (x.new_zeros(len(x), x.shape[2]), x.new_zeros(len(x))) if state is None else state
        )
        sums = total[:, None] + x.cumsum(1)
        counts = count[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device)
        last = torch.cat([total[:, None], sums], 1)[:, -1], count + x.shape[1]
        return x + self.scale * sums / counts[..., None], last


@dataclasses.dataclass(frozen=True)
class HalvesConfig(Config):
    def build(self, dim: int, heads: int) -> Halves:
        return Halves(dim)


OWN = (MEMORY, HalvesConfig(), AtlasBlockConfig(AverageConfig(), mlp_width=3))


def test_a_model_of_somebody_s_blocks_streams_packs_saves_and_generates(tmp_path) -> None:
    torch.manual_seed(0)
    model, text = small(OWN, 4).build(), torch.randint(11, (1, 20))
    checkpoint.save(tmp_path / "model", model)
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == model.config
    tokens = generate(model, text[:, :5], max_new_tokens=4, seed=1)
    assert torch.equal(tokens, generate(loaded, text[:, :5], max_new_tokens=4, seed=1))
    model = model.double()
    with torch.no_grad():
        whole = model(text)
        first = model(text[:, :7])
        second = model(text[:, 7:], first.state)
        packed = model(text, cu_seqlens=torch.tensor([0, 7, 20]))
        alone = [model(part) for part in text.split([7, 13], 1)]
    logits = torch.cat([first.logits, second.logits], 1)
    assert difference(everything((logits, second.state)), everything(whole)) < 1e-10
    true = torch.cat([a.logits for a in alone], 1), State.cat([a.state for a in alone])
    assert difference(everything(packed), everything(true)) < 1e-10
    model(text).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_block_of_somebody_s_keeps_its_own_start() -> None:
    torch.manual_seed(3)
    ours = small(AtlasBlockConfig(AverageConfig(), mlp_width=3)).build().blocks[0].mixer.module.out
    assert ours.weight.abs().max() <= 8**-0.5  # nn.Linear's
    assert small(HalvesConfig()).build().blocks[0].module.scale.eq(0.5).all()


@pytest.mark.usefixtures("_own_names")
def test_a_registered_name_stands_in_patterns_and_recipes() -> None:
    register_block("average", lambda size: AtlasBlockConfig(AverageConfig(1 / size.dim)))
    register_block("two", lambda size: (HalvesConfig(), MEMORY))
    model = config("2*average+transformer+two-tiny")
    average = AtlasBlockConfig(AverageConfig(1 / 64), model.layers[0].mlp_width)
    assert model.layers[:2] == (average, average)
    assert model.layers[3] == HalvesConfig()
    aim = registry.target("atlas-tiny")
    assert abs(registry.parameter_count(model) - aim) < 0.02 * aim
    assert model.build().parameter_count() == registry.parameter_count(model)
    assert small("two+average").layers[:2] == (HalvesConfig(), MEMORY)
    assert "average-tiny" in names()
    before = config("average-tiny")
    register_block("average", lambda size: AtlasBlockConfig(AverageConfig(0.25)))
    assert config("average-tiny").layers[0].mixer.rate == 0.25 != before.layers[0].mixer.rate
    # A block without an MLP of ours has nothing that could be fitted.
    register_block("plain", lambda size: HalvesConfig())
    assert config("plain-tiny").layers == 2 * (HalvesConfig(),)


@pytest.mark.usefixtures("_own_names")
@pytest.mark.parametrize(
    ("name", "factory", "message"),
    [
        ("atlas", lambda size: MEMORY, "name: expected one that no recipe has, got 'atlas'"),
        ("3*mine", lambda size: MEMORY, "name: expected letters, digits, .*, got '3.mine'"),
        (7, lambda size: MEMORY, "name: expected letters, digits, .*, got 7"),
        ("mine", MEMORY, "factory: expected a function of a Size, got AtlasBlockConfig"),
    ],
)
def test_what_cannot_be_registered_is_named(name, factory, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_block(name, factory)


@pytest.mark.usefixtures("_own_names")
def test_a_factory_that_makes_no_block_is_named() -> None:
    register_block("mine", lambda size: AtlasMemoryConfig())
    with pytest.raises(ValueError, match="what 'mine' makes: expected a block config, as Atlas"):
        small("2*mine+lstm")


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A text, short to prepare."""
    (tmp_path / "words.txt").write_text(" ".join(f"word {i} of many" for i in range(4000)))
    return tmp_path / "words.txt"


def test_a_hybrid_of_the_command_line_trains_resumes_and_generates(run, tmp_path, data) -> None:
    name, saved = "3*samba+transformer-tiny", tmp_path / "model"
    options = ("--batch", 1, "--length", 16, "--no-compile", "--data", data)
    code, out, _ = run("train", name, "--out", saved, "--steps", 1, *options)
    assert code == 0
    assert f"{name}, 1" in out
    assert run("train", name, "--out", saved, "--resume", "--steps", 2)[0] == 0
    code, _, err = run("train", "3*samba+lstm-tiny", "--out", saved, "--resume")
    assert code == 2
    assert "recipe: expected 3*samba+transformer-tiny" in err
    assert run("generate", saved, "--tokens", 2)[0] == 0
    code, out, _ = run("show", saved)
    assert code == 0
    assert "3 x MAL(matrix, dot, gradient descent, c=1, window 32) + (full attention)" in out


@pytest.mark.slow(compile_nodes=False)
def test_a_file_of_a_config_is_shown_changed_and_trained(run, tmp_path, data) -> None:
    _, text, _ = run("show", "3*samba+lstm-tiny", "--set", "layers.0.attention.window=7", "--json")
    file, saved = tmp_path / "mine.json", tmp_path / "model"
    file.write_text(text)
    code, out, _ = run("show", file)
    assert code == 0
    assert "c=1, window 7) + 2 x MAL(matrix, dot, gradient descent, c=1, window 32) + (LSTM)" in out
    assert "blocks (4)" in out
    assert "1, 2 MemoryAsLayer" in out
    options = ("--batch", 1, "--length", 16, "--no-compile", "--steps", 1, "--data", data)
    assert run("train", file, "--out", saved, *options)[0] == 0
    assert run("train", file, "--out", saved, "--resume")[0] == 0
    file.write_text(text.replace('"window": 7', '"window": 8'))
    code, _, err = run("train", file, "--out", saved, "--resume")
    assert code == 2
    assert "recipe: expected the config of the run in" in err


def test_a_toml_file_says_a_model_in_a_few_lines(run, tmp_path) -> None:
    pytest.importorskip("tomllib")
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\nvocab_size = 256\ndim = 64\nheads = 4\ndepth = 5\nlayers = "samba+lstm"\n'
    )
    code, out, _ = run("show", file, "--set", "tie_embeddings=False", "--set", "name=yours")
    assert code == 0
    assert "yours" in out
    assert "2 x [MAL(matrix, dot, gradient descent, c=1, window 32) + (LSTM)] + MAL(" in out
    assert "head Linear 16.4k" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("lstm-tiny", "--set", "depth"),
            "set: expected PATH=VALUE, such as layers.0.mixer.window",
        ),
        (("lstm-tiny", "--set", "=3"), "set: expected PATH=VALUE"),
        (("lstm-tiny", "--set", "depth=many"), "depth: expected an int >= 1, got 'many'"),
        (
            ("transformer-tiny", "--set", "layers.1.mixer.window=many"),
            "layers.1.mixer.window: expected an int >= 1, got 'many'",
        ),
        (("no/such.toml",), "config no/such.toml: cannot be read: "),
        (("no/such/checkpoint",), "recipe: 'no/such/checkpoint' is unknown"),
        (("bad.json",), "config bad.json: heads: expected an int >= 1, got '4'"),
        (("bad.safetensors",), "checkpoint bad.safetensors: cannot be read: "),
    ],
)
def test_what_cannot_be_shown_gets_one_line(run, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    bad = json.loads(config("lstm-tiny").to_json()) | {"heads": "4"}
    Path("bad.json").write_text(json.dumps(bad))
    Path("bad.safetensors").write_bytes(b"no")
    code, out, err = run("show", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


# --- docs/choosing.md -----------------------------------------------------------------------------

GUIDE = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text()
STATES = re.findall(r"^\|.*\| `(\S+)` \|.*\| (\S+ \w?B) \| (\S+ \w?B) \|$", GUIDE, re.MULTILINE)


@pytest.mark.parametrize(("name", "short", "long"), STATES)
def test_the_guide_s_states_are_those_of_the_recipes(name: str, short: str, long: str) -> None:
    sizes = [describe.state_bytes(config(f"{name}-340m"), n) for n in (4096, 131_072)]
    assert [describe.human(size, "B") for size in sizes] == [short, long]


@pytest.mark.usefixtures("_own_names")
@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
def test_the_guide_s_examples_run(example: str) -> None:
    exec(compile(example, "choosing.md", "exec"), {})


def test_the_guide_s_file_and_commands_are_taken(run, tmp_path) -> None:
    pytest.importorskip("tomllib")
    file = tmp_path / "mine.toml"
    file.write_text(re.search(r"```toml\n(.*?)```", GUIDE, re.DOTALL)[1])
    assert run("show", file)[0] == 0
    commands = [
        shlex.split(line) for line in re.findall(r"^    atlas-blocks (show .*)", GUIDE, re.M)
    ]
    assert len(commands) == 3
    for command in commands:
        assert run(*command[: command.index(">") if ">" in command else None])[0] == 0
