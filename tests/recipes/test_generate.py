"""Generation: prompts read once and in pieces, rows that do not depend on each other, choices."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_blocks import AtlasBlockConfig, Config, DeepTransformerConfig, State
from atlas_blocks.recipes import (
    LanguageModelConfig,
    build,
    checkpoint,
    config,
    describe,
    generate,
    names,
    prefill,
    stream,
)
from atlas_blocks.recipes import rows as rows_module
from atlas_blocks.recipes.generate import ENDED
from atlas_blocks.recipes.rows import TILE, Rows, TiledProducts, tiled_shapes
from atlas_blocks.recipes.sampling import Continuation, Sampling, choose

NAMES = ["atlas-tiny", "deltanet-tiny", "atlas-mag-tiny", "atlas-mac-tiny", "transformer-tiny"]


def tiny(name: str, **changes):
    torch.manual_seed(0)
    return build(name, **changes)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [tokens(n, seed=n) for n in lengths]


# --- reading ----------------------------------------------------------------------------------


def test_generation_depends_on_the_seed_alone():
    model, prompt = tiny("transformer-tiny"), tokens(3, 5)
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    first = generate(model, prompt, seed=1, **options)
    assert first.shape == (3, 11)
    assert torch.equal(first, generate(model, prompt, seed=1, **options))
    assert not torch.equal(first, generate(model, prompt, seed=2, **options))


def test_generation_reads_the_prompt_once():
    model, lengths = tiny("transformer-tiny"), []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    list(stream(model, tokens(1, 9), max_new_tokens=4))
    assert lengths == [9, 1, 1, 1]


def test_a_long_prompt_is_read_in_pieces():
    model, lengths = tiny("linear-attention-tiny", depth=1), []
    hook = lambda _, arguments: lengths.append(arguments[0].shape[1])  # noqa: E731
    model.register_forward_pre_hook(hook)
    list(stream(model, tokens(1, 5000), max_new_tokens=2))
    assert lengths == [2048, 2048, 904, 1]
    lengths.clear()
    prefill(model, prompts(3, 25), piece=10)  # 5 of each, then those of the longer alone
    assert lengths == [8, 10, 10]


@pytest.mark.parametrize("name", ["atlas-mag-tiny", "atlas-mac-tiny", "transformer-tiny"])
def test_pieces_and_a_state_given_change_nothing(name):
    model, text = tiny(name).double(), tokens(2, 75)
    with torch.no_grad():
        whole = model(text)
    logits, _ = prefill(model, text, piece=7)
    torch.testing.assert_close(logits, whole.logits[:, -1], atol=1e-6, rtol=1e-6)
    options = {"max_new_tokens": 6, "temperature": 0.8, "seed": 3}
    true = generate(model, text, **options)
    _, half = prefill(model, text[:, :40])
    before = [t.clone() for t in half.tensors()]
    for _ in range(2):
        rest = generate(model, text[:, 40:], state=half, piece=9, **options)
        assert torch.equal(rest, true[:, 40:])
    assert all(map(torch.equal, half.tensors(), before))
    # And on from where a continuation ended: all but its last token have been read.
    following = generate(model, rest[:, -1:], state=prefill(model, true[:, :-1])[1], **options)
    assert torch.equal(following, generate(model, true, **options)[:, -7:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [2048, 12])
def test_prompts_of_unequal_length_give_what_each_gives_alone(name, piece):
    model, texts = tiny(name, depth=1).double(), prompts(9, 3, 41, 40, 1)
    options = {"max_new_tokens": 35, "temperature": 0.7, "top_p": 0.9}
    together = generate(model, texts, seed=5, piece=piece, **options)
    for i, (text, row) in enumerate(zip(texts, together, strict=True)):
        alone = generate(model, text[None], seed=5 + i, **options)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert (row[len(alone) :] == ENDED).all()


def test_unequal_prompts_after_a_state():
    model, texts = tiny("atlas-mag-tiny", depth=1).double(), prompts(30, 5)
    _, before = prefill(model, texts)
    rest = [tokens(n, seed=99) for n in (4, 20)]
    found, _ = prefill(model, rest, before)
    whole, _ = prefill(model, [torch.cat(pair) for pair in zip(texts, rest, strict=True)])
    torch.testing.assert_close(found, whole, atol=1e-8, rtol=1e-8)


# --- rows -------------------------------------------------------------------------------------


FIXED = [n for n in names() if n.endswith("-tiny") and not describe.state_grows(config(n))]
WIDE = ["atlas-170m", "gated-deltanet-170m"]
QUICK = ["atlas-tiny", "deltanet-tiny"]


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in (*FIXED, *WIDE)],
)
def test_a_rows_numbers_do_not_depend_on_the_others(name):
    """To the last bit: alone, among rows at the same place, and where others join and leave."""
    model = tiny(name, layers=tuple(dict.fromkeys(config(name).layers)))
    count = 12 if name in WIDE else 40
    states = [prefill(model, text[None])[1] for text in prompts(7, 7, 7, 30, 3, 33, 64, 5, 8)]
    alone = []
    for state in states:
        batch = Rows(model)
        batch.join([state])
        alone.append([batch.step([i])[0] for i in range(count)])
    batch, there, at = Rows(model), [0, 1, 2], [0] * len(states)
    batch.join(states[:3])
    for step in range(count):
        if 3 <= step < len(states):
            batch.join([states[step]])
            there.append(step)
        if step % 4 == 3 and len(there) > 2:
            gone = step % len(there)
            there.pop(gone)
            batch.keep([i for i in range(len(batch)) if i != gone])
        logits = batch.step([at[row] for row in there])
        for row, found in zip(there, logits, strict=True):
            if name == "tnt-tiny":  # its chunk is done again, in products of all rows alike
                torch.testing.assert_close(found, alone[row][at[row]], rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(found, alone[row][at[row]])
            at[row] += 1
    assert max(at) > count - 10


def test_products_that_differ_by_the_size_of_a_batch_are_taken_in_tiles(monkeypatch):
    """MKL's do with AVX-512, from a width of 128 on: here a product of more rows than a tile has is
    made to."""
    true, rows = F.linear, []

    def linear(x, weight, bias=None):
        if has_torch_function((x, weight)):  # in a mode, as torch's own asks it
            return handle_torch_function(linear, (x, weight), x, weight, bias)
        rows.append(len(x))
        y = true(x, weight, bias)
        return y + 1e-6 if len(x) > TILE and weight.shape[1] == 168 else y

    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(rows_module, "differ", rows_module.differ.__wrapped__)  # nothing kept
    model = nn.Sequential(nn.Linear(8, 168), nn.Linear(168, 8, bias=False))
    unwritten = nn.Linear(168, 8, bias=False)
    nn.init.zeros_(unwritten.weight)
    assert tiled_shapes(unwritten, 3 * TILE) == {unwritten.weight.shape}
    assert tiled_shapes(model, 3 * TILE) == {model[1].weight.shape}
    assert tiled_shapes(model, TILE) == set()
    x = torch.randn(3 * TILE, 1, 8)
    whole, shapes = model(x), tiled_shapes(model, 3 * TILE)
    rows.clear()
    with TiledProducts(shapes):
        tiled = model(x)
    assert rows == [3 * TILE, TILE, TILE, TILE]
    assert torch.equal(tiled, torch.cat([model(part) for part in x.split(TILE)]))
    assert not torch.equal(tiled, whole)


def test_tiles_take_every_form_of_a_product():
    weight, other, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(5)
    x, seen = torch.randn(3 * TILE, 2, 8), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.append(len(args[-2]))
            return func(*args, **(kwargs or {}))

    forms = {
        "linear": lambda w: F.linear(x, w),
        "bias": lambda w: F.linear(x, w, bias=bias if w is weight else None),
        "operator": lambda w: x @ w.mT,
        "matmul": lambda w: torch.matmul(x, w.mT),
    }
    for name, form in forms.items():
        for w, sizes in ((weight, 3 * [2 * TILE]), (other, [6 * TILE])):
            seen.clear()
            with Products(), TiledProducts({weight.shape}):
                y = form(w)
            assert seen == sizes, name
            torch.testing.assert_close(y, form(w))


@pytest.mark.parametrize("name", NAMES)
def test_rows_go_on_as_the_model_does(name):
    """One token for each row, at places of their own, gives what the whole text gives."""
    model, texts = tiny(name, depth=1).double(), prompts(7, 16, 30, 64)
    batch, more = Rows(model), tokens(4, 40)
    batch.join([prefill(model, text[None])[1] for text in texts])
    for i in range(more.shape[1]):
        found = batch.step(more[:, i].tolist())
    for text, rest, row in zip(texts, more, found, strict=True):
        with torch.no_grad():
            true = model(torch.cat([text, rest])[None]).logits[0, -1]
        torch.testing.assert_close(row, true, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("name", "more"), [("deltanet-tiny", 0), ("transformer-tiny", TILE)])
def test_rows_hold_what_they_need_and_no_more(name, more):
    """Beside those of an attention that all stand at one position there is one that does not."""
    model = tiny(name, depth=1)
    state = prefill(model, tokens(1, 5))[1]
    batch = Rows(model)
    batch.join([state] * 5)
    assert (len(batch), len(batch._state)) == (5, 2 * TILE)
    batch.join([state] * 3)
    assert (len(batch), len(batch._state)) == (8, 2 * TILE + more)
    batch.keep([0, 4])
    assert (len(batch), len(batch._state)) == (2, TILE)
    batch.keep([])
    assert (len(batch), batch._state) == (0, None)


class Counted(State):
    """Somebody's own: as many kept as the position says."""

    kept: Tensor
    position: Tensor


