"""Comparisons on a real local Ray cluster of two nodes, whose figures are those of a serial comparison to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from helpers.ray_cluster import RayCluster, ray_cluster, wait_for
from helpers.ray_comparison import compared, comparison_file, small
from helpers.sample_config import mira, outcome, write_clients
from mira.comparison import on_ray
from mira.store import mirror
from mira.store.mirror import Parcel


@pytest.fixture(scope="module")
def head() -> Iterator[RayCluster]:
    with ray_cluster(1) as started:
        yield started


@pytest.fixture(scope="module")
def second(head: RayCluster) -> Any:
    return head.add(1)


@pytest.fixture(scope="module")
def cluster(head: RayCluster, second: Any) -> RayCluster:
    """A cluster of two nodes; ``second`` is the one without the head."""
    return head


@pytest.fixture(scope="module")
def file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    return comparison_file(folder, tiny_folder, write_clients(folder / "data.jsonl"))


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


def own_folders() -> set[Path]:
    """Folders of workers that do not share the comparison's, apart from those of killed ones, which the next worker removes."""
    return set(Path(tempfile.gettempdir()).glob("mira-compare-*"))


def test_runs_on_two_nodes_have_the_figures_of_a_serial_comparison(
    file: Path, serial: dict[str, Any], cluster: RayCluster, tmp_path: Path
) -> None:
    before = own_folders()
    told = compared(file, tmp_path / "o", cluster)
    assert own_folders() == before, "the folder is shared"
    assert results(tmp_path / "o") == serial
    assert len(re.findall(r"worker \d+ on \S+\n", told)) == 2, told


def test_workers_and_a_node_are_lost_without_a_shared_folder(
    file: Path, serial: dict[str, Any], cluster: RayCluster, second: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The second node goes with its first run, and another one comes. A worker of another run is killed."""
    lost: dict[str, Path] = {}
    hired: list[on_ray.RayWorkers] = []
    made = on_ray.RayWorkers.__init__

    class Watched(mirror.Mirror):
        def apply(self, parcel: Parcel) -> None:
            super().apply(parcel)
            if parcel[-1].name == "rounds/000001.json":
                harm(next(worker for worker in hired[0]._workers if worker.mirror is self))

    def harm(sender: on_ray._Worker) -> None:
        assert sender.task is not None
        assert sender.arrival is not None
        run = sender.task.job.folder
        if "node" not in lost and sender.arrival.node == second.node_id:
            lost["node"] = run
            cluster.remove(second)
            cluster.add(1)
        elif "worker" not in lost and run not in lost.values():
            lost["worker"] = run
            os.kill(sender.arrival.process, signal.SIGKILL)

    def init(self: on_ray.RayWorkers, *given: Any) -> None:
        made(self, *given)
        hired.append(self)

    monkeypatch.setattr(on_ray, "left_mark", lambda out: out / ".ray-elsewhere")
    monkeypatch.setattr(on_ray, "Mirror", Watched)
    monkeypatch.setattr(on_ray.RayWorkers, "__init__", init)
    told = compared(file, tmp_path / "o", cluster)
    assert set(lost) == {"node", "worker"}
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


def records(folder: Path) -> list[Path]:
    """The committed rounds of all runs."""
    return list(folder.rglob("rounds/*.json"))


def test_a_comparison_without_a_node_says_so_and_goes_on_with_the_next_one(
    file: Path, head: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only, out = head.add(2), tmp_path / "o"
    said: list[str] = []

    def warning(text: str, *given: Any) -> None:
        said.append(text % given)
        if "no node" in said[-1]:
            head.add(2)

    def harm() -> None:
        wait_for(lambda: len(records(tmp_path)) > 2)
        head.remove(only)

    monkeypatch.setattr(on_ray, "_SILENCE", 1.0)
    monkeypatch.setattr(on_ray.log, "warning", warning)
    thread = Thread(target=harm)
    thread.start()
    values = yaml.safe_load(file.read_text(encoding="utf-8"))["experiment"]
    values |= {"rounds": 6, "engine": {"threads": 2}}
    values["model"]["device"] = "cpu"  # whatever nodes of other tests are still counted
    compared(small(file, tmp_path, experiment=values, entries={"MIRA": {}}), out, head)
    thread.join()
    assert any("no node of the cluster has what a run needs (cpus 2, gpus 0)" in line for line in said), said
