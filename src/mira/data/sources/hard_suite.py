"""The hard suite: 12 generated tasks in 6 families, each about a small world of tables, words and conventions.

The seed draws the worlds, so that each seed is a held-out variant of every task. A dozen examples show a part of a world; the
examples of other clients of the task show other parts, and the two tasks of a family are about one world.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from mira.data.sources.hard_words import (
    ARTICLES,
    CLOSINGS,
    COLOURS,
    DATES,
    DAYS,
    DEEDS,
    DEVICES,
    FACTS,
    FAULTS,
    FIGURES,
    KINDS,
    LETTERS,
    MATERIALS,
    MATTERS,
    PEOPLE,
    PURPOSES,
    RAINS,
    READERS,
    SAID,
    SIZES,
    TEAMS,
    TERMS,
    THINGS,
    TIMES,
    WARMTHS,
    WINDS,
)
from mira.data.sources.made import Make, Task, family


def hard_tasks(seed: int) -> tuple[Task, ...]:
    """The tasks, with the worlds of ``seed``."""
    worlds = (_language, _desk, _stock, _weather, _directory, _letters)
    return tuple(task for world in worlds for task in world(random.Random(f"{seed} {world.__name__}")))


def _table(keys: Sequence[str], values: Sequence[str], world: random.Random) -> dict[str, str]:
    """A value for each key at random; all values differ where there are enough."""
    drawn = world.sample(values, len(values))
    return {key: drawn[n % len(drawn)] for n, key in enumerate(world.sample(keys, len(keys)))}


def _words(rng: random.Random, *tables: Sequence[str] | Mapping[str, object]) -> list[str]:
    return [rng.choice(list(table)) for table in tables]


# A made-up language: one dictionary, two orders of words.


def _language(world: random.Random) -> tuple[Task, ...]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = [*FIGURES, *DEEDS, *THINGS, *KINDS]
    made: list[str] = []
    while len(made) < len(words):
        word = "".join(world.sample(syllables, 2)) + world.choice(["", "n", "r", "s"])
        made += [word] if word not in made else []
    dictionary = _table(words, made, world)
    orders = world.sample([(4, 3, 2, 1, 0), (2, 1, 0, 4, 3), (1, 0, 4, 3, 2), (2, 0, 1, 3, 4)], 2)

    def dialect(order: Sequence[int]) -> Make:
        def make(rng: random.Random) -> tuple[str, str]:
            one, figure, deed, two, thing = words = _words(rng, KINDS, FIGURES, DEEDS, KINDS, THINGS)
            said = " ".join(dictionary[words[n]] for n in order)
            return f"The {one} {figure} {deed} the {two} {thing}.", f"{said.capitalize()}."

        return make

    return family(
        "language",
        ("hills", "Translate into the language of the hills.", dialect(orders[0])),
        ("coast", "Translate into the language of the coast.", dialect(orders[1])),
    )


# A help desk: which team has a device, who takes its calls, and how urgent a call is.


def _desk(world: random.Random) -> tuple[Task, ...]:
    team, owner, term = _table(DEVICES, TEAMS, world), _table(TEAMS, PEOPLE, world), _table(TIMES, TERMS, world)
    step = _table(
        FAULTS, ["restart it", "swap it", "call back", "check the log", "ask for a photo", "send a form"], world
    )

    def call(rng: random.Random) -> tuple[str, list[str]]:
        device, fault, time = words = _words(rng, DEVICES, FAULTS, TIMES)
        greeting = rng.choice(["Hello, ", "Hi, ", "Sorry, but ", "Dear team, ", "Help: "])
        return f"{greeting}{device} {fault} {time}.", words

    def ticket(rng: random.Random) -> tuple[str, str]:
        text, (device, fault, time) = call(rng)
        return text, f"{team[device]} / {owner[team[device]]} / {term[time]} / {step[fault]}"

    def note(rng: random.Random) -> tuple[str, str]:
        text, (device, fault, time) = call(rng)
        return text, f"{owner[team[device]]} from {team[device]} will {step[fault]} {term[time]}."

    return family(
        "desk",
        ("ticket", "Make a ticket of the call.", ticket),
        ("note", "Tell the caller the next step.", note),
    )


# A stockroom: the code of each article, colour and material, and the order of the parts.


def _stock(world: random.Random) -> tuple[Task, ...]:
    pairs = [a + b for a in LETTERS for b in LETTERS]
    article, colour = _table(ARTICLES, pairs, world), _table(COLOURS, "123456789", world)
    material, size = _table(MATERIALS, pairs, world), _table(SIZES, "ABXZ", world)
    order = world.sample(range(4), 4)

    def pair(rng: random.Random) -> tuple[str, str]:
        how, tint, stuff, what = _words(rng, SIZES, COLOURS, MATERIALS, ARTICLES)
        parts = (size[how], colour[tint], material[stuff], article[what])
        return f"one {how} {tint} {what} made of {stuff}", "-".join(parts[n] for n in order)

    def label(rng: random.Random) -> tuple[str, str]:
        text, code = pair(rng)
        return code, text

    return family(
        "stock",
        ("code", "Give the stock code of the article.", pair),
        ("label", "Write the label for the stock code.", label),
    )


# Weather in words: a house scale for wind, rain and warmth, with limits and words of its own.


def _weather(world: random.Random) -> tuple[Task, ...]:
    def scale(words: Sequence[str], top: int, steps: int) -> list[tuple[int, str]]:
        """Limits and words of a scale, in rising order of both."""
        chosen = sorted(world.sample(range(len(words)), steps))
        limits = [*sorted(world.sample(range(2, top), steps - 1)), top + 1]
        return [(limit, words[n]) for limit, n in zip(limits, chosen, strict=True)]

    wind, rain, warmth = scale(WINDS, 90, 6), scale(RAINS, 40, 5), scale(WARMTHS, 45, 6)
    close = _table(
        DAYS,
        ["Stay in.", "Take a coat.", "Enjoy it.", "Drive slowly.", "Water the plants.", "Shut the windows."],
        world,
    )

    def word(scale: Sequence[tuple[int, str]], value: int) -> str:
        return next(text for limit, text in scale if value < limit)

    def reading(rng: random.Random) -> tuple[str, str, tuple[str, str, str]]:
        day, w, r, t = rng.choice(DAYS), rng.randint(0, 90), rng.randint(0, 40), rng.randint(0, 45)
        text = f"{day}: wind {w} km/h, rain {r} mm, {t - 10} degrees"
        return text, day, (word(wind, w), word(rain, r), word(warmth, t))

    def forecast(rng: random.Random) -> tuple[str, str]:
        text, day, (blow, fall, heat) = reading(rng)
        return text, f"{day}: {blow} and {fall}, {heat}. {close[day]}"

    def brief(rng: random.Random) -> tuple[str, str]:
        text, day, (blow, fall, heat) = reading(rng)
        return text, f"{heat.capitalize()}, {fall}, {blow}. {close[day]}"

    return family(
        "weather",
        ("forecast", "Write the forecast for the radio.", forecast),
        ("brief", "Write the weather in brief.", brief),
    )


# A staff directory: four facts about each of twelve people.


def _directory(world: random.Random) -> tuple[Task, ...]:
    facts = {kind: _table(PEOPLE, values, world) for kind, values in FACTS.items()}
    openers = ("Please tell me: ", "Quick question: ", "Do you know? ", "A guest asks: ", "For the list: ", "")
    asked = {
        "room": ("Where does {} sit?", "In which room is {}?"),
        "project": ("What does {} work on?", "Which project has {}?"),
        "day": ("When is {} off?", "On which day is {} away?"),
        "drink": ("What does {} drink?", "Which drink is for {}?"),
    }

    def about(rng: random.Random) -> tuple[str, str]:
        who, kind = _words(rng, PEOPLE, FACTS)
        said = SAID[kind].format(facts[kind][who])
        return rng.choice(openers) + rng.choice(asked[kind]).format(who), f"{who} {said}."

    def find(rng: random.Random) -> tuple[str, str]:
        who, kind, other = _words(rng, PEOPLE, FACTS, FACTS)
        given, more = (SAID[name].format(facts[name][who]) for name in (kind, other))
        return f"{rng.choice(openers)}Who {given}? ({other})", f"{who}, who {more}."

    return family(
        "directory",
        ("about", "Answer from the staff directory.", about),
        ("find", "Find the person in the staff directory.", find),
    )


# Letters: the phrase of the house for each purpose, and the forms for each kind of reader.


def _letters(world: random.Random) -> tuple[Task, ...]:
    phrase = {purpose: world.choice(phrases) for purpose, phrases in PURPOSES.items()}
    address = {reader: world.choice(forms) for reader, forms in READERS.items()}
    closing, date = _table(list(READERS), CLOSINGS, world), _table(DATES, [*DATES[1:], DATES[0]], world)

    def parts(rng: random.Random) -> tuple[str, str, str, str]:
        purpose, reader, who, matter, when = _words(rng, PURPOSES, READERS, PEOPLE, MATTERS, DATES)
        body = f"{phrase[purpose].format(matter)}, {date[when]}"
        return f"{purpose} {who} ({reader}): {matter}, {when}", address[reader].format(who), body, closing[reader]

    def letter(rng: random.Random) -> tuple[str, str]:
        note, head, body, end = parts(rng)
        return note, f"{head}! {body}. {end}."

    def card(rng: random.Random) -> tuple[str, str]:
        note, head, body, end = parts(rng)
        return note, f"{body}. {end} | {head}"

    return family(
        "letters",
        ("letter", "Write the letter for the note.", letter),
        ("card", "Write the card for the note.", card),
    )
