"""Execution of a comparison: each run in its own folder, tuning on validation data, one evaluation of the test split."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from rich.console import Console

from mira import config
from mira.comparison.live import Live, Say
from mira.comparison.loop import Loop
from mira.comparison.machines import Same, places_of
from mira.comparison.on_ray import workers_on
from mira.comparison.plan import Job, Plan
from mira.comparison.processes import Processes, check_main
from mira.comparison.progress import sizes
from mira.comparison.shares import Machine, Need, number_of_workers, share_of_a_run, threads_of_a_run
from mira.comparison.work import InThisProcess
from mira.comparison.workers import Kind, Task, Workers
from mira.core.errors import UserError
from mira.core.machine import Share, available_memory, total_memory
from mira.core.threads import usable_cores
from mira.runner.checking import weights_of
from mira.store import Store
from mira.store.folders import alone_in

log = logging.getLogger(__name__)


def compare(
    plan: Plan, out: Path, command: str, results: Path | None = None, say: Say = lambda line: None,
    workers: int | str = 1, unlike: bool = False, ray: str | None = None, console: Console | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Do the remaining runs of ``plan`` in the folder ``out``, and return its compare.json (docs/commands/compare.md).

    The tables are written as entries are complete, to ``out`` and, except for LaTeX, to ``results``. ``workers``: runs at a time;
    1: in this process; "auto": as many as cores and memory allow. ``unlike``: runs may be of unlike machines. ``ray``: "auto" or
    the address of a Ray cluster to run on. ``console``: that of ``say``, for the live view. Raises UserError where a run of
    another configuration or on other data lies there, where another process works there, or where no entry could be completed.
    """
    check_main()
    with alone_in(out):
        log.info("%d runs: %s", plan.total, sizes(plan))
        for line in fixed_strengths(plan):
            log.info("%s", line)
        if results is not None:
            _check_writable(results)
        _check_privacy(plan)
        if (caution := privacy_told(plan)) is not None:
            log.warning("%s", caution)
        same = Same(unlike)
        there = _Existing.checked(plan, out, same)
        weights, here = weights_of(plan.base), _this_machine(plan)
        threads = threads_of_a_run(plan, here, weights, there.threads)
        make = _Tasks(threads, share_of_a_run(plan.comparison.resources, here, threads), there.day)
        if ray is not None and workers not in (1, "auto"):
            raise UserError(
                f"--workers {workers}: is for this machine, and --ray uses the whole cluster; give one of the two"
            )
        if ray is None:
            count, why = number_of_workers(workers, plan, here, threads, Need.of(there.peaks, weights))
            log.info("%s", why)
            at_work = _workers_here(plan, out, count)
        else:
            _check_importable(plan, "ray", "without ray")
            at_work = workers_on(ray, plan, out, threads, same)
        try:
            with Live(plan, out, say, console) as live:
                return Loop(plan, out, make, same, live, command, results, here=ray is None).run(at_work)
        finally:
            at_work.stop()


def _workers_here(plan: Plan, out: Path, count: int) -> Workers:
    if count == 1:
        return InThisProcess(out)
    _check_importable(plan, f"workers={count}", "with workers=1")
    return Processes(count, out)


@dataclass(frozen=True)
class _Tasks:
    """Makes tasks that are alike in all but their job."""

    threads: int
    share: Share
    day: str

    def __call__(self, kind: Kind, job: Job) -> Task:
        return Task(kind, replace(job, experiment=config.resolved(job.experiment)), self.threads, self.share, self.day)


@dataclass(frozen=True)
class _Existing:
    """The runs that a comparison's folder holds already. ``threads``: those of the first one; None without any. ``day``: the date
    of the first prompts that tell one, else today's. ``peaks``: peak memory of the finished ones, in bytes."""

    threads: int | None
    day: str
    peaks: tuple[int, ...]

    @staticmethod
    def checked(plan: Plan, out: Path, same: Same) -> _Existing:
        """Read the existing runs. Raises UserError, before any run, where one has another configuration than the plan, or differs
        from the others."""
        stores = list(_existing(plan, out, same))
        environments = [environment for environment, _ in stores]
        days = (environment.get("prompt", {}).get("date") for environment in environments)
        return _Existing(
            next((environment["threads"] for environment in environments), None),
            next(filter(None, days), date.today().isoformat()),
            tuple(result["peak_memory_bytes"] for _, result in stores if result is not None),
        )


def _existing(plan: Plan, out: Path, same: Same) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """The environment and the result (None: not finished) of each existing run, whose configuration is checked."""
    for job in plan.every_job():
        folder = out / job.folder
        if not Store.exists(folder):
            continue
        with Store.open(folder, writable=False) as store:
            environment, result = store.environment(), store.result()
            there = config.recorded(store.config(), environment, store.folder)
        wanted = config.dated(config.resolved(job.experiment), there.prompt.date)
        if differences := config.differences(there, wanted):
            raise UserError(
                f"{folder}: was started with another configuration: {'; '.join(differences)} (here: the run folder,"
                " there: the comparison); undo the change, give another --out, or remove the folder"
            )
        same.check(job, environment, places_of(folder, environment))
        yield environment, result


def fixed_strengths(plan: Plan) -> list[str]:
    """A line for each entry with a strength that is a number because its clients cannot choose."""
    told = ((job.entry, config.strength_told(job.experiment)) for job in plan.every_job())
    return list(dict.fromkeys(f"entries.{entry}: {line}" for entry, line in told if line is not None))


def privacy_told(plan: Plan) -> str | None:
    """A line for people where the runs protect examples and are no simulations; None elsewhere."""
    if all(job.experiment.privacy is None or job.experiment.privacy.simulation for job in plan.every_job()):
        return None
    return (
        "privacy: each run counts its own epsilon; all runs of this comparison are on the same data and cost more together"
        " (docs/privacy.md)"
    )


def _this_machine(plan: Plan) -> Machine:
    gpus = 0 if plan.base.model.device == "cpu" else torch.cuda.device_count()
    return Machine(usable_cores(), total_memory(), available_memory(), gpus)


def _check_privacy(plan: Plan) -> None:
    for privacy in (job.experiment.privacy for job in plan.every_job()):
        if privacy is not None and not privacy.by_example:
            raise UserError(
                "privacy: sites add the noise (mira server), and a comparison has no sites; set privacy.unit=example, or leave"
                " privacy out"
            )


def _check_importable(plan: Plan, given: str, otherwise: str) -> None:
    """Raise UserError where an entry uses a class of this process, which no other process knows."""
    for by_point in plan.jobs.values():
        for section, plugin in config.plugins(by_point[0][0].experiment).items():
            if not plugin["package"]:
                raise UserError(
                    f"{given}: {section} '{plugin['name']}' ({plugin['place']}) is registered in this process alone;"
                    f" run it {otherwise}, or install it as a package with an entry point (docs/plugins.md)"
                )


def _check_writable(results: Path) -> None:
    """Raise UserError, before any run, where ``results`` cannot be written to."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise UserError(f"--results {results}: cannot be written to ({error.strerror}); name another folder") from None
