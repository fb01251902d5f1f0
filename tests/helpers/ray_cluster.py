"""A Ray cluster of several nodes on this machine, and a look at the processes that are left of one."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mira

SOURCES = Path(mira.__file__).parents[1]
_LONGEST = 20.0  # seconds that processes have to end
# What Ray's processes read when they start, of clusters made here and of those that a command starts.
# Ray lowers the priority of its workers by 15: beside other tests they would get a thirtieth of a core.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray holds a worker ready on each CPU. Those of a comparison have variables of their own, so that no such worker fits.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# A node is dead after five looks without an answer. Ray looks every 3 s. A node that is slow still has 10 s for each answer.
os.environ.setdefault("RAY_health_check_period_ms", "500")


class RayCluster:
    """``nodes`` of so many CPUs each; the first one is the head, to which ``address`` leads."""

    def __init__(self, nodes: tuple[int, ...], folder: str) -> None:
        from ray.cluster_utils import Cluster

        # Small stores, so that several fit into the shared memory of a small machine.
        self._common: dict[str, Any] = {"object_store_memory": 80_000_000, "include_dashboard": False}
        # Neither the autoscaler nor the collector of logs, each a process that takes seconds of CPU to start.
        spared = {"no_monitor": True, "include_log_monitor": False}
        head = {"num_cpus": nodes[0], "temp_dir": folder, **spared, **self._common}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        for cpus in nodes[1:]:
            self.add(cpus)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, cpus: int, gpus: int = 0, environment: Mapping[str, str] | None = None) -> Any:
        """A new node. ``gpus``: said to be there. ``environment``: more variables of its workers."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            return self._cluster.add_node(num_cpus=cpus, num_gpus=gpus, **self._common)

    @staticmethod
    def process_of(node: Any) -> int:
        """The process whose children are the workers of ``node``."""
        return int(node.all_processes["raylet"][0].process.pid)

    def remove(self, node: Any) -> None:
        """Kill a node with all of its processes."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def ray_cluster(*nodes: int) -> Iterator[RayCluster]:
    """A cluster whose workers import this very source tree. Asserts that no process is left of it."""
    before, paths = descendants(), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(SOURCES), str(Path(__file__).parents[1]), *([paths] if paths else [])]
    )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with tempfile.TemporaryDirectory(
            prefix="ray-", dir="/tmp", ignore_cleanup_errors=True
        ) as folder:  # short: sockets
            cluster = RayCluster(nodes, folder)
            try:
                yield cluster
            finally:
                cluster.close()
        assert_ended(before)
    finally:
        os.environ.pop("PYTHONPATH")
        if paths is not None:
            os.environ["PYTHONPATH"] = paths


@contextmanager
def own_folder() -> Iterator[None]:
    """A folder of Ray's for this process and its children, so that a cluster of this machine is neither found nor disturbed."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


def descendants(of: int | None = None) -> dict[int, str]:
    """The processes below the process ``of``, this one if it is None: number and command."""
    top = os.getpid() if of is None else of
    parents, found = {}, {top: ""}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name, in brackets, may contain spaces.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    for _ in parents:
        more = {pid for pid, parent in parents.items() if parent in found} - found.keys()
        if not more:
            break
        found |= {pid: _command(pid) for pid in more}
    del found[top]
    return found


def assert_ended(before: dict[int, str]) -> None:
    """Assert that all processes below this one that began since ``before`` end."""
    until = time.monotonic() + _LONGEST
    while (
        left := {pid: told for pid, told in descendants().items() if pid not in before}
    ) and time.monotonic() < until:
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, left


def wait_for(reached: Callable[[], bool], command: subprocess.Popen[str] | None = None) -> None:
    """Wait until ``reached``. Asserts that ``command`` runs meanwhile, and that it takes no more than 150 s: a busy machine."""
    until = time.monotonic() + 150
    while not reached():
        assert command is None or command.poll() is None, command.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


def busy_workers(besides: int) -> list[int]:
    """The processes in which a worker of a spread run computes now, but not those below the process ``besides``. Ray names a
    process by the method that it runs."""
    busy = [pid for pid, command in descendants().items() if command.startswith("ray::Worker.call")]
    return [pid for pid in busy if pid not in descendants(besides)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
