"""Clients that a Python program gives as objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT
from mira.data.records import Tally
from mira.data.types import Client, Example, client_data


@dataclass(frozen=True, config=STRICT)
class Memory:
    """Objects of a Python program, given to mira.run as data=."""

    source: Literal["memory"] = "memory"

    def load(self, seed: int) -> list[Client]:
        raise UserError(
            "data.source=memory: the clients are objects of a Python program; give them as data= to mira.run, mira.resume or"
            " mira.open_run"
        )


@plain_dataclass(frozen=True)
class Given:
    """A source of ``clients`` that are there already."""

    clients: Sequence[Client]

    def load(self, seed: int) -> list[Client]:
        return list(self.clients)


def clients_from(data: Sequence[Client] | Mapping[str, Iterable[Any]]) -> list[Client]:
    """Clients from a list of them, or from a mapping of names to examples.

    Examples are ``Example`` objects or records as a data file has them (docs/data.md): a list of dicts, or a
    ``datasets.Dataset``. Raises UserError that names the client and the place of a record.
    """
    _check_kind(data)
    if isinstance(data, Mapping):
        tally = Tally()
        clients = [client_data(str(name), _examples(str(name), found, tally)) for name, found in sorted(data.items())]
        tally.tell()
        return clients
    strangers = [item for item in data if not isinstance(item, Client)]
    if strangers:
        raise UserError(f"data: must be a list of mira.Client or a dict of name: examples, has {_kind(strangers[0])}")
    return [_ready(client) for client in data]


def _check_kind(data: Any) -> None:
    """Raise UserError where ``data`` is neither a list nor a mapping, or holds no client."""
    wanted = "data: must be a list of mira.Client or a dict of name: examples"
    if isinstance(data, str | Path):
        raise UserError(f"{wanted}, is a path; put it into the configuration, as data.path")
    if callable(getattr(data, "load", None)):
        raise UserError(f"{wanted}, is the data source {_kind(data)}; put it into the configuration, as data")
    if hasattr(data, "column_names") and not isinstance(data, Mapping):
        raise UserError(f"{wanted}, is one {_kind(data)}; split it into one for each client, by a column")
    if not isinstance(data, Mapping | Iterable):
        raise UserError(f"{wanted}, is {_kind(data)}")
    if isinstance(data, Sequence | Mapping) and not data:
        raise UserError("data: holds no client; give one at least")
    for name, found in data.items() if isinstance(data, Mapping) else ():
        if isinstance(found, Client):
            raise UserError(
                f"data['{name}']: must be the examples of the client, is a mira.Client; give a list of clients"
            )
        if isinstance(found, str | Path) or not isinstance(found, Iterable):
            raise UserError(f"data['{name}']: must be a list of examples, is {_kind(found)}")


def _ready(client: Client) -> Client:
    """A client with its records read as examples."""
    if all(isinstance(example, Example) for example in client.examples):
        return client
    read = client_data(client.name, _examples(client.name, client.examples, Tally()), client.group)
    task, description = client.task, client.description or read.description
    return Client(client.name, read.examples, task, client.group, description)


def _examples(name: str, found: Iterable[Any], tally: Tally) -> list[Example]:
    examples = []
    for number, item in enumerate(found):
        place = f"data['{name}'][{number}]"
        if not isinstance(item, Example | Mapping):
            raise UserError(
                f"{place}: must be a dict of fields or a mira.Example, is {_kind(item)}; a pandas table gives dicts with"
                " to_dict('records')"
            )
        examples.append(item if isinstance(item, Example) else tally.example(place, dict(item)))
    return examples


def _kind(item: object) -> str:
    return type(item).__name__
