"""The records of a run as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mira.core.errors import UserError, did_you_mean
from mira.core.loop import Record
from mira.core.robust import COUNTED

if TYPE_CHECKING:
    import pandas as pd

_OF_CLIENT = ("train_loss", "steps", "lost", COUNTED)  # keys of a record that hold a value for each client


def table(records: Sequence[Record], names: Sequence[str]) -> pd.DataFrame:
    """A table with a row for each round and client (index: round, client) and a column for each metric; NaN if not evaluated.

    Columns: validation_loss, test_loss, perplexity, train_loss, steps, lost (the reason), counted (the share of its weight, with
    server.robust), bytes_up, bytes_down, and those of answers. Raises UserError without pandas.
    """
    try:
        import pandas as pd
    except ImportError:
        raise UserError("metrics: a table needs pandas; pip install 'mira-fl[pandas]'") from None
    rows = [{"round": record["round"], "client": name} | _of(record, name) for record in records for name in names]
    return pd.DataFrame(rows).set_index(["round", "client"]) if rows else pd.DataFrame()


def column(found: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric of ``table`` as round × client. Raises UserError for an unknown metric."""
    if metric not in found.columns:
        raise UserError(f"metrics: no metric is called '{metric}'{did_you_mean(metric, found.columns)}")
    order = list(dict.fromkeys(found.index.get_level_values("client")))
    wide: pd.DataFrame = found[metric].unstack("client")[order]
    return wide


def _of(record: Record, name: str) -> dict[str, Any]:
    return dict(_pairs(record, name))


def _pairs(record: Record, name: str) -> Iterator[tuple[str, Any]]:
    unmeasured = record.get("unmeasured", {})
    if name not in unmeasured:
        yield from record.get("clients", {}).get(name, {}).items()
    for key in _OF_CLIENT:
        if name in record.get(key, {}):
            yield key, record[key][name]
    for way, count in record.get("client_bytes", {}).get(name, {}).items():
        yield f"bytes_{way}", count
    yield from record.get("answers", {}).get("clients", {}).get(name, {}).items()
