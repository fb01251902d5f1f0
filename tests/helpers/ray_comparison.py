"""A small comparison for a Ray cluster: its file, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from helpers.ray_cluster import RayCluster
from helpers.sample_config import mira, settings

ENTRIES = {"Local": {"method.name": "local"}, "MIRA": {}}


def comparison_file(folder: Path, model: Path, data: Path) -> Path:
    """Two entries with two points each and two seeds, of two rounds: six runs and four measurements."""
    values = {
        "experiment": settings(model, data, rounds=2), "seeds": [0, 1], "tune_seeds": [0],
        "grid": {"training.lr": [0.001, 0.03]}, "entries": ENTRIES,
    }  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return folder / "c.yaml"


def small(file: Path, folder: Path, **changes: Any) -> Path:
    """The comparison of ``file`` with one seed and without a grid: two runs and two measurements, but for ``changes``."""
    values = yaml.safe_load(file.read_text(encoding="utf-8")) | {"seeds": [0], "grid": {}, **changes}
    (folder / "small.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "small.yaml"


def compared(file: Path, out: Path, cluster: RayCluster) -> str:
    """The output of the command."""
    ended = mira("compare", file, "--out", out, "--ray", cluster.address)
    assert ended.status == 0, ended.err
    assert not list(out.glob(".ray-*"))
    return ended.err
