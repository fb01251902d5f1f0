"""Nodes of a Ray cluster with another processor, and workers with a GPU. A file of its own, so as to run beside the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.odd_machine import OddRemote
from helpers.ray_cluster import ray_cluster
from helpers.ray_comparison import compared, comparison_file, small
from helpers.sample_config import write_clients
from mira.comparison import on_ray


def test_a_node_of_another_kind_is_left_alone_and_workers_with_a_gpu_leave_nothing_behind(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of two nodes comes first decides the kind. A worker with a GPU ends after each task."""
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(on_ray, "left_mark", lambda out: out / ".ray-elsewhere")
    monkeypatch.setattr(on_ray, "Remote", OddRemote)
    whole = comparison_file(tmp_path, tiny_folder, write_clients(tmp_path / "data.jsonl"))
    # Two runs that can begin at once, and one measurement: each task starts a process.
    two = {"entries": {"MIRA": {}}, "grid": {"training.lr": [0.001, 0.03]}, "resources": {"gpus": 1}}
    with ray_cluster(1) as cluster:
        for odd in ({}, {"ODD_MACHINE": "1"}):
            cluster.add(1, 1, {"TMPDIR": str(private), **odd})
        told = compared(small(whole, tmp_path, **two), tmp_path / "o", cluster)
    assert "which does not share the folder" in told
    assert told.count("is not used: its processor is") == 1, told
    assert "put back" not in told
    places = [json.loads(place.read_text()) for place in (tmp_path / "o").rglob("where.json")]
    assert len(places) == 2
    assert len({place["processor"] for run in places for place in run}) == 1
    assert not list(private.glob("mira-compare-*"))
