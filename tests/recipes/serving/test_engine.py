"""Every sequence gets what it would get alone, whoever joins and leaves beside it."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from atlas_blocks.recipes import build, generate
from atlas_blocks.recipes.sampling import LENGTH, STOP, Sampling
from atlas_blocks.recipes.serving.engine import Engine, Job

NAME = "atlas-mag-tiny"
PIECE = 32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(NAME, depth=1)


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(256) for _ in range(length)]


@dataclass
class Heard:
    """A listener that ends a sequence at its `limit`-th token."""

    limit: int = 10**6
    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    cached: int | None = None
    errors: list[str | None] = field(default_factory=list)

    def read(self, cached):
        self.cached = cached

    def token(self, index, token):
        assert not self.errors
        assert index not in self.reasons
        self.tokens.setdefault(index, []).append(token)
        return len(self.tokens[index]) >= self.limit

    def ended(self, index, reason):
        assert index not in self.reasons
        self.reasons[index] = reason

    def closed(self, error):
        self.errors.append(error)


def job(length: int, *samplings: Sampling, seed: int = 0, **options) -> Job:
    return Job(prompt(length, seed or length), samplings, Heard(), **options)


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def alone(model, one: Job, index: int = 0) -> list[int]:
    """By `generate`, without a stop id at its end."""
    s = one.samplings[index]
    row = generate(
        model,
        torch.tensor([one.tokens]),
        max_new_tokens=s.max_new_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        repetition_penalty=s.repetition_penalty,
        seed=s.seed,
        stop_ids=s.stop_ids,
        piece=PIECE,
    )[0, len(one.tokens) :].tolist()
    return row[:-1] if row and row[-1] in s.stop_ids else row


def settings(number: int, **changes) -> Sampling:
    """Greedy, sampled, narrowed, penalised in turn."""
    found = {
        "max_new_tokens": 5 + 7 * number % 30,
        "temperature": (0.0, 0.9)[number % 2],
        "top_p": (1.0, 0.8)[number % 3 == 0],
        "repetition_penalty": (1.0, 1.3)[number % 5 == 0],
        "seed": number,
        **changes,
    }
    return Sampling(**found)


def test_who_is_beside_a_sequence_changes_nothing(model):
    engine, generator = (
        Engine(model, max_batch=9, piece=PIECE, prefix_cache=2**20),
        random.Random(0),
    )
    jobs = [
        job(
            generator.randrange(1, 90),
            *(settings(5 * i + j) for j in range(1 + (i % 4 == 0))),
            seed=i,
        )
        for i in range(1, 24)
    ]
    cut = set(jobs[::2])
    waiting = list(jobs)
    while engine.step() or waiting:
        if waiting and generator.random() < 0.5:
            engine.submit(waiting.pop(0))
        if generator.random() < 0.1 and cut - set(waiting):
            gone = sorted(cut - set(waiting), key=jobs.index)[0]
            cut.discard(gone)
            engine.cancel(gone)
    for one in jobs:
        heard = one.listener
        assert heard.errors == [None]
        for i in range(len(one.samplings)):
            true, found = alone(model, one, i), heard.tokens.get(i, [])
            assert found == true[: len(found)]
            if i in heard.reasons:
                assert found == true
    assert sum(len(one.listener.reasons) == len(one.samplings) for one in jobs) >= 12
    assert any(not one.listener.reasons for one in jobs)
    assert (len(engine.sequences), len(engine.waiting), len(engine.reading)) == (0, 0, 0)


def test_sequences_of_one_prompt_read_it_once(model):
    engine, lengths = Engine(model, piece=PIECE), []
    hook = model.register_forward_pre_hook(lambda _, given: lengths.append(given[0].numel()))
    one = job(40, *(settings(i, temperature=1.0, max_new_tokens=3) for i in range(5)))
    engine.submit(one)
    finish(engine)
    hook.remove()
    assert lengths[:2] == [32, 8]
    assert all(n <= 8 for n in lengths[2:])
    for i in range(5):
        assert one.listener.tokens[i] == alone(model, one, i)


@pytest.mark.parametrize(("first", "second", "shared"), [(80, 80, 80), (80, 70, 64), (40, 20, 0)])
def test_what_prompts_share_is_read_once(model, first, second, shared):
    engine = Engine(model, piece=PIECE, prefix_cache=2**20)
    for length, cached in ((first, 0), (second, shared)):
        one = Job(prompt(100, 5)[:length], [settings(1)], Heard())
        engine.submit(one)
        finish(engine)
        assert one.listener.cached == cached
        assert one.listener.tokens[0] == alone(model, one)


def test_the_prefix_cache_keeps_to_its_limit(model):
    engine = Engine(model, piece=PIECE, prefix_cache=400_000)
    for seed in range(1, 9):
        engine.submit(job(70, settings(1, max_new_tokens=1), seed=seed))
        finish(engine)
        assert 0 < engine.prefixes.nbytes <= 400_000
    again = job(70, settings(1, max_new_tokens=1), seed=8)
    engine.submit(again)
    finish(engine)
    assert again.listener.cached == 70


def test_nothing_waits_for_a_long_prompt(model):
    engine = Engine(model, piece=PIECE)
    short, long = job(3, settings(0, max_new_tokens=100)), job(20 * PIECE, settings(0), seed=2)
    engine.submit(short)
    engine.step()
    engine.submit(long)
    pieces = 0
    while long.at < len(long.tokens):
        before = (long.at, len(short.listener.tokens[0]))
        engine.step()
        assert long.at - before[0] == PIECE
        assert len(short.listener.tokens[0]) == before[1] + 1
        pieces += 1
        if pieces == 3:
            # Nor does another prompt wait until it is read.
            other = job(5, settings(0), seed=3)
            engine.submit(other)
            engine.step()
            engine.step()
            assert other.listener.tokens[0]
    engine.cancel(long)
    finish(engine)


def test_nobody_is_overtaken_and_the_batch_keeps_to_its_size(model):
    engine = Engine(model, max_batch=4, piece=PIECE)
    jobs = [
        job(3 + i, *(settings(j, max_new_tokens=6) for j in range(n)), seed=i + 1)
        for i, n in enumerate((2, 1, 4, 1, 3))
    ]
    for one in jobs:
        engine.submit(one)
    while engine.step():
        assert len(engine.sequences) <= 4
        begun = [bool(one.listener.tokens) for one in jobs]
        assert begun == sorted(begun, reverse=True)
    with pytest.raises(ValueError, match="n: expected at most 4"):
        engine.submit(job(3, *5 * [settings(0)]))


def test_sequences_end_as_asked(model):
    engine = Engine(model, piece=PIECE)
    plain = job(9, settings(1, max_new_tokens=12))
    engine.submit(plain)
    finish(engine)
    tokens = plain.listener.tokens[0]
    assert (len(tokens), plain.listener.reasons) == (12, {0: LENGTH})
    stop = job(9, settings(1, max_new_tokens=12, stop_ids=(tokens[4],)))
    told, none = job(9, settings(1, max_new_tokens=12)), job(9, settings(1, max_new_tokens=0))
    told.listener.limit = 7
    for one in (stop, told, none):
        engine.submit(one)
    finish(engine)
    assert (stop.listener.tokens[0], stop.listener.reasons) == (
        tokens[: tokens.index(tokens[4])],
        {0: STOP},
    )
    assert (told.listener.tokens[0], told.listener.reasons) == (tokens[:7], {0: STOP})
    assert (none.listener.tokens, none.listener.reasons) == ({}, {0: LENGTH})
    assert [one.listener.errors for one in (stop, told, none)] == [[None]] * 3


@pytest.mark.parametrize("count", [0, 1, 6])
def test_a_kept_state_goes_on_where_its_sequence_ended(model, count):
    engine, kept = Engine(model, piece=PIECE), []
    first = job(9, settings(2, max_new_tokens=count), keep=lambda *found: kept.append(found))
    whole = job(9, settings(2, max_new_tokens=count + 5))
    engine.submit(first)
    engine.submit(whole)
    engine.submit(job(30, settings(3)))
    finish(engine)
    ((state, last, had),) = kept
    assert had == count
    unread = [whole.listener.tokens[0][0]] if last is None else [last]
    rest = Job(unread, [settings(2, max_new_tokens=5)], Heard(), state=state)
    engine.submit(rest)
    finish(engine)
    assert (
        rest.listener.tokens[0][: 5 - (last is None)]
        == whole.listener.tokens[0][-5 + (last is None) :]
    )


def test_a_failure_is_told_and_the_engine_goes_on(model, monkeypatch, caplog):
    engine = Engine(model, piece=PIECE)
    going, reading = job(5, settings(0, max_new_tokens=50)), job(6, settings(0), seed=2)
    engine.submit(going)
    engine.step()

    def fails(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", fails)
        engine.submit(reading)
        engine.step()
    for one in (going, reading):
        assert one.listener.errors == ["RuntimeError: out of memory"]
        assert not one.listener.reasons
    after = job(7, settings(0))
    engine.submit(after)
    finish(engine)
    assert after.listener.tokens[0] == alone(model, after)


def test_a_listener_that_fails_ends_no_more_than_what_was_going_on(model, monkeypatch, caplog):
    engine = Engine(model, piece=PIECE)
    bad, beside = (job(5, settings(0, max_new_tokens=50), seed=i) for i in (1, 2))
    for one in (bad, beside):
        engine.submit(one)
    engine.step()
    monkeypatch.setattr(bad.listener, "token", lambda *told: 1 / 0)
    finish(engine)
    for one in (bad, beside):
        assert one.listener.errors == ["ZeroDivisionError: division by zero"]
    after = job(7, settings(0))
    engine.submit(after)
    finish(engine)
    assert after.listener.tokens[0] == alone(model, after)


def test_a_state_that_cannot_be_kept_is_an_error(model):
    def full(*arguments):
        raise OSError("no space left on device")

    engine = Engine(model, piece=PIECE)
    one = job(5, settings(0, max_new_tokens=2), keep=full)
    engine.submit(one)
    finish(engine)
    assert one.listener.errors == ["no space left on device"]
