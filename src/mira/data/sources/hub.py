"""Instruction data sets on the model hub, with their columns mapped to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT
from mira.data.fields import RawRecord
from mira.data.partition import Partition, split_pool
from mira.data.records import Columns
from mira.data.types import Client


@dataclass(frozen=True, config=STRICT)
class HubDataset:
    """A data set on the hub, divided into clients by a partition."""

    path: str
    """Name on the hub, e.g. databricks/databricks-dolly-15k."""
    partition: Partition
    """The partition of the pool into clients."""
    columns: Columns = Field(default_factory=dict)
    """Our fields -> the data set's columns, e.g. {instruction: question, output: answer}; empty: the names are ours."""
    subset: str | None = None
    """The configuration, for a data set with several."""
    split: str = "train"
    """The split of the data set to read; the clients' splits are drawn from it."""
    revision: str | None = None
    """Branch, tag or commit; pin it for reproducible runs."""
    source: Literal["hub"] = "hub"

    def load(self, seed: int) -> list[Client]:
        records = hub_records(self.path, self.subset, self.split, self.revision)
        return split_pool(records, self.columns, self.partition, seed)


def hub_records(path: str, subset: str | None, split: str, revision: str | None) -> Iterator[tuple[str, RawRecord]]:
    """(place, row) for every row. Raises UserError where the library or the data set is not available."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data: reading '{path}' from the hub needs datasets; pip install 'mira-fl[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(path, subset, split=split, revision=revision)
    except Exception as error:  # offline, unknown, gated, no such split: the library has no common base class for them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data: '{path}' cannot be loaded from the hub ({reason}); check name, split and connection, or download it"
            " and use source: jsonl"
        ) from error
    return ((f"{path}[{split}] row {number}", row) for number, row in enumerate(rows))
