"""The workers of a run, on Ray: actors that hold a base and an engine each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mira.core.errors import UserError
from mira.core.ray import Connection, cause_of_death, failed_start, reason_of
from mira.core.versions import version_of
from mira.engine.spread import Call, Reply
from mira.setup.sending import send_tensors_as_arrays
from mira.setup.worker import About, Told, Worker

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between two looks at the progress of the workers
_PATIENCE = 300.0  # seconds to wait for workers that have room: a busy machine imports slowly
_TRIES = 2  # failed starts in a row after which a place is given up


@dataclass(frozen=True)
class Place:
    """The place of one worker. ``needs``: the options of its actor, with the CPUs and GPUs that Ray reserves. ``gpu``: the number
    of a GPU of this machine, where Ray reserves none."""

    needs: Mapping[str, Any]
    gpu: str | None = None


@dataclass
class RayCrew:
    """See ``engine.spread.Crew``. A lost worker is replaced at once, and a place without room is filled when there is some; a new
    worker takes part from the next ``begin`` on.

    ``parts``: a reference to the ``Parts`` in Ray's store. ``taken_over``: the engine and the pass size of a resumed run; later
    those of the first worker, which all others take over.
    """

    connection: Connection
    places: Sequence[Place]
    parts: Any
    taken_over: dict[str, Any]
    progress: Callable[[int], None]
    made: type = Worker  # of the actors
    first: About | None = None
    actors: dict[int, Any] = field(default_factory=dict)  # by the worker's number
    starting: dict[Any, int] = field(default_factory=dict)  # by the call that builds the engine
    busy: dict[Any, int] = field(default_factory=dict)  # by the call of the engine
    looks: dict[Any, int] = field(default_factory=dict)  # by the call that asks for progress
    place: dict[int, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)  # of the workers that are built
    failures: Counter[int] = field(default_factory=Counter)  # of a place, in a row
    why: str = ""  # the last worker that could not begin did not
    number: int = 0  # of the next worker

    def start(self, fitting: int) -> About:
        """Start all workers, and wait for the ``fitting`` ones that have room. Returns the first one's engine and machine."""
        send_tensors_as_arrays()
        for place in range(len(self.places)):
            self._create(place)
        while len(self._ready()) < fitting and self._admit(_PATIENCE):
            pass
        if self.first is None:
            raise UserError(
                f"engine.workers: no worker began within {_PATIENCE:g} s; see 'ray status' for the free CPUs and GPUs"
                if self.starting
                else f"engine.workers: no worker can begin: {self.why}"
            )
        return self.first

    @property
    def full(self) -> int | None:
        return None if self.first is None else self.first.full

    def begin(self) -> list[int]:
        """See ``Crew``."""
        self.busy.clear()
        while self._admit(0):
            pass
        return self._ready()

    def refill(self) -> list[int]:
        """See ``Crew``."""
        while not self._ready():
            if not self._admit(_PATIENCE):
                new = f"began within {_PATIENCE:g} s" if self.starting else f"can begin ({self.why})"
                raise UserError(
                    f"engine: all workers were lost, and no new one {new}; committed rounds are kept: resume the run when"
                    " there are workers again"
                )
        return self._ready()

    def submit(self, worker: int, call: Call) -> None:
        """See ``Crew``."""
        self.busy[self.actors[worker].call.remote(call)] = worker

    def wait(self) -> Reply:
        """See ``Crew``."""
        import ray

        while True:
            done, _ = ray.wait([*self.busy], timeout=_LOOK)
            self._look()
            if done:
                worker = self.busy.pop(done[0])
                value, lost = _result(done[0])
                if lost is not None:
                    self._replace(worker)
                return Reply(worker, value, lost)

    def close(self) -> None:
        """See ``Crew``."""
        import ray

        for actor in self.actors.values():
            ray.kill(actor)
        self.connection.close()

    def _ready(self) -> list[int]:
        return [worker for worker in self.actors if worker not in self.starting.values()]

    def _create(self, place: int) -> None:
        import ray

        worker, self.number = self.number, self.number + 1
        chosen = self.places[place]
        remote: Any = ray.remote  # its types lack concurrency groups
        actor = remote(concurrency_groups={"looks": 1}, **chosen.needs)(self.made).remote(self.parts, chosen.gpu)
        self.actors[worker], self.place[worker] = actor, place
        self._build(worker)

    def _build(self, worker: int) -> None:
        self.starting[self.actors[worker].build.remote(self.taken_over)] = worker

    def _admit(self, seconds: float) -> bool:
        """Wait for a worker that is built, and let it take part. Returns whether one was built or failed in time."""
        import ray

        done, _ = ray.wait([*self.starting], timeout=seconds) if self.starting else ([], [])
        if not done:
            return False
        worker = self.starting.pop(done[0])
        try:
            about, lost = _result(done[0])
            if about is not None:
                _check_versions(about)
        except Exception as error:
            if self.first is None:
                raise
            about, lost = None, reason_of(error)
        if lost is None:
            self._check(worker, about)
        else:
            self.why = lost
            self.failures[self.place[worker]] += 1
            given_up = "" if self._replace(worker) else f"; after {_TRIES} failures its place stays empty"
            log.warning("a worker did not begin: %s%s", lost, given_up)
        return True

    def _check(self, worker: int, about: About) -> None:
        """Let ``worker`` take part if its engine is that of the first; else build the first one's engine there."""
        if self.first is None:
            self.first = about
            self.taken_over = self.taken_over | about.recorded
        elif about.recorded != self.first.recorded:
            self._build(worker)
            return
        self.failures[self.place[worker]] = 0
        self.nodes[worker] = about.node
        if about.processor != self.first.processor:
            log.warning(
                "the worker on %s has another processor (%s) than the one on %s (%s); numbers may differ in their last digits",
                about.node, about.processor, self.first.node, self.first.processor,
            )  # fmt: skip

    def _replace(self, worker: int) -> bool:
        """Put a new worker in the place of a lost one; returns False where the place is given up."""
        import ray

        ray.kill(self.actors.pop(worker))  # it may still be alive, without a connection
        self.nodes.pop(worker, None)
        place = self.place.pop(worker)
        if self.failures[place] >= _TRIES:
            return False
        self._create(place)
        return True

    def _look(self) -> None:
        """Report the progress that workers have told, and ask again those that are busy."""
        import ray

        done, _ = ray.wait([*self.looks], num_returns=len(self.looks), timeout=0) if self.looks else ([], [])
        for ref in done:
            del self.looks[ref]
            tokens, lost = _result(ref)
            if lost is None and tokens:
                self.progress(tokens)
        for worker in {*self.busy.values()} - {*self.looks.values()}:
            self.looks[self.actors[worker].tokens.options(concurrency_group="looks").remote()] = worker


def _check_versions(about: About) -> None:
    """Raise UserError if a worker has another version of a library that decides numbers."""
    for name, there in about.versions.items():
        if there != (here := version_of(name)):
            raise UserError(
                f"engine.workers: {about.node} has {name} {there}, this machine {here}; install the same there"
            )


def _result(ref: Any) -> tuple[Any, str | None]:
    """The value of a call, or the reason for which its worker is lost. Logs the worker's warnings. Raises the error with which
    the call ended, and UserError where the worker could not be built."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        told = ray.get(ref)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except RayError as error:
        if (why := failed_start(error)) is not None:
            raise UserError(
                f"engine.workers: a worker cannot start {why}; see 'What every node needs' in docs/devices.md"
            ) from None
        return None, cause_of_death(error)
    if not isinstance(told, Told):
        return told, None
    for warning in told.warnings:
        log.warning("a worker: %s", warning)
    return told.value, None