class Counting(nn.Module):
    state_type = Counted

    def forward(self, x, state=None):
        none = Counted(x[:, :0].sum(-1), x.new_zeros(len(x), dtype=torch.int64))
        state = none if state is None else state
        assert bool((state.position == state.kept.shape[1]).all())
        kept = torch.cat([state.kept, x.sum(-1)], 1)
        return x, Counted(kept, state.position + x.shape[1])


@dataclasses.dataclass(frozen=True)
class CountingConfig(Config):
    def build(self, dim, heads):
        return Counting()


def test_a_state_of_somebody_s_is_copied_as_it_is():
    """Its position was moved on by one in the copies that fill a batch up."""
    layers = AtlasBlockConfig(CountingConfig())
    model = LanguageModelConfig("own", 256, 32, 2, layers=layers).build()
    batch = Rows(model)
    batch.join([prefill(model, tokens(1, 5))[1]] * 5)
    for _ in range(3):
        found = batch.step(5 * [7])
    with torch.no_grad():
        true = model(torch.cat([tokens(1, 5), torch.full((1, 3), 7)], 1)).logits[:, -1]
    torch.testing.assert_close(found, true.expand(5, -1))


def growing(kind: str):
    torch.manual_seed(0)
    if kind == "attention":
        return build("transformer-tiny", depth=1).double()
    block = AtlasBlockConfig(DeepTransformerConfig(objective="l2", window=3, chunk_size=8))
    return LanguageModelConfig("deep", 256, 32, 2, layers=block).build().double()


