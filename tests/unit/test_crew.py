"""The workers of a run without Ray, and those whose places fail, with a stand-in for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mira.core.errors import UserError
from mira.core.ray import Connection
from mira.setup import crew as module
from mira.setup.crew import Place, RayCrew
from mira.setup.spread import spread_out


class Actor(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(build=SimpleNamespace(remote=lambda taken_over: object()))


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> RayCrew:
    """Two places whose workers all fail while they begin."""
    ray = SimpleNamespace(
        remote=lambda **options: lambda made: SimpleNamespace(remote=lambda *arguments: Actor()),
        wait=lambda refs, timeout: (refs[:1], refs[1:]), kill=lambda actor: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(module, "send_tensors_as_arrays", lambda: None)
    monkeypatch.setattr(module, "_result", lambda ref: (None, "its node ran out of memory"))
    return RayCrew(Connection(ours=False), [Place({})] * 2, None, {}, lambda tokens: None)


@pytest.mark.parametrize("engine", [{"devices": ("cpu", "cpu")}, {"workers": 2}], ids=["devices", "ray"])
def test_the_extra_is_named(engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    section = SimpleNamespace(**{"devices": None, "ray": "auto"} | engine)
    plan: Any = SimpleNamespace(experiment=SimpleNamespace(engine=section), taken_over={})
    with pytest.raises(UserError) as caught:
        spread_out(plan)
    key = "devices" if "devices" in engine else "ray"
    assert str(caught.value) == f"engine.{key}: Ray is not installed; pip install 'mira-fl[ray]'"


def test_workers_that_cannot_begin_are_told_with_their_reason(crew: RayCrew, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError) as caught:
        crew.start(fitting=2)
    assert str(caught.value) == "engine.workers: no worker can begin: its node ran out of memory"
    assert caplog.messages[-1] == (
        "a worker did not begin: its node ran out of memory; after 2 failures its place stays empty"
    )


def test_places_that_are_given_up_are_not_waited_for(crew: RayCrew, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last worker of a run was lost."""
    about: Any = SimpleNamespace(recorded={}, versions={}, processor="", node="here")
    crew.first = about
    for place in range(2):
        crew._create(place)
    with pytest.raises(
        UserError, match=r"no new one can begin \(its node ran out of memory\); committed rounds are kept"
    ):
        crew.refill()


def test_an_error_of_a_later_worker_is_one_line(
    crew: RayCrew, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(ref: Any) -> Any:
        raise RuntimeError("out of\nluck")

    about: Any = SimpleNamespace(recorded={}, versions={}, processor="", node="here")
    crew.first = about
    crew._create(0)
    monkeypatch.setattr(module, "_result", fails)
    assert crew.begin() == []
    assert caplog.messages[0] == "a worker did not begin: out of luck"
