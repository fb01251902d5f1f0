"""A practitioner's own data: a folder with one JSONL file per client, or one file with a client column."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.strict import STRICT
from mira.data.records import Record, existing, label_field, read_jsonl, to_example
from mira.data.types import ClientData, client_data


@dataclass(frozen=True, config=STRICT)
class Jsonl:
    """One JSON object a line: instruction, input and output; or prompt and completion; or messages (role, content)."""

    path: Path
    """A folder of *.jsonl files, each one client named as the file; or one such file, with client_column."""
    client_column: str | None = None
    """In one file for all: the field that names the client."""
    group_column: str | None = None
    """A field that names the client's group, the same in all of its lines."""
    source: Literal["jsonl"] = "jsonl"

    def load(self, seed: int) -> list[ClientData]:
        clients: dict[str, list[tuple[str, Record]]] = {}
        if existing(self.path).is_dir():
            if self.client_column is not None:
                raise UserError(
                    f"data.client_column: '{self.path}' is a folder, one client per file; remove client_column"
                )
            for file in sorted(self.path.glob("[!.]*.jsonl")):
                clients[file.stem] = list(read_jsonl(file))
            if not clients:
                raise UserError(
                    f"data.path='{self.path}': no *.jsonl file in this folder; put one file per client there"
                )
        else:
            if self.client_column is None:
                raise UserError(
                    f"data.client_column: missing; '{self.path}' is one file: name the field that holds the client, or"
                    " give a folder with one file per client"
                )
            for place, record in read_jsonl(self.path):
                clients.setdefault(label_field(record, self.client_column, place), []).append((place, record))
        return [self._client(name, records) for name, records in sorted(clients.items())]

    def _client(self, name: str, records: list[tuple[str, Record]]) -> ClientData:
        examples = tuple(to_example(record, place) for place, record in records)
        group = self._group(name, records) if self.group_column else ""
        return client_data(name, examples, group)

    def _group(self, name: str, records: list[tuple[str, Record]]) -> str:
        group = ""
        for place, record in records:
            here = label_field(record, str(self.group_column), place)
            if group and here != group:
                raise UserError(
                    f"{place}: client '{name}' is in group '{here}' here and in '{group}' above; choose one"
                )
            group = here
        return group