@pytest.mark.parametrize("kind", ["attention", "phi*"])
def test_keys_of_a_row_that_left_are_not_kept(kind):
    model, (long, short) = growing(kind), prompts(90, 7)
    states = [prefill(model, text[None])[1] for text in (long, short)]
    batch, more = Rows(model), tokens(30)
    batch.join(states)
    sizes, found = [], []
    for i, token in enumerate(more.tolist()):
        if i == 10:
            batch.keep([1])
        found.append(batch.step([token] * len(batch))[-1])
        sizes.append(batch._state.nbytes)
    assert sizes[10] < sizes[9] / 2
    with torch.no_grad():
        true = model(torch.cat([short, more])[None]).logits[0, len(short) :]
    torch.testing.assert_close(torch.stack(found), true, atol=1e-8, rtol=1e-8)


# --- choices ----------------------------------------------------------------------------------


def continuation(prompt=(), vocab=4, **settings) -> Continuation:
    return Continuation(Sampling(**settings), list(prompt), vocab)


class Drawn(Continuation):
    """One that draws this number."""

    def __init__(self, number: float, **settings) -> None:
        super().__init__(Sampling(**settings), [], 4)
        self.number = number

    def draw(self) -> float:
        return self.number


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [500, 300, 150, 50]),
        ({"temperature": 0.5}, [685, 247, 62, 7]),  # squares
        ({"top_p": 0.7}, [625, 375, 0, 0]),
        ({"top_p": 0.0}, [1000, 0, 0, 0]),
        ({"temperature": 0.0}, [1000, 0, 0, 0]),
        ({"temperature": 1e-300}, [1000, 0, 0, 0]),
        ({"temperature": 2e-5}, [1000, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(settings, expected):
    logits = torch.tensor([[0.05, 0.3, 0.5, 0.15]]).log().expand(1000, 4)
    numbers = [(i + 0.5) / 1000 for i in range(1000)]
    found = choose(logits, [Drawn(number, **settings) for number in numbers])
    counts = [found.count(token) for token in (2, 1, 3, 0)]
    assert all(abs(a - b) <= 1 for a, b in zip(counts, expected, strict=True)), counts


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_a_token_without_a_probability_is_never_drawn(number, top_p):
    logits = torch.tensor([[-200.0, 0.0, 1.0, -200.0]])
    assert choose(logits, [Drawn(number, top_p=top_p)])[0] in (1, 2)


def test_a_rows_choice_does_not_depend_on_the_others():
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 3

    def rows() -> list[Continuation]:
        return [
            continuation(
                range(i),
                300,
                temperature=(0, 0.7, 1.3)[i % 3],
                top_p=(1, 0.9)[i % 2],
                repetition_penalty=(1, 1.5)[i % 5 == 0],
                seed=i,
            )
            for i in range(40)
        ]

    together = choose(logits, rows())
    assert together == [choose(logits[[i]], [row])[0] for i, row in enumerate(rows())]
    backwards = choose(logits.flip(0), rows()[::-1])
    assert together == backwards[::-1]


def test_repeated_tokens_are_penalised():
    row = continuation([2, 2, 0], temperature=0, repetition_penalty=2.0)
    logits = torch.tensor([[3.0, 1.6, 2.9, -1.0]])
    assert choose(logits, [row]) == [1]
    row.take(1)  # 1.5, 0.8, 1.45, -1
    assert choose(logits, [row]) == [0]
    # What is unlikely already becomes more so.
    below = torch.tensor([[-1.0, -1.1, -1.2, -1.9]])
    assert choose(below, [row]) == [3]


def test_a_penalty_keeps_a_model_from_repeating_itself():
    model, prompt = tiny("deltanet-tiny", depth=1), tokens(2, 4)
    options = {"max_new_tokens": 30, "temperature": 0}
    found = generate(model, prompt, repetition_penalty=100.0, **options)
    plain = generate(model, prompt, **options)
    assert len(set(plain[0].tolist())) < 34
    for row, start in zip(found, prompt, strict=True):
        new = row[4:].tolist()
        assert len(set(new)) == 30
        assert not set(new) & set(start.tolist())


def test_stop_ids_end_their_row_alone():
    model, texts = tiny("deltanet-tiny", depth=1), prompts(4, 6, 9)
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    plain = generate(model, texts, **options)
    stop = int(plain[1, 6 + 5])
    found = generate(model, texts, stop_ids=[stop], **options)
    for text, row, before in zip(texts, found, plain, strict=True):
        new, true = row[len(text) :].tolist(), before[len(text) :].tolist()
        length = true.index(stop) + 1 if stop in true else 20
        assert new[:length] == true[:length]
        assert set(new[length:]) <= {ENDED}


def test_a_caller_may_end_a_row():
    model, texts = tiny("deltanet-tiny", depth=1), prompts(4, 6)
    options = {"max_new_tokens": 8, "temperature": 1.0}
    plain = torch.stack(list(stream(model, texts, **options)))
    counts = [0, 0]

    def stopped(row: int, token: int) -> bool:
        counts[row] += 1
        return row == 0 and counts[0] == 3

    found = torch.stack(list(stream(model, texts, stopped=stopped, **options)))
    assert torch.equal(found[:, 1], plain[:, 1])
    assert torch.equal(found[:3, 0], plain[:3, 0])
    assert (found[3:, 0] == ENDED).all()
    assert counts == [3, 8]


def test_every_row_has_its_seed():
    model, text = tiny("deltanet-tiny", depth=1), tokens(1, 4)
    options = {"max_new_tokens": 12, "temperature": 1.0}
    found = generate(model, text.expand(3, -1), seed=[8, 5, 8], **options)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], generate(model, text, seed=5, **options)[0])
    assert not torch.equal(found[0], found[1])


