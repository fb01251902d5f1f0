"""Placement of a comparison's workers on a Ray cluster, and the reasons of their deaths."""

from __future__ import annotations

import pytest

from mira.comparison.on_ray import Needs, _reason, _Worker
from mira.comparison.plan import Resources
from mira.comparison.remote import Arrival

KILLED = "Some common causes include: (1) the process was killed by the OOM killer due to high memory usage"
GUARD = "Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: 1 worker(s) were killed"


@pytest.mark.parametrize(
    ("resources", "on_gpu", "node", "number"),
    [
        ({}, False, {"CPU": 5.0}, 2),
        ({}, False, {"CPU": 1.0, "GPU": 8.0}, 0),
        ({}, True, {"CPU": 64.0, "GPU": 4.0}, 4),
        ({}, True, {"CPU": 64.0}, 0),
        ({"gpus": 0.1}, True, {"CPU": 64.0, "GPU": 1.0}, 10),
        ({"gpus": 0}, True, {"CPU": 4.0}, 2),
        ({"memory": 3}, False, {"CPU": 64.0, "memory": 10e9}, 3),
    ],
)
def test_a_node_holds_as_many_workers_as_its_scarcest_resource(
    resources: dict[str, float], on_gpu: bool, node: dict[str, float], number: int
) -> None:
    assert Needs.of(Resources(**resources), 2, on_gpu).fits(node) == number


@pytest.mark.parametrize(
    ("text", "cause"), [(KILLED, "killed, or its node is gone"), (GUARD, "its node ran out of memory")]
)
def test_the_guard_of_memory_is_told_from_other_deaths(text: str, cause: str) -> None:
    worker = _Worker(None, Arrival("there", "", 1, "", True))
    assert _reason(worker, RuntimeError(text)) == f"its worker on there died ({cause})"
