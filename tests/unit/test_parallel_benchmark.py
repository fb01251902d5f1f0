"""The bench of parallel comparisons: its work and its arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from benchmarks import parallel
from benchmarks.parallel import PARALLEL, SERIAL, WIDE, comparison, figures

from mira.comparison import load


def test_the_work_is_twelve_runs(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(comparison(1)), encoding="utf-8")
    assert load(tmp_path / "c.yaml").total == 12


def test_ratios_are_those_of_pairs() -> None:
    taken = [(SERIAL, 100.0), (PARALLEL, 50.0), (SERIAL, 200.0), (PARALLEL, 120.0), (WIDE, 75.0)]
    runs = [{"side": side.name, "seconds": seconds, "losses": {"a": [1.0, 2.0]}} for side, seconds in taken]
    value = figures(runs)
    ratio = value["ratios"]["wall time, 2 workers / 1"]
    assert (ratio["samples"], ratio["value"], ratio["goal"]) == ([0.5, 0.6], pytest.approx(0.55), 0.55)
    assert value["ratios"]["wall time, 1 worker with 2 threads / with 1"]["samples"] == [0.5]
    assert value["agreement"]["test losses of all clients"] == {"difference": 0.0, "allowed": 0.0}
    runs[3]["losses"] = {"a": [1.0, 2.5]}
    assert figures(runs)["agreement"]["test losses of all clients"]["difference"] == 0.5


def test_a_bench_goes_on_where_it_ended() -> None:
    done = {"runs": [{"side": side.name} for side in (SERIAL, PARALLEL, SERIAL)]}
    assert parallel._missing(done, 2) == [PARALLEL, WIDE]
