"""Workers of a comparison on a Ray cluster.

A worker is an actor with the resources of a run. Where it sees the comparison's folder it works there. Elsewhere a run's state
goes to the worker, and each round comes back as it is committed (``store.mirror``).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mira.comparison.machines import Same
from mira.comparison.nodes import Needs, Nodes, alive
from mira.comparison.plan import Plan
from mira.comparison.remote import Arrival, Remote
from mira.comparison.workers import Outcome, Task
from mira.core.errors import UserError
from mira.core.ray import Connection, cause_of_death, connect, failed_start, reason_of
from mira.store.mirror import Mirror, whole

log = logging.getLogger(__name__)

_POLL = 1.0  # seconds that a worker waits for news before it answers that there are none
_ANSWER = 30.0  # seconds for which an idle worker may be silent before it is replaced
_LEAVE = 3.0  # seconds that workers have to remove their folders
_SILENCE = 60.0  # seconds without a worker, after which a line says so
_MARK = ".ray-"
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class _Worker:
    """An actor. ``arrival``: None until it is ready. ``task``: None while it is idle."""

    actor: Any
    arrival: Arrival | None = None
    task: Task | None = None
    began: float = 0.0
    mirror: Mirror | None = None


class RayWorkers:
    """Workers on the cluster of ``connection``, which ``stop`` closes. New nodes are used as they come. A node whose runs would
    be unlike the others is left alone."""

    def __init__(self, connection: Connection, out: Path, needs: Needs, device: str, same: Same) -> None:
        """``device``: model.device of the runs. ``same``: knows what runs are alike. Raises UserError where no node has what a
        worker needs."""
        import ray

        self._ray: Any = ray
        self._connection, self._out, self._needs = connection, out.absolute(), needs
        self._nodes = Nodes(ray, needs, same)
        self._workers: list[_Worker] = []
        self._waited: dict[Any, _Worker] = {}  # by the reference of the answer that is due
        self._ended: list[Outcome] = []
        self._device = device
        self._put_back: list[Task] = []  # tasks of workers on nodes that are left alone
        self._silent, self._told = time.monotonic(), ""  # since when no worker has a task in hand, and the reason told
        self._mark = left_mark(self._out)

    @property
    def free(self) -> int:
        idle = sum(worker.task is None for worker in self._workers)
        starting = sum(
            worker.arrival is None for worker in self._workers
        )  # their resources may still count as available
        hirable = max(0, min(self._nodes.room() - len(self._workers), self._nodes.vacant() - starting))
        return max(0, idle + hirable - len(self._put_back))

    def start(self, task: Task) -> None:
        worker = self._idle() or self._hired()
        worker.task, worker.began = task, time.perf_counter()
        if worker.arrival is None:
            self._waited[worker.actor.arrived.remote()] = worker
        else:
            self._guarded(worker, partial(self._hand_over, worker))

    def finished(self, seconds: float) -> Sequence[Outcome]:
        until = time.monotonic() + seconds
        again, self._put_back = self._put_back, []
        while again and self.free:
            self.start(again.pop(0))
        self._put_back = again
        self._look_for_silence()
        while not self._ended and (left := until - time.monotonic()) > 0:
            if not self._waited:
                time.sleep(left)
                break
            ready, _ = self._ray.wait(list(self._waited), timeout=left)
            for reference in ready:
                worker = self._waited.pop(reference)
                self._guarded(worker, partial(self._answered, worker, reference))
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        try:
            # Asked first, so that folders on other machines are removed; then without mercy.
            leaving = [worker.actor.leave.remote() for worker in self._workers if self._ray.is_initialized()]
            if leaving:
                self._ray.wait(leaving, num_returns=len(leaving), timeout=_LEAVE)
            for worker in list(self._workers):
                self._kill(worker)
        finally:
            self._mark.unlink(missing_ok=True)
            self._connection.close()

    def _hired(self) -> _Worker:
        variables = _ENVIRONMENT | {"OMP_NUM_THREADS": str(self._needs.cpus)}
        if not self._needs.gpus:  # Ray leaves the node's GPUs in sight
            variables["CUDA_VISIBLE_DEVICES"] = ""
        options = {
            "num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus, "max_concurrency": 2, "max_restarts": 0,
            "max_task_retries": 0, "runtime_env": {"env_vars": variables},
        }  # fmt: skip
        if self._needs.memory is not None:
            options["memory"] = self._needs.memory
        made = self._ray.remote(Remote).options(**options, **self._nodes.options())
        worker = _Worker(made.remote(self._out, self._mark.name, self._device, _node))
        self._workers.append(worker)
        return worker

    def _idle(self) -> _Worker | None:
        """An idle worker that answers; those that do not are dropped."""
        for worker in [each for each in self._workers if each.task is None]:
            try:
                self._ray.get(worker.actor.arrived.remote(), timeout=_ANSWER)
                return worker
            except self._ray.exceptions.RayError:
                log.info("a worker without a task is gone")
                self._drop(worker)
        return None

    def _guarded(self, worker: _Worker, step: Any) -> None:
        """Take a ``step`` of a worker's task; a failure of the worker or of the step ends the task."""
        try:
            step()
        except (
            self._ray.exceptions.RayTaskError
        ) as error:  # before UserError: Ray derives from the class of the call's error
            self._end(worker, reason_of(error), lost=False)
        except UserError as error:
            self._end(worker, str(error), lost=False)
        except self._ray.exceptions.RayError as error:
            self._end(worker, _reason(worker, error), lost=failed_start(error) is None)

    def _answered(self, worker: _Worker, reference: Any) -> None:
        answer = self._ray.get(reference)
        if isinstance(answer, Arrival):
            self._welcome(worker, answer)
            return
        for news in answer:
            if isinstance(news, Outcome):
                self._finish(worker, news)
                return
            assert worker.mirror is not None, "a worker that does not share the folder"
            worker.mirror.apply(news)
        self._waited[worker.actor.news.remote(_POLL)] = worker

    def _welcome(self, worker: _Worker, arrival: Arrival) -> None:
        if not self._nodes.take(arrival):
            assert worker.task is not None
            self._put_back.append(worker.task)
            self._drop(worker)
            return
        worker.arrival = arrival
        log.info(
            "worker %d on %s%s",
            arrival.process,
            arrival.host,
            "" if arrival.shares else ", which does not share the folder",
        )
        self._hand_over(worker)

    def _look_for_silence(self) -> None:
        """Say after a while that no worker has a task in hand, and why. Raises UserError where none can come."""
        if any(worker.task and worker.arrival for worker in self._workers):
            self._silent, self._told = time.monotonic(), ""
            return
        why = self._nodes.why_none()
        if time.monotonic() - self._silent > _SILENCE and why != self._told:
            self._told = why
            log.warning("no run is under way: %s; waiting", why)

    def _hand_over(self, worker: _Worker) -> None:
        """Begin the worker's task, after its run's state where it does not see the folder."""
        assert worker.task is not None
        assert worker.arrival is not None
        if not worker.arrival.shares:
            place = worker.task.job.folder
            worker.mirror = Mirror(self._out / place)
            for parcel in whole(self._out / place):
                self._ray.get(worker.actor.receive.remote(place, parcel))
        self._ray.get(
            worker.actor.begin.remote(worker.task)
        )  # it returns at once, or says why the task cannot be read there
        self._waited[worker.actor.news.remote(_POLL)] = worker

    def _finish(self, worker: _Worker, outcome: Outcome) -> None:
        assert worker.task is not None
        self._ended.append(replace(outcome, task=worker.task, seconds=time.perf_counter() - worker.began))
        self._release(worker)
        if self._needs.gpus:
            self._drop(worker)  # PyTorch keeps a GPU's memory until the process ends

    def _end(self, worker: _Worker, reason: str, lost: bool) -> None:
        assert worker.task is not None
        self._ended.append(Outcome(worker.task, {}, time.perf_counter() - worker.began, reason, lost))
        self._drop(worker)

    def _release(self, worker: _Worker) -> None:
        if worker.mirror is not None:
            worker.mirror.close()
        worker.task = worker.mirror = None

    def _drop(self, worker: _Worker) -> None:
        """End a worker that may be alive: it removes its own folder first."""
        if self._ray.is_initialized():
            self._ray.wait([worker.actor.leave.remote()], timeout=_LEAVE)
        self._kill(worker)

    def _kill(self, worker: _Worker) -> None:
        self._release(worker)
        self._workers.remove(worker)
        if self._ray.is_initialized():
            self._ray.kill(worker.actor)


