"""Start of the workers that an experiment asks for."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mira.config import Experiment
from mira.core.errors import UserError
from mira.core.ray import connect
from mira.core.threads import usable_threads
from mira.engine.spread import SpreadEngine
from mira.model import Base, Device
from mira.model.shipped import ShippedBase
from mira.setup.crew import Place, RayCrew
from mira.setup.engine import EnginePlan
from mira.setup.worker import Parts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Layout:
    """The places of the workers. ``fitting``: those with room now. ``together``: the most that share the memory of a device."""

    places: Sequence[Place]
    device: Device
    threads: int
    fitting: int
    together: int


def spread_out(plan: EnginePlan) -> SpreadEngine:
    """Start the workers that the configuration asks for, and wait for those that have room. Raises UserError."""
    experiment, recorded = plan.experiment, plan.taken_over.get("threads")
    here = experiment.engine.devices
    connection = connect(None, "engine.devices") if here else connect(experiment.engine.ray, "engine.ray")
    import ray  # after the connection, which says what to do where it is not installed

    try:
        layout = _on_devices(experiment, recorded) if here else _on_cluster(experiment, recorded)
        # A worker needs neither data nor method, a plugged-in one least of all: it may not be installed there.
        needed = experiment.model_copy(update={"data": None, "method": None, "graph": None})
        parts = Parts(
            needed, layout.device, _shipped(plan.base), plan.base.sha256, plan.encoder, plan.corpus, layout.threads,
            layout.together, plan.privacy,
        )  # fmt: skip
        crew = RayCrew(connection, layout.places, ray.put(parts), dict(plan.taken_over), plan.progress)
        about = crew.start(layout.fitting)
    except BaseException:
        connection.close()
        raise
    log.info("%s", _workers(list(crew.nodes.values()), layout.device, here or (), layout.threads))
    return SpreadEngine(crew, plan.corpus, about.recorded)


def _workers(nodes: Sequence[str], device: str, named: Sequence[str], threads: int) -> str:
    """'2 workers with 1 thread each: cpu, cpu', with the names of engine.devices; on a cluster with the number on each node."""
    places = named or [f"{count} on {node} ({device})" for node, count in sorted(Counter(nodes).items())]
    return f"{_plural(len(nodes), 'worker')} with {_plural(threads, 'thread')} each: {', '.join(places)}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _shipped(base: Base) -> ShippedBase | None:
    """The base for the workers; None where they have to load it: a quantised one, and one with code of its own. Raises UserError
    if there is nothing to load it from."""
    if base.quantization == "none" and not base.trust_remote_code:
        return ShippedBase.of(base)
    if base.path is None:
        raise UserError(
            "model: a quantised model in memory cannot be sent to workers; give its name or folder as model.name"
        )
    return None


def check_gpus(devices: Sequence[str]) -> None:
    """Raise UserError if a GPU of engine.devices is absent."""
    there = torch.cuda.device_count()
    for device in devices:
        if device != "cpu" and int(device.partition(":")[2]) >= there:
            seen = f"torch sees {there} here, cuda:0 to cuda:{there - 1}" if there else "torch sees no GPU here"
            raise UserError(f"engine.devices: there is no {device}; {seen}{'' if there else ', use cpu'}")


def _on_devices(experiment: Experiment, recorded: int | None) -> _Layout:
    """One place on this machine for each of engine.devices. Ray reserves nothing: the user has chosen. ``recorded``: threads of a
    resumed run."""
    import ray

    devices = experiment.engine.devices or ()
    check_gpus(devices)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    needs = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": node}
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    numbers = [int(device.partition(":")[2] or -1) for device in devices]
    return _Layout(
        places=[Place(needs, None if n < 0 else seen[n] if seen else str(n)) for n in numbers],
        device="cpu" if devices[0] == "cpu" else "cuda",  # all are of one kind
        threads=recorded or experiment.engine.threads or max(1, usable_threads() // len(devices)),
        fitting=len(devices),
        together=max(devices.count(device) for device in devices),
    )


def _on_cluster(experiment: Experiment, recorded: int | None) -> _Layout:
    """A place for each of engine.workers. ``recorded``: threads of a resumed run. Raises UserError if there is room for none."""
    import ray

    wanted = experiment.engine.workers or 1
    listed: Any = ray.nodes
    nodes = [node["Resources"] for node in listed() if node["Alive"]]
    gpu = experiment.model.device == "cuda" or (
        experiment.model.device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes)
    )

    def room(threads: int) -> list[int]:
        return [int(min(node.get("CPU", 0) // threads, node.get("GPU", 0) if gpu else wanted)) for node in nodes]

    most = int(max(node.get("CPU", 0) for node in nodes))
    equal = next((threads for threads in range(most, 0, -1) if sum(room(threads)) >= wanted), 1)
    threads = recorded or experiment.engine.threads or equal
    fitting = min(wanted, sum(room(threads)))
    _check_room(wanted, fitting, f"{threads} CPU{'s' if threads > 1 else ''}{' and 1 GPU' if gpu else ''}", nodes)
    return _Layout(
        places=[Place({"num_cpus": threads, "num_gpus": int(gpu)})] * wanted,
        device="cuda" if gpu else "cpu",
        threads=threads,
        fitting=fitting,
        together=1 if gpu else max(room(threads)),
    )


def _check_room(wanted: int, fitting: int, asked: str, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if there is room for no worker; warn where there is room for some. ``asked``: the needs of one."""
    if not fitting:
        less = "lower engine.threads" + (", or set model.device=cpu" if "GPU" in asked else "")
        raise UserError(
            f"engine.workers={wanted}: no node of the Ray cluster has {asked} for a worker ({_told(nodes)}); {less}"
        )
    if fitting < wanted:
        log.warning(
            "engine.workers=%d: the cluster has room for %d with %s each; others begin when it grows",
            wanted, fitting, asked,
        )  # fmt: skip


def _told(nodes: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
