"""Live view of a comparison: a bar and a line a task on a terminal, plain lines elsewhere, and progress.json in its folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, RLock, Thread
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mira.comparison.machines import noted
from mira.comparison.plan import Job, Plan
from mira.comparison.progress import (
    Going,
    Seen,
    State,
    estimate,
    fraction,
    headline,
    left,
    position,
    words,
)  # fmt: skip
from mira.comparison.workers import Outcome, Task
from mira.core.errors import UserError
from mira.core.escape import visible
from mira.core.machine import host
from mira.store.files import pack_json, unwritable
from mira.store.files import replace as write
from mira.store.folders import PROGRESS
from mira.store.rounds import Rounds

Say = Callable[[str], None]  # recipient of a line
EVERY = 0.5  # seconds from one look at the run folders to the next


class Live:
    """View of the tasks of a comparison, to be used in a ``with`` around their execution.

    A thread reads the progress of the tasks under way from the records of their run folders, so that all kinds of workers are
    shown alike, and the death of a worker disturbs nothing.
    """

    def __init__(
        self, plan: Plan, out: Path, say: Say, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        """``say``: recipient of the lines that stay. ``console``: that of ``say``; a terminal has the live part."""
        self._name, self._out, self._say, self._clock = plan.name, out, say, clock
        tests = len(plan.jobs) * len(plan.comparison.seeds)
        self._state = State(plan.total, tests, plan.base.rounds, plan.base.evaluation.every)
        self._estimated = False
        self._lock, self._end = RLock(), Event()
        self._thread = Thread(target=self._watch, name="live view", daemon=True)
        terminal = console is not None and console.is_terminal
        self._screen = Screen(console=console, auto_refresh=False, transient=True) if terminal else None

    def __enter__(self) -> Self:
        self._keep()
        if self._screen is not None:
            self._screen.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._screen is not None:
            self._screen.stop()
        self._state = replace(self._state, going=())
        with suppress(UserError) if error else nullcontext():  # a full disk: the error on its way says so
            self._keep()

    def found(self, job: Job, loss: float | None, seconds: float) -> None:
        """Count a run that was finished before, in ``seconds``."""
        with self._lock:
            self._state = trained(self._state, self._state.rounds, seconds)
            self._line(
                f"run {self._state.trained} of {self._state.runs}", *words(job), validation(loss), "finished before"
            )

    def tested(self, job: Job) -> None:
        """Count a run that was measured on test data before."""
        with self._lock:
            self._state = replace(self._state, tested=self._state.tested + 1)

    def started(self, task: Task) -> None:
        """Show ``task`` as under way."""
        seen, now = look(self._out / task.job.folder, Seen()), self._clock()
        with self._lock:
            going = Going(task, now, now, seen.round, seen)
            self._state = replace(self._state, going=(*self._state.going, going))
            self._keep()
            if self._screen is None and task.kind == "run":
                self._line("started", *words(task.job), f"after round {seen.round}" if seen.round else "")

    def ended(self, outcome: Outcome, loss: float | None, again: bool = False) -> None:
        """Count the end of a task. ``loss``: the lowest validation loss of a finished run. ``again``: the task failed or was
        lost, and is put back to be resumed."""
        task = outcome.task
        with self._lock:
            self.tick()
            mine = next(each for each in self._state.going if _key(each.task) == _key(task))
            self._state = replace(self._state, going=tuple(each for each in self._state.going if each is not mine))
            if outcome.error is not None:
                if not again:
                    self._state = replace(self._state, failed=(*self._state.failed, (task, outcome.error)))
                self._line("put back" if again else "failed", *words(task.job), outcome.error)
            elif task.kind == "run":
                self._state = trained(self._state, self._state.rounds - mine.base, outcome.seconds)
                head = f"run {self._state.trained} of {self._state.runs}"
                self._line(
                    head,
                    *words(task.job),
                    validation(loss),
                    f"{outcome.seconds:.0f} s",
                    *left(self._state, self._clock()),
                )
            else:
                count, seconds = self._state.test_pace
                self._state = replace(
                    self._state, tested=self._state.tested + 1, test_pace=(count + 1, seconds + outcome.seconds)
                )
                self._line("test data", *words(task.job), f"{outcome.seconds:.0f} s")
            self._keep()

    def added(self, runs: int) -> None:
        """Add runs to the total, because a grid grew."""
        with self._lock:
            self._state = replace(self._state, runs=self._state.runs + runs)
            self._keep()

    def dropped(self, runs: int, tests: int) -> None:
        """Take tasks off the totals that are not done, because their entry has no point left."""
        with self._lock:
            self._state = replace(self._state, runs=self._state.runs - runs, tests=self._state.tests - tests)
            self._keep()

    def tick(self) -> None:
        """Read the progress of the tasks under way, and refresh the view. The thread does this every EVERY seconds."""
        with self._lock:
            now = self._clock()
            going = tuple(self._at(each, now) for each in self._state.going)
            self._state = replace(self._state, going=going)
            if not self._estimated and (line := estimate(self._state)) is not None:
                self._estimated = True
                self._say(line)
            if self._screen is not None:
                self._screen.update(drawn(self._state, now), refresh=True)

    def _watch(self) -> None:
        while not self._end.wait(EVERY):
            self.tick()

    def _at(self, each: Going, now: float) -> Going:
        if each.task.kind == "test":
            return each
        folder = self._out / each.task.job.folder
        seen, where = look(folder, each.seen), each.where or elsewhere(folder)
        return replace(each, seen=seen, where=where, since=each.since if seen == each.seen else now)

    def _line(self, *parts: str) -> None:
        self._say(" · ".join(part for part in parts if part))

    def _keep(self) -> None:
        """Write progress.json, which ``mira runs`` reads."""
        try:
            write(self._out / PROGRESS, pack_json(record(self._name, self._state)))
        except OSError as error:
            raise unwritable(self._out / PROGRESS, error, "repeat the command") from None


def look(folder: Path, before: Seen) -> Seen:
    """The committed rounds of the run in ``folder``, of which ``before`` was seen; the same where nothing new can be read."""
    rounds = Rounds(folder)
    try:
        committed = rounds.committed()
        new = [round for round in committed if round > before.round or before.start is None]
        if not new:
            return before
        first = {round: rounds.metrics(round) for round in new if round < 2}
        loss = next(
            (x for round in reversed(new) if (x := rounds.metrics(round).get("validation_loss")) is not None), None
        )
        return Seen(
            new[-1],
            before.loss if loss is None else loss,
            first[0]["seconds"] if 0 in first else before.start,
            first[1]["seconds"] if 1 in first else before.first,
            "clients" in first[1] if 1 in first else before.measured,
        )
    except (UserError, OSError, KeyError):  # not yet a run, or half of one: the next look may see more
        return before


def elsewhere(folder: Path) -> str:
    """The host that computes the run in ``folder``; "" for this one, and while it is unknown."""
    try:
        last = noted(folder)[-1]["host"]
        return "" if last in (None, host()) else str(last)
    except (UserError, OSError, LookupError):
        return ""


def record(name: str, state: State) -> dict[str, Any]:
    """The content of progress.json (docs/commands/compare.md)."""
    return {
        "name": name,
        "runs": state.runs,
        "trained": state.trained,
        "tests": state.tests,
        "tested": state.tested,
        "under_way": [{"run": each.task.job.folder.as_posix(), "task": each.task.kind} for each in state.going],
        "failed": [
            {"run": task.job.folder.as_posix(), "task": task.kind, "reason": reason} for task, reason in state.failed
        ],
    }


def drawn(state: State, now: float) -> Group:
    """The live part of the view: the whole with a bar, a line a task under way, and a line a failed one."""
    whole = Table.grid(padding=(0, 1))
    whole.add_row(ProgressBar(total=1.0, completed=fraction(state), width=30), headline(state, now))
    tasks = Table.grid(padding=(0, 2))
    for each in state.going:
        *names, seed = words(each.task.job)
        tasks.add_row(
            Text(visible(" · ".join(names)), overflow="ellipsis", no_wrap=True), seed, position(each, state.rounds)
        )
    failed = [
        Text(
            visible(f"failed: {' · '.join(words(task.job))} · {reason}"), style="red", overflow="ellipsis", no_wrap=True
        )
        for task, reason in state.failed
    ]
    return Group(whole, tasks, *failed)


def trained(state: State, rounds: int, seconds: float) -> State:
    """``state`` with one more finished run, of which ``rounds`` took ``seconds``."""
    before, spent = state.pace
    return replace(state, trained=state.trained + 1, pace=(before + rounds, spent + seconds))


def _key(task: Task) -> tuple[str, Path]:
    """Two tasks at work differ in it. A task from another process is a copy."""
    return task.kind, task.job.folder


def validation(loss: float | None) -> str:
    return "no finite validation loss" if loss is None else f"validation {loss:.4f}"
