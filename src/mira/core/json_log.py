"""Log lines as JSON objects, for machines that collect them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, logger, message; ``round`` where it is known, and ``exception``, the
    traceback of an error.

    ``round``: that of the lines that name none of their own (``extra={"round": 3}``). All but ASCII is escaped, so that no
    content of a line can begin another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.round: int | None = None

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        round = getattr(record, "round", self.round)
        if round is not None:
            values["round"] = round
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values)
