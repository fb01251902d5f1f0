"""``mira runs``: the run folders below a folder, with their headline figures, and the comparisons there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mira.config import mixes_along_graph
from mira.config.yaml_io import mapping
from mira.core.errors import UserError
from mira.results import comparisons
from mira.results.tables import Fitting, data_size, number
from mira.store import Store
from mira.store.files import LOCK, TESTED, is_locked, read_json
from mira.store.folders import PROGRESS

Summary = dict[str, Any]


@dataclass(frozen=True)
class Listing:
    """Readable runs, comparisons, and what cannot be read with the reason (docs/commands/reports.md)."""

    runs: list[Summary]
    comparisons: list[Summary]
    broken: list[Summary]

    def __bool__(self) -> bool:
        return bool(self.runs or self.comparisons or self.broken)


def listing(root: Path) -> Listing:
    """All runs and comparisons in or below ``root``. Raises UserError where ``root`` is not a folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; 'mira run' makes run folders below runs/, or as --out says")
    found = Listing([], [], [])
    under_way = cache(comparisons.under_way)
    for folder, is_run in _folders(root):
        try:
            if is_run:
                at_work = folder.absolute() in under_way(comparisons.of_run(folder))
                found.runs.append(_summary(folder, at_work))
            else:
                found.comparisons.append(comparisons.summary(folder))
        except UserError as error:
            found.broken.append({"run": str(folder), "reason": str(error)})
        except OSError as error:
            found.broken.append({"run": str(folder), "reason": f"cannot be read ({error.strerror})"})
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:  # records of another version of mira
            found.broken.append({"run": str(folder), "reason": f"malformed records ({type(error).__name__}: {error})"})
    return found


def table(root: Path, found: Listing) -> Group:
    """One line for each run, two where the console is narrow, oldest first; then the comparisons, and what is unreadable."""
    runs = sorted(found.runs, key=lambda each: str(each["date"]))
    grids = [_grid(root, runs, stacked) for stacked in (False, True)]
    lines = [Text(line, overflow="fold") for each in found.comparisons for line in comparisons.lines(each)]
    broken = [Text(f"{each['run']}: {_reason(each)}", style="yellow", overflow="fold") for each in found.broken]
    return Group(*([Fitting(grids, bare=("what",))] if runs else []), *lines, *broken)


def _grid(root: Path, runs: Sequence[Summary], stacked: bool) -> Table:
    """The table of ``runs``. ``stacked``: the description of a run is below its name."""
    title = f"runs in {root}"
    grid = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title=title, title_justify="left"
    )
    grid.add_column("run", overflow="fold")
    if not stacked:
        grid.add_column("what", overflow="fold")
    for name in ("clients", "round", "loss", "match", "sent", "s"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("started", no_wrap=True)
    for run in runs:
        state = "" if run["state"] == "finished" else f" {run['state']}"
        state += f" on {run['host']}" if run["state"] == "running" and run["host"] else ""
        name, what = os.path.relpath(run["run"], root), f"{run['method']}, {run['adapter']}, {run['graph']}"
        grid.add_row(
            *([Text(f"{name}\n {what}")] if stacked else [Text(name), Text(what)]), str(run["clients"]),
            f"{run['round']}/{run['rounds']}{state}", number(run["best_loss"]), number(run["exact_match"], 2),
            data_size(run["bytes"]), f"{run['seconds']:.0f}", run["date"][5:16].replace("T", " "),
        )  # fmt: skip
    return grid


def _folders(root: Path) -> Iterator[tuple[Path, bool]]:
    """Run folders (True), also those with a broken creation or manifest, and folders of comparisons (False). Folders below a run
    are skipped, links are not followed."""
    for place, names, files in os.walk(root):
        if (
            "store.json" in files
            or ({"config.yaml", "environment.json"} & set(files) and "rounds" in names)
            or LOCK in files
        ):
            names.clear()
            yield Path(place), True
        elif PROGRESS in files:
            yield Path(place), False
        names.sort()


def _summary(folder: Path, at_work: bool) -> Summary:
    """The figures of a run. ``at_work``: a comparison has it under way."""
    with Store.open(folder, writable=False) as store:
        config = mapping(store.config(), str(folder / "config.yaml"))
        records, result = store.metrics(), store.result()
        best = records[store.best_round] if store.best_round is not None else {}
        answers = result["best"] if result else next((r["answers"] for r in reversed(records) if "answers" in r), {})
        if (folder / TESTED).is_file():  # a run of a comparison: its own records have no test losses
            tested = read_json(folder / TESTED)["best"]
            best, answers = {"local_loss": _figure(tested.get("local_loss"))}, tested.get("answers", {})
        graph, adapter = config.get("graph", {}), config.get("adapter", {})
        return {
            "run": str(folder),
            "name": config["name"],
            "seed": config["seed"],
            "method": config["method"]["name"],
            "adapter": adapter.get("kind", "lora") + (f" r{adapter['rank']}" if "rank" in adapter else ""),
            "graph": graph.get("name", "none") if mixes_along_graph(config["method"]["name"]) else "none",
            "clients": store.environment()["data"]["clients"],
            "round": store.last_round or 0,
            "rounds": config["rounds"],
            "state": "finished" if result else "running" if at_work or is_locked(folder) else "interrupted",
            "host": comparisons.host_of(folder),
            "best_round": store.best_round,
            "best_loss": best.get("local_loss"),
            "exact_match": _figure(answers.get("exact_match")),
            "bytes": sum(record.get("bytes_up", 0) + record.get("bytes_down", 0) for record in records),
            "seconds": sum(record["seconds"] for record in records),
            "date": _started(folder),
        }


def _figure(value: Any) -> float | None:
    if value is None or isinstance(value, int | float):
        return value
    raise TypeError(f"{value!r} is no number")


def _started(folder: Path) -> str:
    """The start of the run: the time of its environment file, which is written once."""
    return (
        datetime.fromtimestamp((folder / "environment.json").stat().st_mtime).astimezone().isoformat(timespec="seconds")
    )


def _reason(broken: Summary) -> str:
    return str(broken["reason"]).removeprefix(f"{broken['run']}: ")
