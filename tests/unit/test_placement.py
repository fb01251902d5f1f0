"""Devices and workers of a run: which go together, and that a run may go on with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mira import config
from mira.config import Experiment, parse
from mira.core.errors import UserError
from mira.runner.resuming import to_resume

MINIMAL: dict[str, Any] = {
    "rounds": 3,
    "model": {"name": "m"},
    "data": {"source": "builtin"},
    "training": {"lr": 1e-3, "local_steps": 4},
}


def experiment(engine: dict[str, Any], device: str = "auto") -> Experiment:
    return parse(MINIMAL | {"engine": engine, "model": {"name": "m", "device": device}})


@pytest.mark.parametrize(
    ("engine", "spreads"),
    [
        ({}, False),
        ({"devices": ["cuda:1"]}, False),
        ({"devices": ["cuda:0", "cuda:1"]}, True),
        ({"devices": ["cpu", "cpu"]}, True),
        ({"workers": 1}, True),
        ({"workers": 4, "ray": "10.0.0.1:6379"}, True),
    ],
)
def test_one_device_needs_no_worker(engine: dict[str, Any], spreads: bool) -> None:
    assert experiment(engine).engine.spreads == spreads


@pytest.mark.parametrize(
    ("engine", "device", "message"),
    [
        (
            {"devices": ["cpu"], "workers": 2}, "auto",
            "engine.workers=2: engine.devices=[cpu] gives one worker for each device of this machine; leave one of the two out",
        ),
        (
            {"ray": "10.0.0.1:6379"}, "auto",
            "engine.ray=10.0.0.1:6379: needs the number of workers; set engine.workers, or leave engine.ray out",
        ),
        (
            {"devices": ["cpu", "cuda:0"]}, "auto",
            "engine.devices=[cpu, cuda:0]: CPU and GPU round differently; give devices of one kind",
        ),
        (
            {"devices": ["cuda:0", "cuda:1"]}, "cpu",
            "engine.devices=[cuda:0, cuda:1]: model.device=cpu asks for another kind; leave model.device out",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together(engine: dict[str, Any], device: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        experiment(engine, device)
    assert str(caught.value) == message


@pytest.mark.parametrize("devices", [["gpu0"], ["cuda"], []])
def test_a_device_is_named_as_torch_names_it(devices: list[str]) -> None:
    with pytest.raises(UserError, match=r"engine\.devices"):
        experiment({"devices": devices})


@pytest.mark.parametrize(
    ("began", "given", "now"),
    [
        ({"devices": ["cpu", "cpu"]}, {"workers": 2}, "2 workers on Ray (auto)"),
        ({"workers": 2, "ray": "h:1"}, {"devices": ["cuda:0"]}, "cuda:0"),
        ({"workers": 2, "ray": "h:1"}, {"workers": 1}, "1 worker on Ray (h:1)"),
        ({"workers": 2, "ray": "h:1"}, {"ray": "i:1"}, "2 workers on Ray (i:1)"),
        ({"devices": ["cpu", "cpu"]}, {"devices": None}, "one process"),
        ({"devices": ["cpu", "cpu"]}, {"workers": None}, "one process"),
        ({"workers": 2, "ray": "h:1"}, {"devices": None}, "one process"),
        ({"workers": 2, "ray": "h:1"}, {"workers": None}, "one process"),
    ],
)
def test_a_run_goes_on_elsewhere(began: dict[str, Any], given: dict[str, Any], now: str) -> None:
    before = experiment(began | {"threads": 3})
    after = config.placed(before, given)
    assert config.placement_told(after) == now
    assert after.engine.threads == 3
    assert config.placed(after, config.placement_of(before)) == before


def test_set_gives_a_resumed_run_other_workers_and_nothing_else(tmp_path: Path) -> None:
    given = ["engine.workers=3", "engine.ray=h:1"]
    assert to_resume(tmp_path, given, None, None, None)[3] == {"workers": 3, "ray": "h:1"}
    for other in ("engine.threads=2", "training.lr=1"):
        with pytest.raises(UserError) as caught:
            to_resume(tmp_path, [other], None, None, None)
        assert str(caught.value) == (
            f"--set {other}: a run resumes with its own settings, engine.devices, engine.workers, engine.ray excepted;"
            " drop it, or start a new run"
        )
