"""Databricks Dolly 15k: instruction, context, response and one of 8 categories, from a JSONL file or from the hub."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.pydantic_config import STRICT, UserPath
from mira.data.partition import ByColumn, Partition, split_pool
from mira.data.reading import existing, read_records
from mira.data.records import Columns
from mira.data.sources.hub import hub_records
from mira.data.types import Client

_HUB = "databricks/databricks-dolly-15k"
_COLUMNS: Columns = {"instruction": "instruction", "input": "context", "output": "response"}


@dataclass(frozen=True, config=STRICT)
class Dolly:
    """Databricks Dolly 15k; by default each category is a client."""

    path: UserPath | None = None
    """The file (JSONL, JSON, CSV or parquet); null: the data set is downloaded from the hub."""
    partition: Partition = Field(default_factory=lambda: ByColumn("category"))
    """The partition of the pool into clients."""
    source: Literal["dolly"] = "dolly"

    def load(self, seed: int) -> list[Client]:
        records = hub_records(_HUB, None, "train", None) if self.path is None else read_records(existing(self.path))
        return split_pool(records, _COLUMNS, self.partition, seed)