# --- bad arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "word"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "prompt"),
        (torch.zeros(4, dtype=torch.int64), {}, "prompt"),
        (torch.full((1, 2), 256), {}, "prompt"),
        ([torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)], {}, "prompt"),
        ([[1, 2]], {}, "prompt"),
        ([], {}, "prompt"),
        ("text", {}, "prompt"),
        (torch.zeros(1, 1, dtype=torch.int64), {"piece": 0}, "piece"),
        (torch.zeros(1, 1, dtype=torch.int64), {"state": "no"}, "state"),
        (torch.zeros(1, 1, dtype=torch.int64), {"temperature": -1.0}, "temperature"),
        (torch.zeros(1, 1, dtype=torch.int64), {"top_p": 1.5}, "top_p"),
        (torch.zeros(1, 1, dtype=torch.int64), {"max_new_tokens": -1}, "max_new_tokens"),
        (torch.zeros(1, 1, dtype=torch.int64), {"repetition_penalty": 0.0}, "repetition_penalty"),
        (torch.zeros(1, 1, dtype=torch.int64), {"stop_ids": [-1]}, "stop_ids"),
        (torch.zeros(1, 1, dtype=torch.int64), {"seed": [1, 2]}, "seed"),
        (torch.zeros(1, 1, dtype=torch.int64), {"seed": -1}, "seed"),
    ],
)
def test_bad_generation_arguments_are_named(prompt, options, word):
    options = {"max_new_tokens": 1, **options}
    with pytest.raises(ValueError, match=word):
        generate(tiny("transformer-tiny"), prompt, **options)
    # At once, not at the first token.
    with pytest.raises(ValueError, match=word):
        stream(tiny("transformer-tiny"), prompt, **options)


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(place, tiny("deltanet-tiny", depth=1))
    return place


