"""A small experiment on a tiny model: a run of it takes about a second. Child processes import it too."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mira import Experiment, cli, run
from mira.runner.callbacks import Callback

ADAPTERS = "adapters"
NAMES = ("ann", "bob", "cleo", "dan")


def write_clients(file: Path, names: Sequence[str] = NAMES, examples: int = 8) -> Path:
    """One JSONL file for all clients; two groups, by turns."""
    with file.open("w", encoding="utf-8") as lines:
        for k, name in enumerate(names):
            for n in range(examples):
                line = {
                    "client": name, "group": "even" if k % 2 == 0 else "odd",
                    "instruction": "Add." if k % 2 == 0 else "Take away.", "input": f"{n} and {k}",
                    "output": str(n + k if k % 2 == 0 else n - k),
                }  # fmt: skip
                lines.write(json.dumps(line) + "\n")
    return file


def settings(model: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """The experiment as a mapping; ``sections`` are merged into it key by key."""
    values: dict[str, Any] = {
        "name": "small",
        "rounds": 3,
        "model": {"name": str(model)},
        "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "data": {"source": "jsonl", "path": str(data), "client_column": "client", "group_column": "group"},
        "split": {"train": 4, "validation": 2, "test": 2},
        "prompt": {"template": "alpaca"},
        "training": {"lr": 0.02, "local_steps": 2, "batch_size": 2},
        "engine": {"threads": 1},
        "evaluation": {"max_new_tokens": 3, "transfer_clients": 3, "transfer_examples": 1},
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def write_config(file: Path, model: Path, data: Path, /, **sections: Any) -> Path:
    file.write_text(json.dumps(settings(model, data, **sections)), encoding="utf-8")  # JSON is YAML
    return file


# What a run's records and result hold of time and memory; all else is the same whenever it is run again.
VOLATILE = ("seconds", "tokens_per_second", "phase_seconds", "peak_memory_bytes")


def lasting(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in VOLATILE}


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves behind, to the last bit, time and memory aside."""
    kinds = ("rows", "optim", "extra", ADAPTERS)
    tensors = [file for kind in kinds for file in sorted((folder / kind).rglob("*.safetensors"))]
    tensors += [folder / "graph.safetensors", folder / "start.safetensors"]
    return {
        "tensors": {str(file.relative_to(folder)): file.read_bytes().hex() for file in tensors},
        "metrics": [lasting(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "result": lasting(json.loads((folder / "result.json").read_text())),
        "config": (folder / "config.yaml").read_text(),
    }


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file in a folder; the lock, which is empty, and curves to look at aside."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock" and file.parent.name != "tensorboard"
    }


class Interrupt(Callback):
    """A callback under which a run stops once ``round`` is committed, as if somebody had pulled the plug."""

    class Pulled(Exception):
        pass

    def __init__(self, round: int) -> None:
        self.last = round

    def round(self, record: dict[str, Any]) -> None:
        if record["round"] == self.last:
            raise self.Pulled


def begin(experiment: Experiment, folder: Path, rounds: int) -> Path:
    """A run folder with ``rounds`` rounds committed, and more to come."""
    with suppress(Interrupt.Pulled):
        run(experiment, folder, [Interrupt(rounds)])
    return folder


@dataclass(frozen=True)
class Ended:
    status: object
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a command refused: one line on standard error, nothing on standard output."""
        assert self.status == 2, self
        assert self.out == "", self
        assert "Traceback" not in self.err
        last = self.err.splitlines()[-1]
        assert last.startswith("error: "), self
        assert self.err.count("error: ") == 1
        return last.removeprefix("error: ")


def mira(*arguments: object) -> Ended:
    """The command line, called in this process. A bug of ours comes out as the exception it is."""
    out, err = StringIO(), StringIO()
    log = logging.getLogger("mira")
    before = log.handlers, log.level, log.propagate
    with patch("sys.argv", ["mira", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
            status: object = 0  # a bug, if main() ever returns
        except SystemExit as end:
            status = end.code or 0
        finally:
            log.handlers, level, log.propagate = before
            log.setLevel(level)
    return Ended(status, out.getvalue(), err.getvalue())
