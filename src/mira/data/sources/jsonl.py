"""Own data: a folder with one file per client, or one file with a client column."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT, UserPath
from mira.data.fields import RawRecord, label_field
from mira.data.reading import ENDINGS, client_files, client_name, existing, read_records, tell_left_out
from mira.data.records import Columns, Tally
from mira.data.types import Client, client_data

Records = list[tuple[str, RawRecord]]


@plain_dataclass(frozen=True)
class Found:
    """The clients of a source, and the counts of its layouts and unused fields."""

    clients: list[Client]
    tally: Tally


@dataclass(frozen=True, config=STRICT)
class Jsonl:
    """Files of examples (JSON, CSV, parquet; plain or gzipped) in the layouts that docs/data.md lists."""

    path: UserPath
    """A folder with one data file per client, named as the client (in a sub-folder: sub/file); or one file with client_column."""
    client_column: str | None = None
    """The field with the client's name, for one file of all clients."""
    group_column: str | None = None
    """The field with the client's group, the same in all of its records."""
    columns: Columns = Field(default_factory=dict)
    """Our fields -> the fields of the files, e.g. {instruction: frage, output: antwort}; empty: recognised by name."""
    source: Literal["jsonl"] = "jsonl"

    def load(self, seed: int) -> list[Client]:
        found = self.read()
        found.tally.tell()
        return found.clients

    def read(self) -> Found:
        """All clients; files that are not read are logged."""
        tally = Tally({name for name in (self.client_column, self.group_column) if name}, self.columns)
        return Found([self._client(name, records, tally) for name, records in sorted(self._records().items())], tally)

    def _records(self) -> dict[str, Records]:
        if existing(self.path).is_dir():
            if self.client_column is not None:
                raise UserError(
                    f"data.client_column: '{self.path}' is a folder, one client per file; remove client_column"
                )
            files, left_out = client_files(self.path)
            if not files:
                raise UserError(
                    f"data.path='{self.path}': no data file in this folder; put one file per client there, ending with"
                    f" {', '.join(ENDINGS)} (and .gz where gzipped)"
                )
            tell_left_out(self.path, left_out)
            return {name: list(read_records(file)) for name, file in files.items()}
        if self.client_column is None:
            raise UserError(
                f"data.client_column: missing; '{self.path}' is one file: name the field that holds the client, or"
                " give a folder with one file per client"
            )
        clients: dict[str, Records] = {}
        for place, record in read_records(self.path):
            clients.setdefault(label_field(record, self.client_column, place), []).append((place, record))
        return clients

    def _client(self, name: str, records: Records, tally: Tally) -> Client:
        return client_data(name, tally.examples(records), self._group(name, records) if self.group_column else "")

    def _group(self, name: str, records: Records) -> str:
        group = ""
        for place, record in records:
            here = label_field(record, str(self.group_column), place)
            if group and here != group:
                raise UserError(
                    f"{place}: client '{name}' is in group '{here}' here and in '{group}' above; choose one"
                )
            group = here
        return group


@plain_dataclass(frozen=True)
class OneFile:
    """A single file without a client column, as one client."""

    path: Path

    def read(self) -> Found:
        tally = Tally()
        return Found([client_data(client_name(self.path), tally.examples(read_records(self.path)))], tally)

    def load(self, seed: int) -> list[Client]:
        found = self.read()
        found.tally.tell()
        return found.clients
