"""The live view of a comparison: remaining time, lines, and the screen, from run folders alone."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from helpers.generated_runs import write_run
from mira import config
from mira.comparison import live
from mira.comparison.live import Live, drawn, elsewhere, look
from mira.comparison.machines import note
from mira.comparison.plan import Comparison, Job, Plan
from mira.comparison.progress import Going, Seen, State, estimate, fraction, headline, seconds_left, spread
from mira.comparison.workers import Outcome, Task
from mira.core.errors import UserError
from mira.core.machine import Share, host
from mira.store import Store

EXPERIMENT = config.parse(
    {"rounds": 3, "model": {"name": "m"}, "data": {"source": "builtin"}, "training": {"local_steps": 1}}
)
SECONDS = st.floats(0, 1e6)


def job(seed: int, entry: str = "Local") -> Job:
    return Job(entry, {"training.lr": 0.1}, seed, EXPERIMENT, Path(f"runs/{entry.lower()}/only/seed-{seed}"))


def task(seed: int, kind: str = "run", entry: str = "Local") -> Task:
    return Task(kind, job(seed, entry), 1, Share(10**9), "2026-01-01")  # type: ignore[arg-type]


def plan(seeds: int) -> Plan:
    comparison = Comparison(experiment={}, seeds=list(range(seeds)), entries={"Local": {}})
    return Plan("tiny", comparison, EXPERIMENT, {"Local": [[job(seed) for seed in range(seeds)]]})


# Remaining time.


@given(st.lists(SECONDS, max_size=5), SECONDS, st.integers(0, 6), SECONDS)
def test_time_left_is_never_negative_and_grows_with_the_work(
    under_way: list[float], waiting: float, workers: int, more: float
) -> None:
    left = spread(under_way, waiting, workers)
    assert left >= max([0.0, *under_way])
    assert spread(under_way, waiting + more, workers) >= left
    assert spread([*under_way, more], waiting, workers) >= left
    assert spread([second + more for second in under_way], waiting, workers) >= left
    assert spread(under_way, waiting, workers + 1) <= left


@given(
    st.integers(1, 40), st.integers(0, 40), st.lists(st.integers(0, 12), max_size=4), st.floats(0, 1e5), st.integers(0, 9)
)  # fmt: skip
def test_a_committed_round_never_adds_time(
    runs: int, trained: int, rounds: list[int], later: float, tested: int
) -> None:
    going = tuple(Going(task(n), 0.0, 0.0, 0, Seen(round)) for n, round in enumerate(rounds))
    state = State(runs, runs, 12, 1, trained, tested, going=going, pace=(12, 240.0))
    left = seconds_left(state, later)
    assert left is not None
    assert left >= 0
    assert 0 <= fraction(state) <= 1
    for n, each in enumerate(going):
        further = replace(each, seen=Seen(min(each.seen.round + 1, 12)))
        then = replace(state, going=(*going[:n], further, *going[n + 1 :]))
        after = seconds_left(then, later)
        assert after is not None
        assert after <= left
        assert fraction(then) >= fraction(state)


def test_two_at_a_time_take_half_of_the_time() -> None:
    going = tuple(Going(task(n), 0.0, 0.0) for n in (0, 1))
    state = State(runs=12, tests=0, rounds=10, every=1, going=going, pace=(10, 100.0))
    assert seconds_left(state, 0.0) == 12 * 100 / 2
    assert seconds_left(state, 50.0) == (10 * 100 + 2 * 50) / 2
    assert seconds_left(replace(state, going=going[:1]), 0.0) == 12 * 100
    assert seconds_left(replace(state, pace=(0, 0.0)), 0.0) is None, "no round yet"


def test_the_first_round_gives_an_estimate() -> None:
    going = (Going(task(0), 0.0, 0.0, 0, Seen(1, None, start=0.0, first=10.0, measured=True)),)
    state = State(runs=90, tests=3, rounds=4, every=1, going=going)
    line = estimate(state)
    assert line is not None
    assert line.startswith("about 1 h 00 min for 90 runs, estimated from the first round (1 min a run), plus")
    assert estimate(replace(state, going=(Going(task(0), 0.0, 0.0),))) is None
    assert headline(state, 0.0) == "0 of 90 runs · 0 of 3 on test data · 1 under way · about 1 h 00 min left"


# Run folders.


def test_records_tell_the_progress(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["ann", "bob"], ["even", "odd"], finished=False)
    seen = look(run, Seen())
    with Store.open(run, writable=False) as store:
        start, first, last = store.metrics()
    assert seen == Seen(2, last["validation_loss"], start["seconds"], first["seconds"], True)
    assert look(run, seen) == seen
    (run / "rounds" / "000002.json").write_text("{")
    assert look(run, Seen(1)) == Seen(1), "damaged: the run itself says so"
    assert look(tmp_path / "none", Seen()) == Seen()


@pytest.mark.parametrize(("places", "shown"), [([host(), "node7"], "node7"), (["node7", host()], ""), ([None], "")])
def test_another_host_is_named(places: list[str | None], shown: str, tmp_path: Path) -> None:
    for name in places:
        note(tmp_path, {"host": name, "processor": "P", "cores": 2, "system": "S", "device": "cpu"})
    assert elsewhere(tmp_path) == shown


@pytest.mark.parametrize("text", ["", "{}", "[]", "[3]"])
def test_a_host_that_cannot_be_read_is_left_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "where.json").write_text(text)
    assert elsewhere(tmp_path) == ""


@pytest.fixture
def view(tmp_path: Path) -> Iterator[tuple[Live, list[str], Path]]:
    lines: list[str] = []
    with Live(plan(4), tmp_path, lines.append, clock=lambda: 0.0) as shown:
        yield shown, lines, tmp_path


def kept(folder: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((folder / "progress.json").read_text())
    return value


def test_plain_lines(view: tuple[Live, list[str], Path]) -> None:
    shown, lines, folder = view
    where = {"host": "here"}
    shown.found(job(0), 1.5, 30.0)
    shown.started(task(1))
    shown.started(task(2))
    assert kept(folder)["under_way"] == [
        {"run": "runs/local/only/seed-1", "task": "run"},
        {"run": "runs/local/only/seed-2", "task": "run"},
    ]
    shown.ended(Outcome(task(1), where, 30.0), 1.25)
    shown.ended(Outcome(task(2), where, 5.0, "killed", lost=True), None, again=True)
    shown.started(task(2))
    shown.ended(Outcome(task(2), where, 5.0, "killed", lost=True), None)
    shown.started(task(0, "test"))
    shown.ended(Outcome(task(0, "test"), where, 4.0), None)
    shown.dropped(1, 2)
    assert lines == [
        "run 1 of 4 · Local · training.lr=0.1 · seed 0 · validation 1.5000 · finished before",
        "started · Local · training.lr=0.1 · seed 1",
        "started · Local · training.lr=0.1 · seed 2",
        "about 1 min for 3 runs, estimated from 1 finished runs, plus the evaluation on test data",
        "run 2 of 4 · Local · training.lr=0.1 · seed 1 · validation 1.2500 · 30 s · about 2 min left",
        "put back · Local · training.lr=0.1 · seed 2 · killed",
        "started · Local · training.lr=0.1 · seed 2",
        "failed · Local · training.lr=0.1 · seed 2 · killed",
        "test data · Local · training.lr=0.1 · seed 0 · 4 s",
    ]
    assert kept(folder) == {
        "name": "tiny", "runs": 3, "trained": 2, "tests": 2, "tested": 1, "under_way": [],
        "failed": [{"run": "runs/local/only/seed-2", "task": "run", "reason": "killed"}],
    }  # fmt: skip


def test_the_file_names_nothing_under_way_after_an_interrupt(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Live(plan(4), tmp_path, print) as shown:
            shown.started(task(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert kept(tmp_path)["under_way"] == []


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(live, "write", full)
    with pytest.raises(
        UserError, match=r"progress\.json: cannot be written .*; free some space, then repeat the command"
    ):
        Live(plan(4), tmp_path, print).__enter__()


def test_the_screen() -> None:
    going = (
        Going(task(0), 0.0, 0.0, 0, Seen(1, 1.25)),
        Going(task(1, entry="MIRA"), 0.0, 0.0, where="node7"),
        Going(task(2, "test"), 0.0, 0.0),
    )
    state = State(12, 4, 3, 1, 2, 0, ((task(3), "out of\x1bmemory"),), going, (3, 60.0))
    stream = StringIO()
    Console(file=stream, width=120).print(drawn(state, 0.0))
    head, *rest = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert head.endswith("2 of 12 runs · 0 of 4 on test data · 3 under way · 1 failed · about 3 min left")
    assert rest == [
        "Local · training.lr=0.1 seed 0 round 1/3 · validation 1.2500",
        "MIRA · training.lr=0.1 seed 1 round 0/3 · node7",
        "Local · training.lr=0.1 seed 2 test data",
        "failed: Local · training.lr=0.1 · seed 3 · out of\\x1bmemory",
    ]


def test_a_terminal_is_left_clean(tmp_path: Path) -> None:
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, highlight=False, width=100)
    write_run(tmp_path / job(1).folder, ["ann", "bob"], ["even", "odd"], finished=False)
    with Live(plan(4), tmp_path, console.print, console) as shown:
        shown.started(task(1))
        shown.tick()
        assert "round 2/3" in stream.getvalue()
        shown.ended(Outcome(task(1), {}, 1.0), 1.25)
    assert "started" not in stream.getvalue()
    assert "run 1 of 4" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("\x1b[2K"), "the live part is erased"
