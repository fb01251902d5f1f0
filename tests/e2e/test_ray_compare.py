"""Comparisons on a real local Ray cluster of two nodes, whose figures are those of a serial comparison to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.ray_cluster import SOURCES, RayCluster, assert_ended, descendants, own_folder, ray_cluster
from helpers.sample_config import mira, outcome, settings, write_clients
from mira.comparison import on_ray
from mira.store import mirror
from mira.store.mirror import Parcel

ENTRIES = {"Local": {"method.name": "local"}, "MIRA": {}}


@pytest.fixture(scope="module")
def head() -> Iterator[RayCluster]:
    with ray_cluster(1) as started:
        yield started


@pytest.fixture(scope="module")
def second(head: RayCluster) -> Any:
    return head.add(1)


@pytest.fixture(scope="module")
def cluster(head: RayCluster, second: Any) -> RayCluster:
    """Of two nodes, ``second`` the one without the head."""
    return head


@pytest.fixture(scope="module")
def file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    values = {
        "experiment": settings(tiny_folder, write_clients(folder / "data.jsonl"), rounds=2), "seeds": [0, 1], "tune_seeds": [0],
        "grid": {"training.lr": [0.001, 0.03]}, "entries": ENTRIES,
    }  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return folder / "c.yaml"


@pytest.fixture(scope="module")
def serial(file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("serial")
    ended = mira("compare", file, "--out", out, "--workers", "1")
    assert ended.status == 0, ended.err
    return results(out)


def results(out: Path) -> dict[str, Any]:
    """All that the runs of a comparison and their tests left behind, to the bit."""
    folders = sorted(place.parent for place in (out / "runs").rglob("store.json"))
    tests = {str(place.relative_to(out)): json.loads(place.read_text()) for place in (out / "runs").rglob("test.json")}
    adapters = sorted(str(place.relative_to(out)) for place in (out / "runs").rglob("adapters/*/*") if place.is_file())
    return {
        "runs": {str(place.relative_to(out)): outcome(place) for place in folders},
        "tests": tests,
        "adapters": adapters,
    }


def compared(file: Path, out: Path, cluster: RayCluster) -> str:
    """What the command told."""
    ended = mira("compare", file, "--out", out, "--ray", cluster.address)
    assert ended.status == 0, ended.err
    assert not list(out.glob(".ray-*"))
    return ended.err


def processes(name: str) -> list[int]:
    return [pid for pid, command in descendants().items() if command.startswith(name)]


def test_runs_on_two_nodes_have_the_figures_of_a_serial_comparison(
    file: Path, serial: dict[str, Any], cluster: RayCluster, tmp_path: Path
) -> None:
    told = compared(file, tmp_path / "o", cluster)
    assert results(tmp_path / "o") == serial
    assert len(re.findall(r"worker on \S+\n", told)) == 2, told
    assert not list(Path(tempfile.gettempdir()).glob("mira-compare-*"))


def test_workers_and_a_node_are_lost_without_a_shared_folder(
    file: Path, serial: dict[str, Any], cluster: RayCluster, second: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both workers are killed after the first round; later the second node, for which another one comes."""
    lost: dict[str, set[Path]] = {"workers": set(), "node": set()}
    hired: list[on_ray.RayWorkers] = []
    made = on_ray.RayWorkers.__init__

    class Watched(mirror.Mirror):
        def apply(self, parcel: Parcel) -> None:
            super().apply(parcel)
            if parcel[-1].name == "rounds/000001.json":
                harm(self)

    def harm(copy: mirror.Mirror) -> None:
        busy = [worker for worker in hired[0]._workers if worker.task is not None]
        sender = next(worker for worker in busy if worker.mirror is copy)
        assert sender.task is not None
        assert sender.arrival is not None
        if not lost["workers"]:
            lost["workers"] = {worker.task.job.folder for worker in busy if worker.task is not None}
            for pid in processes("ray::Remote"):
                os.kill(pid, signal.SIGKILL)
        elif (
            not lost["node"] and sender.arrival.node == second.node_id and sender.task.job.folder not in lost["workers"]
        ):
            lost["node"] = {sender.task.job.folder}
            cluster.remove(second)
            cluster.add(1)

    def init(self: on_ray.RayWorkers, *given: Any) -> None:
        made(self, *given)
        hired.append(self)

    monkeypatch.setattr(on_ray, "left_mark", lambda out: out / ".ray-elsewhere")
    monkeypatch.setattr(on_ray, "Mirror", Watched)
    monkeypatch.setattr(on_ray.RayWorkers, "__init__", init)
    told = compared(file, tmp_path / "o", cluster)
    assert lost["workers"]
    assert lost["node"]
    assert results(tmp_path / "o") == serial
    assert "which does not share the folder" in told
    assert "died (killed, or its node is gone)" in told
    assert not list((tmp_path / "o" / "runs").rglob("tokens")), "private to the node"


def test_a_run_that_no_node_can_hold_is_refused(file: Path, cluster: RayCluster, tmp_path: Path) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values | {"resources": {"gpus": 0.5}}), encoding="utf-8")
    ended = mira("compare", tmp_path / "c.yaml", "--out", tmp_path / "o", "--ray", cluster.address)
    assert (
        "resources: no node of the Ray cluster has what a run needs (cpus 1, gpus 0.5; nodes: CPU 1, GPU 0"
        in ended.error
    )


def test_no_cluster_outlives_the_command_that_started_it(file: Path, tmp_path: Path) -> None:
    """Killed, and interrupted on the way; the same command goes on."""
    before = descendants()
    for number, instant in ((signal.SIGKILL, "000001"), (signal.SIGINT, "000002")):
        with own_folder():
            command = start(file, tmp_path / "o")
            wait_for(lambda instant=instant: list((tmp_path / "o").rglob(f"rounds/{instant}.json")), command)
            command.send_signal(number)
            told = command.communicate(timeout=60)[0]
            assert command.returncode == (-9 if number == signal.SIGKILL else 130), told
            assert_ended(before)
    assert told.endswith("repeat the command to resume\n")


def start(file: Path, out: Path) -> subprocess.Popen[str]:
    run = "import sys; from mira.cli import main; sys.argv[0] = 'mira'; main()"
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    return subprocess.Popen(
        [sys.executable, "-c", run, "compare", str(file), "--out", str(out), "--ray", "auto"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def wait_for(reached: Callable[[], Any], command: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not reached():
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
