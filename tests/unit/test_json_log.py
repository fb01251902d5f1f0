"""Log lines as JSON objects."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

from mira.core.json_log import JsonFormatter


def written(formatter: JsonFormatter, message: str, *values: object, **more: object) -> dict[str, object]:
    record = logging.LogRecord("mira.fleet", logging.WARNING, "file.py", 1, message, values, None)
    record.__dict__.update(more)
    line = formatter.format(record)
    assert line.isprintable()
    assert line.isascii()
    whole: dict[str, object] = json.loads(line)
    return whole


def test_a_line_is_one_object() -> None:
    formatter = JsonFormatter()
    found = written(formatter, "%s: a\nb\x1b[31m \u2028 ε", "hospital-1", created=0.5)
    assert found == {
        "time": "1970-01-01T00:00:00.500+00:00", "level": "warning", "logger": "mira.fleet",
        "message": "hospital-1: a\nb\x1b[31m \u2028 ε",
    }  # fmt: skip
    formatter.round = 3
    assert written(formatter, "x")["round"] == 3
    assert written(formatter, "x", round=7)["round"] == 7


def test_an_error_has_its_traceback() -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        found = written(JsonFormatter(), "it failed", exc_info=(ValueError, error, error.__traceback__))
    assert "ValueError: wrong" in str(found["exception"])


PROGRAM = """
import sys, warnings, logging
from mira.cli.terminal import err_console, log_as_json, say
ours = logging.getLogger("mira")
ours.propagate, ours.level = False, logging.INFO  # as main() has them
formatter = log_as_json()
say("for [red]people")
err_console.print("take care", style="yellow")
err_console.print("error: no", style="red")
logging.getLogger("mira.x").info("ours")
logging.getLogger("other").info("not wanted")
logging.getLogger("other").warning("a library's")
warnings.warn("old", FutureWarning)
assert not err_console.is_terminal
raise RuntimeError("a bug")
"""


def test_every_line_on_standard_error_is_json(tmp_path: Path) -> None:
    """Messages, progress, libraries, warnings and the traceback of a bug; in a process of its own, which it changes."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("info", "mira.cli"), ("warning", "mira.cli"), ("error", "mira.cli"), ("info", "mira.x"), ("warning", "other"),
        ("warning", "py.warnings"), ("critical", "mira"),
    ]  # fmt: skip
    assert lines[0]["message"] == "for [red]people"
    assert "RuntimeError: a bug" in lines[-1]["exception"]
    assert (done.returncode, done.stdout) == (1, "")
