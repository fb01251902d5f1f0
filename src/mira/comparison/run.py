"""Execution of a comparison: each run in its own folder, tuning on validation data, one evaluation of the test split."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mira import config
from mira.comparison.plan import Job, Plan
from mira.comparison.progress import Estimate, Progress, Say, by_finished, sizes
from mira.comparison.summary import entry_of, summary
from mira.comparison.tables import FILES
from mira.config import Experiment
from mira.core.errors import UserError
from mira.runner import run as experiment
from mira.runner.callbacks import Callback, Callbacks
from mira.runner.measuring import measured
from mira.runner.recording import reopened, state_of
from mira.store import Store
from mira.store.files import TESTED, pack_json, read_json, replace
from mira.store.folders import alone_in

log = logging.getLogger(__name__)

JSON = "compare.json"


def compare(
    plan: Plan, out: Path, command: str, results: Path | None = None, say: Say = lambda line: None
) -> dict[str, Any]:
    """Do the remaining runs of ``plan`` in the folder ``out``, and return its compare.json (docs/commands/compare.md).

    The tables are written after each entry, to ``out`` and, except for LaTeX, to ``results``. Raises UserError where a run there
    was started with another configuration or on other data, or where another process works there.
    """
    with alone_in(out):
        return _compare(plan, out, command, results, say)


def _compare(plan: Plan, out: Path, command: str, results: Path | None, say: Say) -> dict[str, Any]:
    log.info("%d runs: %s", plan.total, sizes(plan))
    if results is not None:
        _check_writable(results)
    _check_configurations(plan, out)
    progress, same = Progress(plan.total, say), _Same()
    known = by_finished(plan, out, say)
    callbacks = [] if known else [Estimate(plan.total, plan.base.evaluation.every, say)]
    entries: list[dict[str, Any]] = []
    value: dict[str, Any] = {}
    for name, by_point in plan.jobs.items():
        tuned = [
            [_run(job, out, same, progress, callbacks) for job in jobs if job.seed in plan.tune_seeds]
            for jobs in by_point
        ]
        means = [_mean_or_inf(losses) for losses in tuned]
        if min(means) == inf:
            raise UserError(
                f"entries.{name}: no finite validation loss at any point of the grid; try smaller learning rates"
            )
        chosen = by_point[means.index(min(means))]
        for job in chosen:
            if job.seed not in plan.tune_seeds:
                _run(job, out, same, progress, callbacks)
        tested = [_tested(out / job.folder) for job in chosen]
        tuning = [(jobs[0].point, losses) for jobs, losses in zip(by_point, tuned, strict=True)]
        entries.append(entry_of(plan, name, chosen, tuning, tested, out))
        value = summary(plan, entries, same.environment, command)
        _write(value, out, results)
    return value


def _run(job: Job, out: Path, same: _Same, progress: Progress, callbacks: Sequence[Callback]) -> float | None:
    """The lowest validation loss of a run, which is started or continued if it is not finished."""
    folder = out / job.folder
    began = time.perf_counter()
    finished = _is_finished(folder)
    if not finished and Store.exists(folder):
        experiment.resume(folder, callbacks)
    elif not finished:
        experiment.run(same.dated(job.experiment), folder, callbacks)
    with Store.open(folder, writable=False) as store:
        same.check(job, store.environment())
        best = store.best_round
        loss = None if best is None else store.metrics()[best]["validation_loss"]
    progress.done(job, loss, None if finished else time.perf_counter() - began)
    return loss


def _is_finished(folder: Path) -> bool:
    if not Store.exists(folder):
        return False
    with Store.open(folder, writable=False) as store:
        return store.result() is not None


def _tested(folder: Path) -> dict[str, Any]:
    """Test losses, answers and transfer at the validation-best round, and test losses after the last round and before training.
    Files of older comparisons have no losses before training; these are added where the run can be opened."""
    kept: dict[str, Any] = read_json(folder / TESTED) if (folder / TESTED).exists() else {}
    if "start" in kept:
        return kept
    try:
        value = _measured(folder, kept)
    except UserError as error:
        if not kept:
            raise
        log.warning("%s: the losses before training cannot be measured: %s", folder, error)
        return kept
    replace(folder / TESTED, pack_json(value))
    return value


def _measured(folder: Path, kept: dict[str, Any]) -> dict[str, Any]:
    with Store.open(folder, writable=False) as store:
        assert store.best_round is not None
        session = reopened(store)
        losses = partial(measured, session, callbacks=Callbacks(()), answers=False, transfer=False)
        start = losses(session.initial_state())
        if kept:
            return kept | {"start": start}
        answers = session.experiment.evaluation.generate
        best = measured(session, state_of(session, store, store.best_round), Callbacks(()), answers, transfer=True)
        last = best if store.last_round == store.best_round else losses(state_of(session, store))
        return {"best_round": store.best_round, "start": start, "best": best, "last": last}


def _check_configurations(plan: Plan, out: Path) -> None:
    """Raise UserError, before any run, where an existing run has another configuration than the plan."""
    for by_point in plan.jobs.values():
        for job in (job for jobs in by_point for job in jobs):
            folder = out / job.folder
            if not Store.exists(folder):
                continue
            with Store.open(folder, writable=False) as store:
                there = config.recorded(store.config(), store.environment(), store.folder)
            if differences := config.differences(
                there, config.dated(config.absolute(job.experiment), there.prompt.date)
            ):
                raise UserError(
                    f"{folder}: was started with another configuration: {'; '.join(differences)} (here: the run folder,"
                    " there: the comparison); undo the change, give another --out, or remove the folder"
                )


@dataclass
class _Same:
    """The environment of the first run, and the data of the first run of each seed; all other runs must have the same."""

    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[int, Any] = field(default_factory=dict)
    plugins: dict[tuple[str, str], Any] = field(default_factory=dict)

    def dated(self, experiment: Experiment) -> Experiment:
        """``experiment`` with the date that the first run wrote into its prompts."""
        day = self.environment.get("prompt", {}).get("date")
        return config.dated(experiment, day)

    def check(self, job: Job, environment: dict[str, Any]) -> None:
        self.environment = self.environment or environment
        expected = {key: self.environment[key] for key in ("versions", "model", "threads", "device")}
        expected["data"] = self.data.setdefault(job.seed, environment["data"])
        there = dict(environment)
        for section, plugin in environment.get("plugins", {}).items():
            key = f"plug-in {section} {plugin['name']}"
            there[key], expected[key] = plugin, self.plugins.setdefault((section, plugin["name"]), plugin)
        for key, value in expected.items():
            if there[key] != value:
                raise UserError(
                    f"{job.folder}: {key} is {there[key]}, but {value} in the other runs; runs of a comparison need the"
                    " same: restore it, or start another comparison with --out"
                )


def _write(value: dict[str, Any], out: Path, results: Path | None) -> None:
    files = {JSON: pack_json(value), **{name: make(value).encode() for name, make in FILES.items()}}
    for folder in filter(None, (out, results)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            if folder == out or not name.endswith(".tex"):
                replace(folder / name, data)


def _check_writable(results: Path) -> None:
    """Raise UserError, before any run, where ``results`` cannot be written to."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise UserError(f"--results {results}: cannot be written to ({error.strerror}); name another folder") from None


def _mean_or_inf(losses: Sequence[float | None]) -> float:
    """The mean; infinite where a run has no finite loss, which rules out its point."""
    return inf if None in losses else sum(loss for loss in losses if loss is not None) / len(losses)
