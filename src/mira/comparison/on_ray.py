"""Workers of a comparison on a Ray cluster.

A worker is an actor with the resources of a run. Where it sees the comparison's folder it works there. Elsewhere a run's state
goes to the worker, and each round comes back as it is committed (``store.mirror``).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mira.comparison.plan import Plan, Resources
from mira.comparison.remote import Arrival, Remote
from mira.comparison.workers import Outcome, Task
from mira.core.errors import UserError
from mira.core.ray import Connection, cause_of_death, connect, failed_start, reason_of
from mira.core.versions import version_of
from mira.store.mirror import Mirror, whole

log = logging.getLogger(__name__)

_POLL = 1.0  # seconds that a worker waits for news before it answers that there are none
_ANSWER = 30.0  # seconds for which an idle worker may be silent before it is replaced
_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Needs:
    """Resources of a worker, as Ray counts them. ``memory``: bytes, by which Ray places workers; None: not counted."""

    cpus: int
    gpus: float
    memory: int | None

    @staticmethod
    def of(resources: Resources, threads: int, on_gpu: bool) -> Needs:
        """``threads``: CPU threads of a run. ``on_gpu``: a run has a GPU, unless ``resources`` says how much of one."""
        gpus = float(on_gpu) if resources.gpus is None else resources.gpus
        return Needs(threads, gpus, None if resources.memory is None else int(resources.memory * 1e9))

    def fits(self, there: Mapping[str, float]) -> int:
        """Number of workers for which ``there``, the resources of a node, is enough."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory or 0}
        return min(int(there.get(name, 0) / amount + 1e-9) for name, amount in asked.items() if amount)

    def __str__(self) -> str:
        memory = [] if self.memory is None else [f"memory {self.memory / 1e9:g} GB"]
        return ", ".join([f"cpus {self.cpus}", f"gpus {self.gpus:g}", *memory])


@dataclass
class _Worker:
    """An actor. ``arrival``: None until it is ready. ``task``: None while it is idle."""

    actor: Any
    arrival: Arrival | None = None
    task: Task | None = None
    began: float = 0.0
    mirror: Mirror | None = None


class RayWorkers:
    """Workers on the cluster of ``connection``, which ``stop`` closes. New nodes are used as they come."""

    def __init__(self, connection: Connection, out: Path, needs: Needs) -> None:
        """Raises UserError where no node has what a worker needs."""
        import ray

        self._ray: Any = ray
        self._connection, self._out, self._needs = connection, out.absolute(), needs
        self._workers: list[_Worker] = []
        self._waited: dict[Any, _Worker] = {}  # by the reference of the answer that is due
        self._ended: list[Outcome] = []
        self._check_fits()
        self._mark = left_mark(self._out)

    @property
    def free(self) -> int:
        idle = sum(worker.task is None for worker in self._workers)
        starting = sum(
            worker.arrival is None for worker in self._workers
        )  # their resources may still count as available
        room = sum(map(self._needs.fits, _nodes(self._ray))) - len(self._workers)
        return idle + max(0, min(room, self._needs.fits(self._ray.available_resources()) - starting))

    def start(self, task: Task) -> None:
        worker = self._idle() or self._hired()
        worker.task, worker.began = task, time.perf_counter()
        if worker.arrival is None:
            self._waited[worker.actor.arrived.remote()] = worker
        else:
            self._guarded(worker, partial(self._hand_over, worker))

    def finished(self, seconds: float) -> Sequence[Outcome]:
        until = time.monotonic() + seconds
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
                self._ray.wait(leaving, num_returns=len(leaving), timeout=3.0)
            for worker in list(self._workers):
                self._drop(worker)
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
        worker = _Worker(self._ray.remote(Remote).options(**options).remote(self._out, self._mark.name, _node))
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
        if arrival.version != (here := version_of("mira")):
            raise UserError(
                f"{arrival.host} has mira {arrival.version}, and here is {here}; install the same on all nodes"
            )
        worker.arrival = arrival
        log.info(
            "worker %d on %s%s",
            arrival.process,
            arrival.host,
            "" if arrival.shares else ", which does not share the folder",
        )
        self._hand_over(worker)

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
        self._release(worker)
        self._workers.remove(worker)
        if self._ray.is_initialized():
            self._ray.kill(worker.actor)

    def _check_fits(self) -> None:
        nodes = _nodes(self._ray)
        if not any(map(self._needs.fits, nodes)):
            found = "; ".join(f"CPU {node.get('CPU', 0):g}, GPU {node.get('GPU', 0):g}" for node in nodes)
            raise UserError(
                f"resources: no node of the Ray cluster has what a run needs ({self._needs}; nodes: {found}); lower resources or"
                " engine.threads, or add such a node"
            )


def left_mark(out: Path) -> Path:
    """A new file in ``out`` with a name that nobody else can know: a worker that finds it sees the same folder."""
    mark = out / f".ray-{secrets.token_hex(16)}"
    mark.touch()
    return mark


def workers_on(address: str, plan: Plan, out: Path, threads: int) -> RayWorkers:
    """Workers for ``plan`` on the cluster at ``address`` (``core.ray.connect``), each with ``threads`` CPU threads. Raises
    UserError."""
    connection = connect(address, "--ray")
    try:
        import ray

        on_gpu = plan.base.model.device != "cpu" and any(node.get("GPU") for node in _nodes(ray))
        return RayWorkers(connection, out, Needs.of(plan.comparison.resources, threads, on_gpu))
    except BaseException:
        connection.close()
        raise


def _node() -> str:
    """The identity of the node of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _nodes(ray: Any) -> list[dict[str, float]]:
    """The resources of each node that is alive, in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _reason(worker: _Worker, error: Exception) -> str:
    """The reason of a worker's end in one line."""
    if (why := failed_start(error)) is not None:
        return f"its worker cannot start {why}"
    place = "its worker" if worker.arrival is None else f"its worker on {worker.arrival.host}"
    return f"{place} died ({cause_of_death(error)})"
