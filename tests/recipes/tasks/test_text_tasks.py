"""Tasks in text: solved by a reader of their sentences, at any length, and drawn evenly."""

import collections
import dataclasses
import random
import re
import tracemalloc

import numpy as np
import pytest
from marks import slow_as_it_is

from atlas_blocks.recipes import tasks
from atlas_blocks.recipes.data import Tokenizer, train_tokenizer
from atlas_blocks.recipes.tasks import BabiTask, NeedleTask, Prose, draws_of, niah, prose, world

BYTES = Tokenizer()
NAMES = [name for name, task in tasks.TASKS.items() if isinstance(task, tasks.TextTask)]
QUIET = Prose.of(
    "quiet",
    "The old wall keeps its stones very quietly.\n\n"
    "Nobody counts them at all in the long dark winters.",
)


def text_of(question, coder=BYTES):
    return coder.decode(np.concatenate(list(question.tokens())).tolist()).decode()


@pytest.mark.parametrize("name", [slow_as_it_is(n) if n == "babi-qa5" else n for n in NAMES])
def test_a_prompt_has_the_length_and_the_answer(name):
    for length in (2048, 5001):
        task = tasks.task(name, length=length)
        found = task.question(BYTES, draws_of(name, 0))
        prompt = text_of(found)
        size = len(prompt.encode())
        assert len(found) == size <= length - task.new_tokens
        again = task.question(BYTES, draws_of(name, 0))
        assert (text_of(again), again.answers) == (prompt, found.answers)
        assert text_of(task.question(BYTES, draws_of(name, 1))) != prompt
        assert task.score(found, found.continuation) == 1
        assert task.finished(found, found.continuation)
        assert task.score(found, "Nothing.") == 0
        assert prompt.count(found.asked) == 1
        if name.startswith("babi"):
            assert size == length - task.new_tokens
        else:
            # Not a sentence or a line more would have had room.
            assert size > length - task.new_tokens - 1600
            assert all(answer in prompt for answer in found.answers)
    with pytest.raises(ValueError, match="length: expected"):
        tasks.task(name, length=100).question(BYTES, random.Random(0))


@pytest.mark.parametrize("name", NAMES)
def test_every_sample_of_the_curriculum_has_room(name):
    for number, task in enumerate(tasks.task(name).curriculum()):
        for seed in range(200 if number == 0 else 20):
            assert len(task.question(BYTES, draws_of(seed))) <= task.length - task.new_tokens


def test_another_tokenizer_counts_its_own_tokens():
    coder = train_tokenizer([[s] for s in prose.reference().sentences[:200]], 400)
    for name in ("niah-1", "niah-3", "babi-qa3"):
        found = tasks.task(name, length=2000).question(coder, draws_of(0))
        tokens = np.concatenate(list(found.tokens(piece=7)))
        assert len(tokens) == len(found) <= 2000
        assert found.asked in text_of(found, coder)


def test_ten_million_tokens_are_never_whole_in_memory():
    for name in ("niah-1", "niah-2", "babi-qa2"):
        tasks.task(name, length=4096).question(BYTES, random.Random(0))
        tracemalloc.start()
        found = tasks.task(name, length=10_000_000).question(BYTES, random.Random(0))
        count = sum(len(piece) for piece in found.tokens())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 9_997_000 < count == len(found) <= 10_000_000
        assert peak < 5_000_000


# --- needles --------------------------------------------------------------------------------------


def needles(text):
    return re.findall(r"The secret (?:number|uuid) of ([\w' -]+) is ([\w-]+)\.", text)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("niah")])
def test_needles_are_found_by_reading(name):
    task = tasks.task(name, length=4096)
    for seed in range(20):
        found = task.question(BYTES, draws_of(seed))
        bound = needles(text_of(found))
        assert len(bound) == task.keys * task.values
        assert len({key for key, _ in bound}) == task.keys
        key = re.search(r"secret \w+ of (.+) in the text", found.asked)[1]
        assert sorted(v for k, v in bound if k == key) == sorted(found.answers)
        adjective = key.split("-")[0]
        assert any(word.startswith(adjective) for word in niah.adjectives())
        form = (
            r"[1-9]\d{6}"
            if task.value == "number"
            else r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}"
        )
        assert all(re.fullmatch(form, v) for v in found.answers)


def test_needles_lie_evenly_before_the_lines_of_the_repeated_sentences():
    task, places = NeedleTask(length=2048), collections.Counter()
    for seed in range(2000):
        lines = text_of(task.question(BYTES, draws_of(seed))).split("\n")
        place = next(i for i, line in enumerate(lines) if needles(line))
        hay = [line for line in lines if line == niah.REPEATED.strip()]
        assert len(lines) == len(hay) + 3
        places[place - 1] += 1
    assert sorted(places) == list(range(len(hay)))
    share = [n / 2000 * len(hay) for n in places.values()]
    assert min(share) > 0.7
    assert max(share) < 1.3


