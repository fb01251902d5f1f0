"""Nodes of a Ray cluster: what a worker of a comparison needs of one, and which of them it may use."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mira.comparison.machines import Same
from mira.comparison.plan import Resources
from mira.comparison.remote import Arrival
from mira.core.errors import UserError
from mira.core.versions import version_of

log = logging.getLogger(__name__)


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
class Nodes:
    """The nodes of the cluster that ``ray`` is connected to, for workers with ``needs``. A node on which runs would be unlike the
    others, as ``same`` knows them, is left alone."""

    ray: Any
    needs: Needs
    same: Same
    _unlike: dict[str, str] = field(default_factory=dict)  # by the identity of a node: why it is left alone

    def __post_init__(self) -> None:
        """Raises UserError where no node has what a worker needs."""
        found = alive(self.ray).values()
        if not any(map(self.needs.fits, found)):
            told = "; ".join(f"CPU {node.get('CPU', 0):g}, GPU {node.get('GPU', 0):g}" for node in found)
            raise UserError(
                f"resources: no node of the Ray cluster has what a run needs ({self.needs}; nodes: {told}); lower resources or"
                " engine.threads, or add such a node"
            )

    def room(self) -> int:
        """Number of workers that all nodes in use can hold."""
        return sum(self.needs.fits(there) for node, there in alive(self.ray).items() if node not in self._unlike)

    def vacant(self) -> int:
        """Number of workers for which the cluster has resources that nobody uses now."""
        return self.needs.fits(self.ray.available_resources())

    def options(self) -> dict[str, Any]:
        """Options that keep an actor from the nodes that are left alone."""
        if not self._unlike:
            return {}
        return {"label_selector": {"ray.io/node-id": f"!in({', '.join(sorted(self._unlike))})"}}

    def take(self, arrival: Arrival) -> bool:
        """Return True where a worker that arrived may be used; else leave its node alone from now on, with a warning."""
        why = self._difference(arrival)
        if why is None:
            return True
        if arrival.node not in self._unlike:
            log.warning("%s is not used: its %s", arrival.host, why)
        self._unlike[arrival.node] = f"{arrival.host}: its {why}"
        return False

    def why_none(self) -> str:
        """Words for why there is no worker for now. Raises UserError where every node that has what it needs is left alone."""
        if self.room():
            return f"the cluster is busy, or slow to start a worker ({self.needs})"
        if any(self.needs.fits(there) for node, there in alive(self.ray).items() if node in self._unlike):
            raise UserError(f"no node of the Ray cluster can be used; {next(iter(self._unlike.values()))}")
        return f"no node of the cluster has what a run needs ({self.needs})"

    def _difference(self, arrival: Arrival) -> str | None:
        there, here = arrival.versions["mira"], version_of("mira")
        if there != here:  # it could not read the tasks
            return f"mira is {there}, but {here} here; install the same on all nodes"
        found = self.same.difference(arrival.place, arrival.versions)
        return found and f"{found}; allow that with --unlike-machines"


def alive(ray: Any) -> dict[str, dict[str, float]]:
    """The resources of each node that is alive, in all, by its identity."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
