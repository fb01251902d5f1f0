"""Placement of a comparison's workers on a Ray cluster, and the reasons of their ends."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError

from mira.comparison.machines import Same
from mira.comparison.nodes import Needs, Nodes
from mira.comparison.on_ray import _reason, _Worker
from mira.comparison.plan import Resources
from mira.comparison.remote import Arrival
from mira.core.errors import UserError
from mira.core.ray import failed_start, reason_of
from mira.core.versions import version_of

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


class FakeRay:
    """A cluster of one node for each of ``cpus``; None: a node that is gone."""

    def __init__(self, *cpus: float | None) -> None:
        self._cpus = cpus

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": f"n{number}", "Alive": cpus is not None, "Resources": {"CPU": cpus or 0.0}}
            for number, cpus in enumerate(self._cpus)
        ]


def arrival(node: str, processor: str = "P", mira: str | None = None) -> Arrival:
    place = {"host": f"host-{node}", "processor": processor, "cores": 1, "system": "S", "device": "cpu"}
    return Arrival(place, node, 1, {"mira": mira or version_of("mira"), "torch": "2"}, True)


def test_a_node_whose_runs_would_be_unlike_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    nodes = Nodes(FakeRay(2.0, 4.0, 1.0, None), Needs(1, 0.0, None), Same())
    assert (nodes.room(), nodes.options()) == (7, {})
    assert nodes.take(arrival("n0"))
    assert not nodes.take(arrival("n1", "Q"))
    assert not nodes.take(arrival("n1", "Q"))
    assert not nodes.take(arrival("n2", mira="0.0"))
    assert nodes.room() == 2
    assert nodes.options() == {"label_selector": {"ray.io/node-id": "!in(n1, n2)"}}
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("host-n1 is not used: its processor is Q, but P in the other runs, so that")
    assert caplog.messages[0].endswith("; allow that with --unlike-machines")
    assert re.fullmatch("host-n2 is not used: its mira is 0.0, but .* here; install .*", caplog.messages[1])


def test_why_there_is_no_worker() -> None:
    nodes = Nodes(FakeRay(2.0, 2.0), Needs(2, 0.0, None), Same())
    assert nodes.why_none() == "the cluster is busy, or slow to start a worker (cpus 2, gpus 0)"
    assert nodes.take(arrival("n0"))
    assert not nodes.take(arrival("n1", "Q"))
    nodes.ray = FakeRay(None, None, 1.0)
    assert nodes.why_none() == "no node of the cluster has what a run needs (cpus 2, gpus 0)"
    nodes.ray = FakeRay(None, 2.0, 1.0)
    with pytest.raises(UserError, match=r"^no node of the Ray cluster can be used; host-n1: its processor is Q, but P"):
        nodes.why_none()


class Died(ActorDiedError):
    """The error of an actor that ran, with the text that Ray has for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.error_msg = text


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (Died(KILLED), "killed, or its node is gone"),
        (Died(GUARD), "its node ran out of memory"),
        (OutOfMemoryError("too much"), "its node ran out of memory"),
        (RayError("no\nroom"), "no room"),
    ],
)
def test_the_guard_of_memory_is_told_from_other_deaths(error: RayError, cause: str) -> None:
    worker = _Worker(None, Arrival({"host": "there"}, "", 1, {}, True))
    assert _reason(worker, error) == f"its worker on there died ({cause})"


def failed(cause: Exception, text: str = "") -> RayTaskError:
    """The error of a call that ended with ``cause``, with Ray's ``text`` about it."""
    return RayTaskError("call", text, cause, proctitle="ray::Remote.call", pid=7, ip="10.0.0.3", actor_id="0a")


MISSING = ModuleNotFoundError("No module named 'plugged'")
# What Ray 2.58 says of an actor's class, or of an argument, that a node cannot import.
IMPORT = (
    "Traceback (most recent call last):\n  File \"x.py\", line 1, in f\nModuleNotFoundError: No module named 'plugged'"
)
CLASS = RuntimeError(f"The actor with name Remote failed to import on the worker. This may be because:\n\n{IMPORT}")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (failed(MISSING, IMPORT), "ModuleNotFoundError: No module named 'plugged'"),
        (failed(CLASS, "no matter"), "ModuleNotFoundError: No module named 'plugged'"),
        (failed(RayError(f"System error: No module named 'plugged'\ntraceback: {IMPORT}")),
         "ModuleNotFoundError: No module named 'plugged'"),
        (failed(UserError("data.path=x: no such file")), "data.path=x: no such file"),
        (failed(RuntimeError("out of\nluck")), "RuntimeError: out of luck"),
        (RayError(), "RayError"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failed_call_is_one_line(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_a_worker_that_cannot_start_says_why_and_where() -> None:
    error = ActorDiedError(failed(MISSING, IMPORT))
    assert _reason(_Worker(None), error) == (
        "its worker cannot start on 10.0.0.3: ModuleNotFoundError: No module named 'plugged'"
    )
    assert failed_start(Died(KILLED)) is None
