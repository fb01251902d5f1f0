"""Partition of one pool of examples into clients: by a column, by Dirichlet(α) over a label, by mixtures of labels, or at random.

The partitions by Dirichlet(α) and at random are Flower Datasets' partitioners, imported on use; they see row numbers and labels
alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT, Count
from mira.core.seeds import stream
from mira.data.fields import RawRecord, label_field
from mira.data.records import Columns, Tally
from mira.data.tasks import Mixture, dealt, mixed, taken
from mira.data.types import Client, Example, client_data

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


@dataclass(frozen=True, config=STRICT)
class ByColumn:
    """One or more clients for each value of a column; the value is also the clients' group."""

    column: str
    """The column to partition by."""
    clients_per_value: Annotated[int, Field(ge=1)] = 1
    """Clients that share the examples of a value equally; Elbakary et al. 2025 have 10 for each Dolly category."""
    by: Literal["column"] = "column"


@dataclass(frozen=True, config=STRICT)
class ByDirichlet:
    """Clients with shares of each label's examples, drawn from Dirichlet(α)."""

    column: str
    """The column with the label."""
    clients: Annotated[int, Field(ge=1)]
    """Number of clients."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """α; the smaller it is, the more clients differ."""
    min_examples: Annotated[int, Field(ge=1)] = 10
    """Smallest number of examples of a client; drawn again, at most ten times, until every client has it."""
    by: Literal["dirichlet"] = "dirichlet"


@dataclass(frozen=True, config=STRICT)
class ByChance:
    """Clients of equal size and the same distribution (IID)."""

    clients: Annotated[int, Field(ge=1)]
    """Number of clients."""
    by: Literal["iid"] = "iid"


@dataclass(frozen=True, config=STRICT)
class ByMixture:
    """Clients of equal size that each draw from a few labels, without replacement; the group is the label of most examples."""

    column: str
    """The column with the label, such as the task or category."""
    clients: Count
    """Number of clients."""
    tasks_per_client: Count = 2
    """Number of labels that a client draws from, all labels equally often, up to one."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """α of the Dirichlet distribution of a client's proportions; the smaller it is, the more one label outweighs the others."""
    by: Literal["mixture"] = "mixture"


Partition = Annotated[ByColumn | ByDirichlet | ByMixture | ByChance, Field(discriminator="by")]


def split_pool(
    pool: Iterable[tuple[str, RawRecord]], columns: Columns, partition: Partition, seed: int
) -> list[Client]:
    """Clients from ``pool`` of (place for error messages, record).

    All answers to a question go to the same client. A question under two values of the column belongs to both. Raises UserError
    for a bad record, a missing label or an impossible partition.
    """
    label = None if isinstance(partition, ByChance) else partition.column
    tally = Tally(also={label} if label else (), columns=columns)
    asked: dict[tuple[str, ...], dict[str, list[Example]]] = {}
    for place, record in pool:
        example = tally.example(place, record)
        value = label_field(record, label, place) if label else ""
        asked.setdefault(example.key, {}).setdefault(value, []).append(example)
    tally.tell()
    if isinstance(partition, ByColumn):
        return _by_column(list(asked.values()), partition, seed)
    if isinstance(partition, ByMixture):
        pools: dict[str, list[list[Example]]] = {}
        for labels in asked.values():
            pools.setdefault(next(iter(labels)), []).append(list(chain.from_iterable(labels.values())))
        mixture = Mixture(partition.clients, partition.tasks_per_client, partition.alpha)
        return mixed(dict(sorted(pools.items())), mixture, None, seed, "data.partition")
    parts = _deal([next(iter(labels)) for labels in asked.values()], partition, seed)
    questions = [list(chain.from_iterable(labels.values())) for labels in asked.values()]
    width = len(str(len(parts) - 1))
    return [client_data(f"client-{n:0{width}}", taken(questions, part)) for n, part in enumerate(parts)]


def _by_column(asked: Sequence[Mapping[str, list[Example]]], partition: ByColumn, seed: int) -> list[Client]:
    groups: dict[str, list[list[Example]]] = {}
    for labels in asked:
        for label, examples in labels.items():
            groups.setdefault(label, []).append(examples)
    if shared := sum(len(labels) > 1 for labels in asked):
        _log.warning(
            "%d questions are under several values of '%s': the clients of each have them", shared, partition.column
        )
    among = partition.clients_per_value
    made = [client for value, group in sorted(groups.items()) for client in dealt(value, group, among, seed)]
    return made if among == 1 else [replace(client, fix="lower data.partition.clients_per_value") for client in made]


def _deal(labels: Sequence[str], partition: ByDirichlet | ByChance, seed: int) -> list[list[int]]:
    """The row numbers of each client."""
    try:
        from datasets import Dataset
        from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner
    except ImportError as error:
        raise UserError(
            f"data.partition.by='{partition.by}': needs Flower Datasets; pip install 'mira-fl[datasets]'"
        ) from error
    draw = stream("partition", seed) % 2**32
    rows = Dataset.from_dict({"row": list(range(len(labels))), "label": list(labels)})
    dealer: Partitioner
    if isinstance(partition, ByDirichlet):
        dealer = DirichletPartitioner(
            partition.clients, "label", partition.alpha, partition.min_examples, self_balancing=False, seed=draw
        )
    else:
        dealer, rows = IidPartitioner(partition.clients), rows.shuffle(seed=draw)  # it cuts, but does not shuffle
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # each failed draw warns; the last one raises
            dealer.dataset = rows
            return [list(dealer.load_partition(n)["row"]) for n in range(partition.clients)]
    except ValueError as error:
        raise UserError(
            f"data.partition: {len(labels)} examples cannot be divided among {partition.clients} clients ({error}); use"
            " fewer clients, a larger alpha or a smaller min_examples"
        ) from error
