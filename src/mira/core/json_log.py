"""Log lines as JSON objects, for machines that collect them."""

from __future__ import annotations

import json
import logging
import sys
import threading
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


def log_as_json(source: str) -> JsonFormatter:
    """Make every line on standard error a JSON object: MIRA's own, those of libraries, warnings, and the traceback of a bug, in
    any thread. ``source``: the logger of such a traceback."""
    formatter, handler, log = JsonFormatter(), logging.StreamHandler(sys.stderr), logging.getLogger(source)
    handler.setFormatter(formatter)
    logging.getLogger("mira").handlers = [handler]
    logging.getLogger().handlers = [handler]
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: log.critical("a bug of MIRA", exc_info=(kind, error, trace))
    threading.excepthook = lambda failed: log.critical("a bug of MIRA", exc_info=failed.exc_value)
    return formatter
