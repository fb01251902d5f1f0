"""One pool of examples -> clients: by a column, by Dirichlet(α) over a label, or at random.

The two random cuts are Flower Datasets' partitioners, imported when used; they see row numbers and labels alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.seeds import generator, stream
from mira.core.strict import STRICT
from mira.data.records import Columns, Record, label_field, mapped, to_example
from mira.data.types import ClientData, Example, client_data

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


@dataclass(frozen=True, config=STRICT)
class ByColumn:
    """One client, or several, for every value of a column; the value is also the clients' group."""

    column: str
    clients_per_value: Annotated[int, Field(ge=1)] = 1
    """The value's examples are dealt among so many, in equal numbers; Elbakary et al. 2025 have 10 for each Dolly category."""
    by: Literal["column"] = "column"


@dataclass(frozen=True, config=STRICT)
class ByDirichlet:
    """Each label's examples are dealt in shares drawn from Dirichlet(α): the smaller, the less alike clients are."""

    column: str
    """The label."""
    clients: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)] = 0.5
    min_examples: Annotated[int, Field(ge=1)] = 10
    """Draw again (ten times at most) until every client has this many."""
    by: Literal["dirichlet"] = "dirichlet"


@dataclass(frozen=True, config=STRICT)
class ByChance:
    """Clients of equal size and like kind (IID)."""

    clients: Annotated[int, Field(ge=1)]
    by: Literal["iid"] = "iid"


Partition = Annotated[ByColumn | ByDirichlet | ByChance, Field(discriminator="by")]


def split_pool(
    pool: Iterable[tuple[str, Record]], columns: Columns, partition: Partition, seed: int
) -> list[ClientData]:
    """Clients from ``pool``, (place for error messages, record). A question asked twice is kept once, so that no two
    clients hold it. Raises UserError on a bad record, a missing label or a partition that cannot be made."""
    asked: dict[tuple[str, ...], tuple[Example, str]] = {}
    for place, record in pool:
        example = to_example(mapped(record, columns, place), place)
        label = "" if isinstance(partition, ByChance) else label_field(record, partition.column, place)
        asked.setdefault(example.key, (example, label))
    examples, labels = [example for example, _ in asked.values()], [label for _, label in asked.values()]
    if isinstance(partition, ByColumn):
        groups: dict[str, list[Example]] = {}
        for example, label in asked.values():
            groups.setdefault(label, []).append(example)
        among = partition.clients_per_value
        return [client for value, group in sorted(groups.items()) for client in _dealt(value, group, among, seed)]
    parts = _deal(labels, partition, seed)
    width = len(str(len(parts) - 1))
    return [client_data(f"client-{n:0{width}}", [examples[row] for row in part]) for n, part in enumerate(parts)]


def _dealt(value: str, examples: Sequence[Example], clients: int, seed: int) -> list[ClientData]:
    """``clients`` clients of the group ``value``, each with every ``clients``-th of its examples in a random order."""
    if clients == 1:
        return [client_data(value, examples, value)]
    order = torch.randperm(len(examples), generator=generator("partition", seed, value)).tolist()
    width = len(str(clients - 1))
    return [
        client_data(f"{value}-{n:0{width}}", [examples[row] for row in sorted(order[n::clients])], value)
        for n in range(clients)
    ]


def _deal(labels: Sequence[str], partition: ByDirichlet | ByChance, seed: int) -> list[list[int]]:
    """Row numbers for each client."""
    try:
        from datasets import Dataset
        from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner
    except ImportError as error:
        raise UserError(
            f"data.partition.by='{partition.by}': needs Flower Datasets; pip install 'mira[datasets]'"
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
            f"data.partition: {len(labels)} examples cannot be cut for {partition.clients} clients ({error}); take"
            " fewer clients, a larger alpha or a smaller min_examples"
        ) from error
