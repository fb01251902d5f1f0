"""Comparisons as the process at work in their folder left them in progress.json."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from mira.core.errors import UserError
from mira.core.escape import visible
from mira.store.files import WHERE, corrupt, read_json
from mira.store.folders import PROGRESS, in_use

_DEPTH = 4  # of a run folder below its comparison: runs/ENTRY/POINT/seed-N


def summary(folder: Path) -> dict[str, Any]:
    """The comparison in ``folder``. docs/commands/reports.md documents the fields. Raises UserError where its file is damaged."""
    value = read_json(folder / PROGRESS)
    try:
        counts = {key: int(value[key]) for key in ("runs", "trained", "tests", "tested")}
        failed = [{key: str(each[key]) for key in ("run", "task", "reason")} for each in value["failed"]]
        whole = counts["trained"] == counts["runs"] and counts["tested"] == counts["tests"]
        working = in_use(folder)
        ended = "finished" if whole else "failed" if failed else "interrupted"
        return {
            "comparison": str(folder),
            "name": str(value["name"]),
            "state": "running" if working else ended,
            **counts,
            "under_way": len(value["under_way"]) if working else 0,
            "failed": failed,
        }
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / PROGRESS}: not written by 'mira compare' ({type(error).__name__}: {error})"
        ) from None


def under_way(folder: Path) -> Set[Path]:
    """The run folders that the process at work in the comparison ``folder`` has under way.

    A run on another machine is not locked here: the folder has a copy of its committed rounds only.
    """
    if not (folder / PROGRESS).is_file() or not in_use(folder):
        return frozenset()
    try:
        return {folder / each["run"] for each in read_json(folder / PROGRESS)["under_way"]}
    except (UserError, KeyError, TypeError):  # named by ``summary``
        return frozenset()


def host_of(run: Path) -> str | None:
    """The host that computed the last rounds of a comparison's run; None for another kind of run, and in one of an older version.
    Raises UserError where its file is damaged."""
    path = run / WHERE
    if not path.is_file():
        return None
    try:
        host = read_json(path)[-1]["host"]
    except (LookupError, TypeError) as error:
        raise corrupt(path, f"no list of machines: {type(error).__name__}: {error}") from None
    return None if host is None else str(host)


def of_run(run: Path) -> Path:
    """The folder of the comparison that ``run`` may be a part of."""
    parents = run.absolute().parents
    return parents[min(_DEPTH, len(parents)) - 1]


def lines(value: Mapping[str, Any]) -> list[str]:
    """'comparison demo: running, 12 of 51 runs, 3 of 51 on test data, 2 under way, 1 failed', and a line for each failed task."""
    parts = [value["state"], f"{value['trained']} of {value['runs']} runs"]
    parts += [f"{value['tested']} of {value['tests']} on test data"]
    parts += [f"{value['under_way']} under way"] if value["under_way"] else []
    parts += [f"{len(value['failed'])} failed"] if value["failed"] else []
    failed = [f"  failed: {each['run']}: {each['reason']}" for each in value["failed"]]
    return [visible(line) for line in (f"comparison {value['name']}: {', '.join(parts)}", *failed)]
