"""Clients made from tasks: several clients for each task, or clients that mix a few tasks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Annotated, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError, did_you_mean
from mira.core.pydantic_config import STRICT, Count
from mira.core.seeds import generator, stream
from mira.data.federation import walk
from mira.data.types import Client, Example, client_data

_log = logging.getLogger(__name__)

T = TypeVar("T")

Questions = Sequence[list[Example]]
"""The examples of a pool by question: all answers to a question are dealt together."""


@dataclass(frozen=True, config=STRICT)
class Mixture:
    """Clients of equal size that each draw from a few tasks, without replacement. The tasks of a client are drawn so that all
    tasks have equally many clients, up to one; its proportions are drawn from Dirichlet(α). Its group is the task of most of its
    examples."""

    clients: Count
    """Number of clients."""
    tasks_per_client: Count = 2
    """Number of tasks that a client draws from; a small proportion may round to no example."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """α; the smaller it is, the more one task outweighs the others of a client. 1: all proportions are equally likely."""


def questions_of(examples: Iterable[Example]) -> list[list[Example]]:
    """All examples by question, repeated answers included, in the given order."""
    asked: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        asked.setdefault(example.key, []).append(example)
    return list(asked.values())


def exclude(clients_per_task: int, mixture: Mixture | None) -> None:
    """Raise UserError where both make clients."""
    if clients_per_task > 1 and mixture is not None:
        raise UserError(
            f"data.clients_per_task={clients_per_task}: a mixture has no clients of one task; remove one of the two"
        )


def named(every: Mapping[str, T], names: Sequence[str], place: str = "") -> list[T]:
    """The tasks of these names, in the order of ``every``. Raises UserError for an unknown name."""
    for name in names:
        if name not in every:
            raise UserError(f"data.tasks: no task '{name}'{place}{did_you_mean(name, every)}")
    return [task for name, task in every.items() if name in names]


def spaced(every: Sequence[T], number: int | None) -> list[T]:
    """``number`` of them, evenly spaced; None: all."""
    wanted = len(every) if number is None else number
    return [every[n * len(every) // wanted] for n in range(wanted)]


def dealt(task: str, questions: Questions, clients: int, seed: int) -> list[Client]:
    """``clients`` clients of the group ``task``, which share its questions equally, up to one, and at random."""
    if clients == 1:
        return [client_data(task, list(chain.from_iterable(questions)), task)]
    order = torch.randperm(len(questions), generator=generator("partition", seed, task)).tolist()
    width = len(str(clients - 1))
    return [
        client_data(f"{task}-{n:0{width}}", taken(questions, sorted(order[n::clients])), task) for n in range(clients)
    ]


def shared(tasks: Sequence[Client], clients_per_task: int, seed: int, fix: str) -> list[Client]:
    """``clients_per_task`` clients for each task, with no question in common; their group is the task. One client for each task:
    ``tasks`` as they are. ``fix``: a way to more examples of a client."""
    if clients_per_task == 1:
        return list(tasks)
    return [
        replace(client, task=task.name, fix=fix)
        for task in tasks
        for client in dealt(task.name, questions_of(task.examples), clients_per_task, seed)
    ]


def mixed(tasks: Mapping[str, Questions], mixture: Mixture, size: int | None, seed: int, key: str) -> list[Client]:
    """The clients of ``mixture``, with ``size`` questions each and none in common; None: as many as the tasks have for all.

    Raises UserError, naming the section ``key``, where there are too few tasks or too few examples.
    """
    names, supply = list(tasks), [len(questions) for questions in tasks.values()]
    which, counts = _drawn(supply, mixture, size, seed, key)
    orders = [
        torch.randperm(count, generator=generator("mixture", seed, name)).tolist()
        for name, count in zip(names, supply, strict=True)
    ]
    made: list[Client] = []
    fix = "raise data.examples" if size else f"lower {key}.clients"
    for n, (own, row) in enumerate(zip(which, counts, strict=True)):
        parts: dict[str, list[Example]] = {}
        for task, count in sorted(zip(own, row, strict=True), key=lambda pair: -pair[1]):
            parts[names[task]] = taken(tasks[names[task]], sorted(orders[task][:count]))
            orders[task] = orders[task][count:]
        name = f"client-{n:0{len(str(mixture.clients - 1))}}"
        client = client_data(name, list(chain.from_iterable(parts.values())), next(iter(parts)))
        told = " + ".join(task for task, part in parts.items() if part)
        made.append(replace(client, task=told, fix=fix))
    if size is None and (left := sum(map(len, orders))):
        _log.warning(
            "%s: %d clients have %d questions each; %d questions are not used", key, len(made), sum(counts[0]), left
        )
    return made


def _drawn(
    supply: Sequence[int], mixture: Mixture, size: int | None, seed: int, key: str
) -> tuple[list[list[int]], list[list[int]]]:
    """The tasks of each client, and its number of questions of each of them."""
    each = mixture.tasks_per_client
    if each > len(supply):
        raise UserError(f"{key}.tasks_per_client={each}: there are {len(supply)} tasks; ask for at most as many")
    which = walk(len(supply), each, mixture.clients, generator("mixture", seed))
    random = np.random.default_rng(stream("proportions", seed))
    shares = random.dirichlet([mixture.alpha] * each, size=mixture.clients)
    wanted = size or _largest(which, shares, supply)
    counts = _counts(shares, wanted)
    if not (wanted and _fits(which, counts, supply)):
        raise UserError(
            f"{key}.clients={mixture.clients}: the tasks have examples for {_largest(which, shares, supply)} a client, not"
            f" {wanted or 1}; use fewer clients, a larger alpha or more tasks"
        )
    return which, counts


def taken(questions: Questions, numbers: Iterable[int]) -> list[Example]:
    return [example for number in numbers for example in questions[number]]


def _counts(shares: NDArray[np.float64], size: int) -> list[list[int]]:
    """Whole numbers near ``size`` times each row of ``shares``, with the sum ``size``: the largest remainders are rounded up."""
    exact = shares * size
    counts = np.floor(exact).astype(np.int64)
    for row, remainder in zip(counts, exact - counts, strict=True):
        row[np.argsort(-remainder, kind="stable")[: size - row.sum()]] += 1
    return [[int(count) for count in row] for row in counts]


def _fits(which: Sequence[Sequence[int]], counts: Sequence[Sequence[int]], supply: Sequence[int]) -> bool:
    demand = [0] * len(supply)
    for own, row in zip(which, counts, strict=True):
        for task, count in zip(own, row, strict=True):
            demand[task] += count
    return all(asked <= there for asked, there in zip(demand, supply, strict=True))


def _largest(which: Sequence[Sequence[int]], shares: NDArray[np.float64], supply: Sequence[int]) -> int:
    """The largest number of questions for each client that the tasks can supply."""
    each = np.zeros(len(supply))  # questions of a task for one question a client
    for own, row in zip(which, shares, strict=True):
        each[own] += row
    # Rounding takes less than one question from a task and client.
    size = int(min((there + len(which)) / asked for there, asked in zip(supply, each, strict=True) if asked))
    while size and not _fits(which, _counts(shares, size), supply):
        size -= 1
    return size