def test_needles_lie_at_rulers_forty_depths():
    assert tuple(np.round(np.linspace(0, 100, 40)).astype(int).tolist()) == niah.DEPTHS
    task, depths = NeedleTask(length=60_000, haystack="prose", prose=QUIET), collections.Counter()
    for seed in range(1000):
        found = task.question(BYTES, draws_of(seed))
        stretches = [p for p in found.parts if isinstance(p, prose.Stretch)]
        # Of the first and the last depth there is one alone.
        if len(stretches) == 2:
            before, after = map(len, stretches)
            depths[round(100 * before / (before + after))] += 1
    assert set(depths) <= set(niah.DEPTHS)
    assert len(depths) == 38
    assert 900 < sum(depths.values()) < 990


def test_the_words_are_those_of_wonderwords_as_ruler_has_them():
    wonderwords = pytest.importorskip("wonderwords")
    lists = wonderwords.RandomWord()._categories
    assert set(niah.adjectives()) == set(lists["adjectives"])
    assert set(niah.nouns()) == set(lists["nouns"])


def test_needles_are_scored_as_by_lm_evaluation_harness():
    ruler = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    task = tasks.task("niah-multivalue", length=4096)
    found = task.question(BYTES, draws_of(0))
    for text in (
        "",
        f"{found.answers[0]}",
        f"x {found.answers[2]},{found.answers[1]}.",
        found.continuation,
    ):
        assert task.score(found, text) == ruler.string_match_all([text], [list(found.answers)])
    uuid = tasks.task("niah-3").question(BYTES, draws_of(0))
    assert tasks.task("niah-3").score(uuid, uuid.continuation.upper()) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_needles_are_drawn_as_by_lm_evaluation_harness(monkeypatch):
    """Its own RULER code, without the sentences that it would download."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    ruler = pytest.importorskip("lm_eval.tasks.ruler.prepare_niah")
    assert set(ruler.WORDS) == {f"{a}-{n}" for a in niah.adjectives() for n in niah.nouns()}
    assert tuple(ruler.DEPTHS) == niah.DEPTHS
    monkeypatch.setattr(ruler, "cached_sent_tokenize", str.split)
    random.seed(0)
    kinds = {"type_needle_k": "words", "template": "{context}|{type_needle_v}{query}"}
    for name, hay, value in (
        ("niah-1", "repeat", "numbers"),
        ("niah-2", "essay", "numbers"),
        ("niah-3", "essay", "uuids"),
        ("niah-multikey", "essay", "numbers"),
        ("niah-multivalue", "essay", "numbers"),
    ):
        task = tasks.task(name, length=3000)
        theirs, ours = collections.Counter(), collections.Counter()
        counts = {"num_needle_k": task.keys, "num_needle_v": task.values}
        for seed in range(300):
            found = task.question(BYTES, draws_of(seed))
            stretches = [p for p in found.parts[1:-1] if isinstance(p, prose.Stretch)]
            first, last = stretches[0].first, stretches[-1].last
            at = 0
            for part in found.parts[1:-1]:
                if isinstance(part, prose.Stretch):
                    at += len(part)
                else:
                    ours[round(20 * at / (last - first))] += 1
            text, answers, _ = ruler.generate_input_output(
                500,
                "line" if hay == "repeat" else ["line"] * 500,
                type_haystack=hay,
                type_needle_v=value,
                **kinds,
                **counts,
            )
            form = r"[1-9]\d{6}" if value == "numbers" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-\w{12}"
            assert all(re.fullmatch(form, a) for a in (*answers, *found.answers))
            assert len(answers) == len(found.answers)
            for m in re.finditer("One", text):
                theirs[round(20 * text[: m.start()].count("line") / 500)] += 1
        assert sum(theirs.values()) == sum(ours.values()) == 300 * task.keys * task.values
        total = sum(ours.values())
        for place in range(21):
            # Five deviations of a difference of two counts; lines are few, and so coarser.
            limit = 5 * (2 * total / 20) ** 0.5 + (0.05 * total if hay == "repeat" else 0)
            assert abs(theirs[place] - ours[place]) < limit, (name, place)


# --- worlds ---------------------------------------------------------------------------------------


GAVE = r"^(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.$"


def read(number, facts, question):
    """The answer by the sentences alone, read from the last to the first."""
    moved = r"^(\w+) (?:went to|moved to|walked to|travelled to) the (\w+)\.$"
    got = r"^(\w+) (?:took|got|picked up) the (\w+)\.$"
    left = r"^(\w+) (?:dropped|left|put down) the (\w+)\.$"

    def room(who, end):
        return next(m[2] for f in facts[end::-1] if (m := re.match(moved, f)) and m[1] == who)

    def trail(thing):
        holder, rooms = None, []
        for i, fact in enumerate(facts):
            if (m := re.match(got, fact)) and m[2] == thing:
                holder = m[1]
            if holder and (not rooms or rooms[-1] != room(holder, i)):
                rooms.append(room(holder, i))
            if (m := re.match(left, fact)) and m[2] == thing:
                holder = None
        return rooms

    words = question.rstrip("?").split()
    if number == 1:
        return room(words[-1], len(facts) - 1)
    if number == 2:
        return trail(words[-1])[-1]
    if number == 3:
        rooms = trail(words[3])
        assert rooms[-1] == words[-1]
        return rooms[-2]
    if number == 4:
        opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
        of = set()
        for fact in facts:
            a, way, b = re.match(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups()
            of |= {(a, way, b), (b, opposite[way], a)}
        if m := re.match(r"What is (\w+) of the (\w+)\?", question):
            (found,) = (a for a, way, b in of if (way, b) == m.groups())
        else:
            m = re.match(r"What is the (\w+) (\w+) of\?", question)
            (found,) = (b for a, way, b in of if (a, way) == m.groups())
        return found
    gifts = [m.groups() for f in reversed(facts) if (m := re.match(GAVE, f))]
    if m := re.match(r"What did (\w+) give to (\w+)\?", question):
        return next(t for a, t, b in gifts if (a, b) == m.groups())
    if m := re.match(r"Who received the (\w+)\?", question):
        return next(b for _, t, b in gifts if t == m[1])
    m = re.match(r"To whom did (\w+) give the (\w+)\?", question)
    return next(b for a, t, b in gifts if (a, t) == m.groups())


@pytest.mark.parametrize("number", [1, 2, 3, 4, slow_as_it_is(5)])
def test_a_reader_of_the_facts_answers(number):
    answers, kinds = collections.Counter(), collections.Counter()
    count = 1500
    labels = BabiTask(number=number).labels
    for seed in range(count):
        found = world.asked(number, draws_of(number, seed))
        assert read(number, found.facts, found.question) == found.answer
        assert found.answer in labels
        assert found.answer.lower() not in found.question.lower()
        answers[found.answer] += 1
        kinds[found.question.split()[0]] += 1
    if number < 5:
        # All rooms are as likely: to know them is no help.
        assert len(answers) == 6
        assert max(answers.values()) < count / 6 * 1.25
        assert min(answers.values()) > count / 6 * 0.75
    else:
        assert set(answers) == {*world.GIVERS, *world.THINGS}
        assert all(abs(n / count - 1 / 3) < 0.05 for n in kinds.values())
        things = [answers[t] for t in world.THINGS]
        assert max(things) < count / 9 * 1.3
        people = [answers[p] for p in world.GIVERS]
        assert max(people) < count / 6 * 1.2


def test_stories_go_on_by_the_rules():
    facts = [world.asked(1, draws_of(seed)).facts for seed in range(200)]
    assert {len(f) for f in facts} == {2, 4, 6, 8, 10}
    assert {len(world.asked(4, draws_of(seed)).facts) for seed in range(50)} == {2}
    assert min(len(world.asked(2, draws_of(seed)).facts) for seed in range(200)) >= 3
    # After the gift that is asked about at most five facts: none of its thing, nor a gift of the
    # same two people.
    later = []
    for seed in range(400):
        found = world.asked(5, draws_of(seed))
        gifts = [re.match(GAVE, fact) for fact in found.facts]
        words = [*found.question.rstrip("?").split(), found.answer]
        order = {"What": (2, 6, 5), "Who": (-2, -1), "To": (3, 6, 7)}[words[0]]
        named = [words[i] for i in order]  # giver, thing, receiver, or but the last two
        at = max(i for i, m in enumerate(gifts) if m and list(m.groups())[-len(order) :] == named)
        who, thing, to = gifts[at].groups()
        after = found.facts[at + 1 :]
        assert len(after) <= 5
        assert not any(thing in fact for fact in after)
        assert all((m[1], m[3]) != (who, to) for m in gifts[at + 1 :] if m)
        later.append(len(after))
    assert set(later) == {0, 1, 2, 3, 4, 5}
    assert abs(sum(later) / 400 - 2.5) < 0.4
    # Nobody takes what lies elsewhere, or gives what they have not.
    for seed in range(200):
        for number in (2, 5):
            holder, rooms = {}, {}
            for fact in world.asked(number, draws_of(number, seed)).facts:
                words = fact.rstrip(".").split()
                who, thing = words[0], next((w for w in words if w in world.THINGS), None)
                if thing is None:
                    assert rooms.get(who) != words[-1]
                    rooms[who] = words[-1]
                elif any(w in fact for w in ("gave", "handed", "passed")):
                    assert holder[thing] == who
                    assert rooms[who] == rooms[words[-1]]
                    holder[thing] = words[-1]
                elif any(w in fact for w in ("dropped", "left", "put")):
                    assert holder.pop(thing) == who
                else:
                    assert thing not in holder
                    holder[thing] = who


@pytest.mark.parametrize("number", [2, 3, slow_as_it_is(5)])
def test_kinds_of_facts_are_drawn_as_by_babi(number):
    """The kind is drawn first, and kept where anything of it is possible: moving is a third where
    something can be dropped, and half where something can be given and nothing got."""
    moves, count, forced = 0, 0, []
    for seed in range(1500):
        rooms, holder = {}, {}
        for fact in world.asked(number, draws_of("kinds", number, seed)).facts:
            words = fact.rstrip(".").split()
            who, thing = words[0], next((w for w in words if w in world.THINGS), None)
            near = [who for h in holder.values() for who in rooms if rooms[h] == rooms[who]]
            if number == 5 and len(holder) == 3:  # nothing can be got
                if len(near) == 3:  # nor given, as nobody is with somebody who holds
                    forced.append(thing is None)
                else:
                    moves, count = moves + (thing is None), count + 1
            elif number < 5 and holder:  # something can be dropped
                moves, count = moves + (thing is None), count + 1
            if thing is None:
                rooms[who] = words[-1]
            elif re.search("dropped|left|put", fact):
                del holder[thing]
            elif re.match(GAVE, fact):
                break  # what comes after a gift has to be unlike it
            else:
                holder[thing] = who
    assert count > 200
    assert abs(moves / count - (1 / 2 if number == 5 else 1 / 3)) < 0.05
    assert number != 5 or (len(forced) > 50 and all(forced))


def test_facts_keep_their_order_and_lie_evenly():
    task, tenths = BabiTask(length=8192, number=4, prose=QUIET), collections.Counter()
    last = 0
    for seed in range(1500):
        found = task.question(BYTES, draws_of(seed))
        text = text_of(found)
        facts = [m for m in re.finditer(r" The \w+ is (north|south|east|west) of the \w+\.", text)]
        assert len(facts) == 2
        assert read(4, [m[0].strip() for m in facts], found.asked) == found.answers[0]
        for m in facts:
            tenths[10 * m.start() // len(text)] += 1
            last += text[m.end()] == "\n"
    # After the last sentence, which is cut, as after any of the others: 3,000 facts, 159 places.
    assert 5 < last < 40
    assert min(tenths.values()) > 240
    assert max(tenths.values()) < 360
    late = dataclasses.replace(task, start=0.8)
    for seed in range(50):
        text = text_of(late.question(BYTES, draws_of(seed)))
        first = re.search(r" The \w+ is (north|south|east|west) of the", text)
        assert first.start() > 0.75 * len(text)


def test_a_story_has_to_have_room():
    """And is drawn again where it has not."""
    task = BabiTask(length=500, number=3, prose=QUIET)
    for seed in range(30):
        assert len(task.question(BYTES, draws_of(seed))) == 500 - 32
    tight = dataclasses.replace(task, length=250)
    with pytest.raises(ValueError, match="length: expected room for a story of question 3"):
        tight.question(BYTES, draws_of(0))


def test_one_label_scoring_is_babilongs():
    task = BabiTask(number=3)
    asked = tasks.Question((), "Where was the milk before the office?", ("garden",), "")
    for text, score in (
        (" garden", 1),
        (" The Garden. Then the kitchen", 1),
        (" It was the office, before that the garden.", 1),
        (" garden or kitchen", 0),
        (" kitchen. garden", 0),
        ("", 0),
    ):
        assert task.score(asked, text) == score


def test_training_rows_ask_for_the_answer_alone():
    task = tasks.task("babi-qa1", length=700)
    tokens, targets = tasks.training_rows(task, BYTES, 3, draws_of(0))
    assert tokens.shape == targets.shape
    for row, wanted in zip(tokens, targets, strict=True):
        places = (wanted != tasks.IGNORE).nonzero().flatten()
        text = bytes(wanted[places].tolist()).decode()
        assert re.fullmatch(r" (bedroom|kitchen|garden|hallway|bathroom|office)\.", text)
        prompt = bytes(row[: places[0] + 1].tolist()).decode()
        assert prompt.endswith("? Answer:")
        assert (wanted[places[:-1]] == row[places[:-1] + 1]).all()
