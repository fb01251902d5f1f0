"""Tasks of a comparison, and the protocol of the workers that do them: in this process, in processes, on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mira.comparison.plan import Job
from mira.core.machine import Share

Kind = Literal["run", "test"]


@dataclass(frozen=True)
class Task:
    """Work on one run folder: train the run to its end, or measure its best round on the test split.

    ``threads``: CPU threads of the task. ``share``: memory and GPUs that it plans with. ``day``: date of its prompts. All tasks
    of a comparison have the same ones, so that the number of workers changes no digit. Paths of the experiment are absolute.
    """

    kind: Kind
    job: Job
    threads: int
    share: Share
    day: str


@dataclass(frozen=True)
class Outcome:
    """End of a task. The run folder has the numbers.

    ``error``: None; or the reason in one line. ``lost``: the worker died (killed, out of memory, its node gone), the run
    may be resumed. ``where``: host, processor, cores, device of the worker; empty for a lost one. ``seconds``: wall time of the
    task. ``messages``: warnings of the task, and the traceback of an error that is a bug.
    """

    task: Task
    where: dict[str, Any]
    seconds: float
    error: str | None = None
    lost: bool = False
    messages: tuple[str, ...] = ()


class Workers(Protocol):
    """Workers that do one task each at a time."""

    @property
    def free(self) -> int:
        """Number of tasks that ``start`` would begin at once."""
        ...

    def start(self, task: Task) -> None: ...

    def finished(self, seconds: float) -> Sequence[Outcome]:
        """Outcomes since the last call; waits up to ``seconds`` for the first one."""
        ...

    def stop(self) -> None:
        """End all workers at once, in the middle of their tasks. Committed rounds are kept."""
        ...
