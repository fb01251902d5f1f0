"""Generated tasks, which need no download, and the easy suite: 12 small tasks in 4 families.

The answers of a family of the easy suite follow a house style that no task definition explains. It has to be learned from
examples, and helps all three tasks of the family. Families are the ground-truth graph.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT, Count
from mira.data.sources.hard_suite import hard_tasks
from mira.data.sources.made import MOST, Make, Task, family
from mira.data.tasks import Mixture, exclude, mixed, named, questions_of, shared, spaced
from mira.data.types import Client, Example

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NAMES = "Anna Ben Clara David Emma Frank Grace Henry Ivy Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tom Vera"
GOODS = "apples books boxes cakes chairs clocks coats cups flowers knives lamps pens plates rings shoes tables"
CITIES = "Athens Berlin Boston Cairo Dallas Delhi Dublin Lima London Madrid Milan Oslo Paris Rome Tokyo Vienna"
WORDS = (
    "Apple Bird Blue Bread Cloud Dark Deep Dream Fire Fish Forest Garden Glass Gold Green Heart Horse House Iron Island"
    " Lake Light Long Milk Moon Mountain Night Old Paper Rain Red River Road Rock Salt Sand Sea Ship Silver Snow Stone"
    " Storm Summer Sun Tree Water White Wind Winter Wood"
)


def _thousandfold(large: str, small: str) -> Make:
    """A maker of pairs like "47 km" -> "47000|m"."""

    def make(rng: random.Random) -> tuple[str, str]:
        amount = rng.randint(2, 999)
        return f"{amount} {large}", f"{amount}000|{small}"

    return make


def _date(spelling: str) -> Make:
    """A maker of pairs of a date in ``spelling`` -> "1987.03.14"."""

    def make(rng: random.Random) -> tuple[str, str]:
        year, month, day = rng.randint(1950, 2029), rng.randint(1, 12), rng.randint(1, 28)
        return spelling.format(day=day, month=MONTHS[month - 1], year=year), f"{year}.{month:02}.{day:02}"

    return make


def _tag(choose: Callable[[list[str]], list[str]]) -> Make:
    """A maker of pairs like "Blue River Stone" -> "[blue-river-stone]", with the words that ``choose`` picks."""

    def make(rng: random.Random) -> tuple[str, str]:
        words = rng.sample(WORDS.split(), 3)
        return " ".join(words), f"[{'-'.join(choose(words)).lower()}]"

    return make


def _record(layout: str) -> Make:
    """A maker of pairs of a shipment in ``layout`` -> "Lima: 3 lamps (Anna)"."""

    def make(rng: random.Random) -> tuple[str, str]:
        name, goods, city = (rng.choice(words.split()) for words in (NAMES, GOODS, CITIES))
        count = rng.randint(2, 99)
        return layout.format(name=name, count=count, goods=goods, city=city), f"{city}: {count} {goods} ({name})"

    return make


TASKS = (
    *family(
        "units",
        ("length", "Convert kilometres to metres in log style.", _thousandfold("km", "m")),
        ("mass", "Convert kilograms to grams in log style.", _thousandfold("kg", "g")),
        ("volume", "Convert litres to millilitres in log style.", _thousandfold("l", "ml")),
    ),
    *family(
        "dates",
        ("day-first", "Rewrite the date in archive style.", _date("{day} {month} {year}")),
        ("month-first", "Rewrite the US date in archive style.", _date("{month} {day}, {year}")),
        ("short", "Rewrite the short date in archive style.", _date("{day}-{month:.3}-{year}")),
    ),
    *family(
        "tags",
        ("all", "Make a tag of all words.", _tag(lambda words: words)),
        ("ends", "Make a tag of the first and the last word.", _tag(lambda words: words[::2])),
        ("tail", "Make a tag without the first word.", _tag(lambda words: words[1:])),
    ),
    *family(
        "records",
        (
            "sentence",
            "Extract the shipping record from the sentence.",
            _record("{name} sent {count} {goods} to {city}."),
        ),
        ("fields", "Extract the shipping record from the fields.", _record("to={city} from={name} {goods}={count}")),
        ("row", "Extract the shipping record from the row.", _record("{name};{city};{count};{goods}")),
    ),
)


SUITES: dict[str, Callable[[int], tuple[Task, ...]]] = {"easy": lambda seed: TASKS, "hard": hard_tasks}


@dataclass(frozen=True, config=STRICT)
class Builtin:
    """Generated tasks, by default with a client for each task; the group is the family then."""

    examples: Annotated[int, Field(ge=1, le=MOST)] = 64
    """Different examples of each client, over all of its splits."""
    suite: Literal["easy", "hard"] = "easy"
    """easy: 12 tasks in 4 families, the same for every seed. hard: 12 tasks in 6 families with tables, words and conventions
    that the seed decides, so that a few examples do not show all of them."""
    tasks: Count | tuple[str, ...] | None = None
    """The tasks to use, by name, or a number of tasks, evenly spaced over the families; null: all."""
    clients_per_task: Annotated[int, Field(ge=1, le=MOST)] = 1
    """Clients for each task, without an example in common. With more than one the group is the task, not the family."""
    mixture: Mixture | None = None
    """Clients that each draw from a few tasks, in place of clients for each task."""
    source: Literal["builtin"] = "builtin"

    def __post_init__(self) -> None:
        exclude(self.clients_per_task, self.mixture)
        if self.examples * self.clients_per_task > MOST:
            raise UserError(
                f"data.examples={self.examples}: {self.examples} for each of {self.clients_per_task} clients per task, and a"
                f" task has {MOST}; lower examples to {MOST // self.clients_per_task} or use fewer clients"
            )

    def load(self, seed: int) -> list[Client]:
        every = {task.name: task for task in SUITES[self.suite](seed)}
        if isinstance(self.tasks, tuple):
            tasks = named(every, self.tasks)
        elif (self.tasks or 0) > len(every):
            raise UserError(f"data.tasks={self.tasks}: data.suite={self.suite} has {len(every)} tasks; ask for fewer")
        else:
            tasks = spaced(list(every.values()), self.tasks)
        count = MOST if self.mixture else self.examples * self.clients_per_task
        clients = [
            Client(
                task.name,
                _examples(task, count, seed),
                group=task.family,
                description=task.definition,
                fix="raise data.examples",
            )
            for task in tasks
        ]
        if self.mixture is None:
            return shared(clients, self.clients_per_task, seed, "raise data.examples")
        pools = {client.name: questions_of(client.examples) for client in clients}
        return mixed(pools, self.mixture, self.examples, seed, "data.mixture")


def _examples(task: Task, count: int, seed: int) -> tuple[Example, ...]:
    rng = random.Random(f"{seed} {task.name}")  # text seeds are the same in every process
    made: dict[str, str] = {}
    while len(made) < count:
        given, answer = task.make(rng)
        made.setdefault(given, answer)
    return tuple(Example(task.definition, given, answer) for given, answer in made.items())
