"""Small worlds after the rules of bAbI's tasks 1 to 5 (Weston et al. 2015): people move between
rooms, carry things and give them away; each fact is a sentence.

The sentences are our own choice of four words for moving, three for getting, three for dropping.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

PEOPLE = ("John", "Mary", "Sandra", "Daniel")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
ROOMS = ("bedroom", "kitchen", "garden", "hallway", "bathroom", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("went to", "moved to", "walked to", "travelled to")
GETS = ("took", "got", "picked up")
DROPS = ("dropped", "left", "put down")
GIVES = ("gave", "handed", "passed")
# A question comes after at least so many facts since the last one, each time with even odds.
STEPS, QUESTIONS = 3, 5
# So often who and what are drawn for one kind of fact, before its kind is drawn anew.
TRIES = 100
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """The facts up to a question, in order, the question and its one-word answer."""

    facts: tuple[str, ...]
    question: str
    answer: str


class World:
    """Who is where and holds what. Nobody is anywhere before a first move; a thing lies in a room
    that no fact tells, until somebody takes it."""

    def __init__(self, people: tuple[str, ...], draws: random.Random) -> None:
        self.people, self.draws = people, draws
        self.rooms: dict[str, str] = {}
        self.lies = {thing: draws.choice(ROOMS) for thing in THINGS}
        self.holder: dict[str, str] = {}
        # Rooms in which facts place a thing, each once in a row.
        self.seen: dict[str, list[str]] = {thing: [] for thing in THINGS}
        # (giver, thing, receiver), oldest first.
        self.gifts: list[tuple[str, str, str]] = []
        self.facts: list[str] = []

    def room_of(self, thing: str) -> str:
        return self.rooms[self.holder[thing]] if thing in self.holder else self.lies[thing]

    def _tell(self, fact: str) -> bool:
        self.facts.append(fact)
        for thing, rooms in self.seen.items():
            known = thing in self.holder or rooms
            if known and (not rooms or rooms[-1] != self.room_of(thing)):
                rooms.append(self.room_of(thing))
        return True

    def move(self) -> bool:
        """Somebody goes to another room; False where they are in it."""
        who, to = self.draws.choice(self.people), self.draws.choice(ROOMS)
        if self.rooms.get(who) == to:
            return False
        self.rooms[who] = to
        return self._tell(f"{who} {self.draws.choice(MOVES)} the {to}.")

    def get(self, but: str | None = None) -> bool:
        """Somebody takes what lies in the same room, but not this; False where that is nothing."""
        who, thing = self.draws.choice(self.people), self.draws.choice(THINGS)
        if thing == but or thing in self.holder or self.rooms.get(who) != self.lies[thing]:
            return False
        self.holder[thing] = who
        return self._tell(f"{who} {self.draws.choice(GETS)} the {thing}.")

    def drop(self) -> bool:
        """Somebody puts down what they hold; False where that is nothing."""
        who, thing = self.draws.choice(self.people), self.draws.choice(THINGS)
        if self.holder.get(thing) != who:
            return False
        self.lies[thing] = self.rooms[who]
        del self.holder[thing]
        return self._tell(f"{who} {self.draws.choice(DROPS)} the {thing}.")

    def give(self, unlike: tuple[str, str, str] | None = None) -> bool:
        """Somebody gives what they hold to another in the same room; False where nobody can.
        unlike: a gift whose thing this is not, and not of the same two people."""
        who, to = self.draws.sample(self.people, 2)
        thing = self.draws.choice(THINGS)
        if unlike and (thing == unlike[1] or (who, to) == (unlike[0], unlike[2])):
            return False
        if self.holder.get(thing) != who or self.rooms.get(to) != self.rooms[who]:
            return False
        self.holder[thing] = to
        self.gifts.append((who, thing, to))
        return self._tell(f"{who} {self.draws.choice(GIVES)} the {thing} to {to}.")

    def step(self, *ways: Callable[[], bool]) -> None:
        """One fact more: of a kind drawn from `ways`, unless in TRIES draws there is none."""
        while True:
            way = self.draws.choice(ways)
            if any(way() for _ in range(TRIES)):
                return


def asked(number: int, draws: random.Random) -> Asked:
    """The facts up to a question of task `number`, from 1 to 5, and its answer.

    In tasks 1, 2, 3 and 5 it is one of the five questions of a story, each as likely.
    """
    if number == 4:
        return _directions(draws)
    world = World(GIVERS if number == 5 else PEOPLE, draws)
    find = {1: _person, 2: _thing, 3: _before, 5: _gift}[number]
    left = draws.randrange(QUESTIONS)
    while True:
        question, answer = find(world)
        if not left:
            return Asked(tuple(world.facts), question, answer)
        left -= 1


def _person(world: World) -> tuple[str, str]:
    """After two moves: where is somebody?"""
    world.step(world.move)
    world.step(world.move)
    who = world.draws.choice(sorted(world.rooms))
    return f"Where is {who}?", world.rooms[who]


def _wander(world: World, ready: Callable[[], list[str]]) -> str:
    """Facts of moving, getting and dropping, until there is something to ask about: which. Two of
    three are of what people hold, where anything can be got or dropped."""

    def hold() -> bool:
        return world.draws.choice((world.get, world.drop))()

    steps = 0
    while True:
        world.step(world.move, hold, hold)
        steps += 1
        things = ready() if steps >= STEPS else []
        if things and world.draws.random() < 0.5:
            return world.draws.choice(things)


def _thing(world: World) -> tuple[str, str]:
    """Where is a thing that somebody has had?"""
    thing = _wander(world, lambda: [t for t in THINGS if world.seen[t]])
    return f"Where is the {thing}?", world.seen[thing][-1]


def _before(world: World) -> tuple[str, str]:
    """Where was a thing before the room in which it is?"""
    thing = _wander(world, lambda: [t for t in THINGS if len(world.seen[t]) > 1])
    before, now = world.seen[thing][-2:]
    return f"Where was the {thing} before the {now}?", before


def _gift(world: World) -> tuple[str, str]:
    """A gift that is not the first fact, up to five facts unlike it, and one of three questions
    about it."""
    facts, gift = 0, None
    while gift is None:
        count = len(world.gifts)
        world.step(world.move, world.get, world.give)
        facts += 1
        if len(world.gifts) > count and facts > 1:
            gift = world.gifts[-1]
    who, thing, to = gift
    for _ in range(world.draws.randrange(6)):
        world.step(world.move, lambda: world.get(but=thing), lambda: world.give(unlike=gift))
    return world.draws.choice(
        (
            (f"What did {who} give to {to}?", thing),
            (f"Who received the {thing}?", to),
            (f"To whom did {who} give the {thing}?", to),
        )
    )


def _directions(draws: random.Random) -> Asked:
    """Three rooms in a line, two facts about neighbours, one question about such a pair."""
    line, way = draws.sample(ROOMS, 3), draws.choice(("north", "east"))
    back = OPPOSITE[way]
    # Each lies to the `way` of the one after it.
    pairs = [(line[0], line[1]), (line[1], line[2])]
    facts = [
        f"The {a} is {way} of the {b}."
        if draws.random() < 0.5
        else f"The {b} is {back} of the {a}."
        for a, b in pairs
    ]
    draws.shuffle(facts)
    a, b = draws.choice(pairs)
    question, answer = draws.choice(
        (
            (f"What is {way} of the {b}?", a),
            (f"What is {back} of the {a}?", b),
            (f"What is the {a} {way} of?", b),
            (f"What is the {b} {back} of?", a),
        )
    )
    return Asked(tuple(facts), question, answer)