def test_the_command_continues_every_prompt(run, saved):
    prompts = ("--prompt", "ab", "--prompt", "a longer é")
    code, out, _ = run("generate", saved, *prompts, "--tokens", 9, "--seed", 3, "--batch", 2)
    assert code == 0
    parts = out.split("--- ")[1:]
    assert len(parts) == 4
    for number, part in enumerate(parts):
        text = ("ab", "a longer é")[number // 2]
        alone = run("generate", saved, "--prompt", text, "--tokens", 9, "--seed", 3 + number)[1]
        assert part == f"{number + 1} ---\n{alone}"
        assert alone.startswith(text)


def test_the_command_ends_at_a_stop(run, saved):
    command = ("generate", saved, "--prompt", "a", "--tokens", 40)
    plain = run(*command)[1]
    new = plain[1:-1]
    at = next(i for i in range(5, len(new)) if new[i].isascii() and new.index(new[i]) == i)
    assert run(*command, "--stop", new[at])[1] == f"a{new[:at]}\n"
    assert run(*command, "--stop-id", ord(new[at]))[1] == f"a{new[:at]}\n"
    assert run(*command, "--repetition-penalty", 5.0)[1] != plain


@pytest.mark.parametrize(
    ("option", "value"),
    [("--stop", ""), ("--repetition-penalty", 0), ("--prompt", ""), ("--tokens", -1)],
)
def test_the_command_names_what_is_wrong(run, saved, option, value):
    code, _, err = run("generate", saved, option, value)
    assert code == 2
    assert option.strip("-").replace("tokens", "max_new_tokens").replace("-", "_") in err
