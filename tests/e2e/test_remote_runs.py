"""A run of a comparison on a machine that does not share the folder, whose worker dies while the run's end is on its way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.sample_config import ADAPTERS, outcome, settings, write_clients
from mira import config
from mira.comparison.plan import Job
from mira.comparison.remote import Remote
from mira.comparison.workers import Outcome, Task
from mira.core.machine import Share
from mira.store.mirror import Mirror, Parcel, whole

RUN = Path("runs/seed-0")


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """The log as before: a worker's process has it for itself."""
    ours = logging.getLogger("mira")
    before = ours.handlers, ours.propagate
    yield
    ours.handlers, ours.propagate = before


@pytest.fixture
def task(tiny_folder: Path, tmp_path: Path) -> Task:
    experiment = config.parse(settings(tiny_folder, write_clients(tmp_path / "data.jsonl"), rounds=1))
    job = Job("MIRA", {}, 0, config.resolved(experiment), RUN)
    return Task("run", job, 1, Share(10**9, 1.0), "2026-01-01")


def worker(out: Path) -> Remote:
    return Remote(out, ".elsewhere", "cpu", lambda: "node")


def parcels(remote: Remote, task: Task, out: Path) -> Iterator[Parcel]:
    """The parts of a run that arrive to be done, or to be continued."""
    for parcel in whole(out / RUN):
        remote.receive(RUN, parcel)
    remote.begin(task)
    while True:
        for news in remote.news(60.0):
            if isinstance(news, Outcome):
                assert news.error is None
                return
            yield news


def applied(arrived: Iterator[Parcel], out: Path) -> None:
    copy = Mirror(out / RUN)
    for parcel in arrived:
        copy.apply(parcel)
    copy.close()


def test_a_run_whose_worker_dies_at_its_end_is_whole_after_the_next_worker(task: Task, tmp_path: Path) -> None:
    out, remote = tmp_path / "whole", worker(tmp_path / "whole")
    sent = list(parcels(remote, task, out))
    applied(iter(sent), out)
    expected = outcome(out / RUN)
    assert expected["result"]
    assert any(name.startswith(ADAPTERS) for name in expected["tensors"])
    names = [parcel[-1].name for parcel in sent]
    ends = [*range(names.index("rounds/000001.json"), len(sent), 6), len(sent) - 2, len(sent) - 1]
    for end in ends:  # the last parcel that arrived
        out = tmp_path / str(end)
        applied(iter(sent[: end + 1]), out)
        applied(parcels(remote, task, out), out)
        assert outcome(out / RUN) == expected, names[end]
    remote.leave()