def left_mark(out: Path) -> Path:
    """A new file in ``out`` with a name that nobody else can know: a worker that finds it sees the same folder. Those that
    killed processes left are removed."""
    for left in out.glob(f"{_MARK}*"):
        left.unlink()
    mark = out / f"{_MARK}{secrets.token_hex(16)}"
    mark.touch()
    return mark


def workers_on(address: str, plan: Plan, out: Path, threads: int, same: Same) -> RayWorkers:
    """Workers for ``plan`` on the cluster at ``address`` (``core.ray.connect``), each with ``threads`` CPU threads. Raises
    UserError."""
    if (workers := plan.base.engine.workers) is not None:
        raise UserError(
            f"engine.workers={workers}: spreads one run over a Ray cluster, and --ray gives the cluster to several runs; leave"
            " one of the two out"
        )
    connection = connect(address, "--ray")
    try:
        import ray

        device = plan.base.model.device
        on_gpu = device != "cpu" and any(node.get("GPU") for node in alive(ray).values())
        return RayWorkers(connection, out, Needs.of(plan.comparison.resources, threads, on_gpu), device, same)
    except BaseException:
        connection.close()
        raise


def _node() -> str:
    """The identity of the node of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _reason(worker: _Worker, error: Exception) -> str:
    """The reason of a worker's end in one line."""
    if (why := failed_start(error)) is not None:
        return f"its worker cannot start {why}"
    place = "its worker" if worker.arrival is None else f"its worker on {worker.arrival.host}"
    return f"{place} died ({cause_of_death(error)})"
