"""The content of compare.json (docs/commands/compare.md), from the runs of a comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mira import config
from mira.comparison.grid import Point, edges
from mira.comparison.machines import places_of
from mira.comparison.paired import against, primary
from mira.comparison.plan import Job, Plan, shown
from mira.comparison.schedule import Failure
from mira.core.git_commit import commit
from mira.results.statistics import mean
from mira.runner.evaluation import LABEL_ACCURACY
from mira.store import Store

# Values of a run that the table averages over seeds.
MEASURES = (
    "local_loss", "local_loss_last", "global_loss", "mean_row_loss", "rouge_l", "exact_match", "label_accuracy",
    "validation_loss",
    "bytes", "seconds",
)  # fmt: skip


def entry_of(
    plan: Plan, name: str, point: Point, tuning: Sequence[tuple[Point, Sequence[float | None]]],
    tested: Sequence[tuple[Job, dict[str, Any]]], out: Path,
) -> dict[str, Any]:  # fmt: skip
    """An entry of compare.json: its tuning, its runs at the chosen ``point``, and their means over seeds.

    ``tested``: the runs and their test measurements. A seed that failed is missing, and no mean is given then.
    """
    runs = [_run(job, test, out) for job, test in tested]
    missing = [None] * (len(plan.comparison.seeds) - len(runs))
    return {
        "name": name,
        "sets": shown(plan.comparison.sets(name)),
        "chosen": shown(point),
        "edge": shown(edges([tried for tried, _ in tuning], point)),
        "tuning": [
            {"point": shown(point), "validation_loss": _spread(losses)["mean"], "losses": list(losses)}
            for point, losses in tuning
        ],
        **{measure: _spread([*(run[measure] for run in runs), *missing]) for measure in MEASURES},
        "runs": runs,
    }


def failed_task(failure: Failure) -> dict[str, Any]:
    """A line of ``failed`` in compare.json about a run or the evaluation of one."""
    job = failure.job
    return {"entry": job.entry, "point": shown(job.point), "seed": job.seed, "reason": failure.reason}


def failed_entry(name: str, failures: Sequence[Failure]) -> dict[str, Any]:
    """A line of ``failed`` in compare.json about an entry without a point. ``failures``: those of the comparison."""
    reason = "no finite validation loss at any point of the grid; try smaller learning rates"
    if any(failure.job.entry == name for failure in failures):
        reason = "no point of the grid is left: its runs failed or have no finite validation loss"
    return {"entry": name, "point": None, "seed": None, "reason": reason}


def summary(
    plan: Plan, entries: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]], environment: dict[str, Any],
    command: str,
) -> dict[str, Any]:  # fmt: skip
    """The content of compare.json. ``entries``: those complete so far. ``failed``: tasks and entries that were given up."""
    done = [entry["name"] for entry in entries]
    return {
        "name": plan.name,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "commit": commit(),
        "machine": environment["machine"] | {"device": environment["device"], "threads": environment["threads"]},
        "versions": environment["versions"],
        "model": environment["model"],
        "complete": len(done) == len(plan.jobs) and not failed,
        "failed": list(failed),
        "seeds": plan.comparison.seeds,
        "tune_seeds": plan.tune_seeds,
        "experiment": config.dump(plan.base),
        "primary": primary(plan.comparison.primary, entries),
        "entries": [
            entry | {"against": [against(entry, other) for other in entries if _meets(plan, entry, other)]}
            for entry in entries
        ],
    }


def _run(job: Job, test: dict[str, Any], out: Path) -> dict[str, Any]:
    with Store.open(out / job.folder, writable=False) as store:
        records, environment = store.metrics(), store.environment()
    start, best, last = test.get("start"), test["best"], test["last"]
    answers, transfer = best.get("answers", {}), best["transfer"]
    training = [record for record in records if record["round"]]
    names = list(best["clients"])
    groups = environment.get("groups") or [""] * len(names)  # absent in runs of older versions
    return {
        "seed": job.seed,
        "run": job.folder.as_posix(),
        "commit": environment.get("commit"),
        "where": places_of(out / job.folder, environment),
        "best_round": test["best_round"],
        "validation_loss": best["validation_loss"],
        "local_loss_start": start and start["local_loss"],
        "local_loss": best["local_loss"],
        "local_loss_last": last["local_loss"],
        "global_loss": transfer.get("global_loss"),
        "mean_row_loss": transfer.get("mean_row_loss"),
        "rouge_l": answers.get("rouge_l"),
        "exact_match": answers.get("exact_match"),
        "label_accuracy": answers.get(LABEL_ACCURACY),
        "bytes": sum(record.get("bytes_up", 0) + record.get("bytes_down", 0) for record in records),
        "seconds": sum(record["seconds"] for record in records),
        "lost": sum(len(record["lost"]) for record in training),
        "clients": [
            {
                "name": name,
                "group": group,
                "loss_start": start and start["clients"][name]["test_loss"],
                "loss": scores["test_loss"],
                "loss_last": last["clients"][name]["test_loss"],
                "rouge_l": answers["clients"][name]["rouge_l"] if answers else None,
                "exact_match": answers["clients"][name]["exact_match"] if answers else None,
                "label_accuracy": answers["clients"][name].get(LABEL_ACCURACY) if answers else None,
            }
            for (name, scores), group in zip(best["clients"].items(), groups, strict=True)
        ],
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean over seeds and half the 95 % interval. None where a seed has no number; no interval for one seed."""
    found = mean(values)
    return {"mean": found.value, "interval": found.half} if found else {"mean": None, "interval": None}


def _meets(plan: Plan, entry: dict[str, Any], other: dict[str, Any]) -> bool:
    return other["name"] in plan.baselines and other is not entry
