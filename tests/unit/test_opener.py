"""Waiting for sites: all of them have joined once, or were revoked meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.sample_config import settings
from mira import Experiment
from mira.core.errors import UserError
from mira.data.sources.sites import Sites
from mira.fleet.messages.packet import PROTOCOL, Packet, pack, unpack
from mira.fleet.messages.transport import InProcessTransport
from mira.fleet.server.clients import RemoteClients
from mira.fleet.server.session import Opener
from mira.graphs.known import Complete

NAMES = ["ann", "bob", "cleo"]


@dataclass
class Joining:
    """Sites that join, with 4 examples each; bob never comes. From the third look on those ``revoked`` are admitted no longer."""

    revoked: Sequence[str] = ("bob",)
    looks: int = 0
    numbers: dict[str, list[int]] = field(default_factory=dict)
    said: dict[str, Any] = field(
        default_factory=lambda: {"protocol": PROTOCOL, "examples": 4, "releases": 0, "allow_transfer": False}
    )

    def names(self) -> list[str]:
        self.looks += 1
        return [name for name in NAMES if self.looks < 3 or name not in self.revoked]

    def handler(self, name: str) -> Callable[[bytes], bytes]:
        def handle(request: bytes) -> bytes:
            asked = unpack(request)
            self.numbers.setdefault(name, []).append(asked.values["number"])
            return pack(Packet(asked.head, self.said, {}))

        return handle

    def opener(self) -> Opener:
        there = InProcessTransport({name: self.handler(name) for name in ("ann", "cleo")})
        return Opener(there, self.names, patience=600.0)


@pytest.fixture
def wanted(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.setattr("mira.fleet.server.session._PAUSE", 0.0)
    monkeypatch.setattr("mira.setup.engine.EnginePlan.build", lambda plan: pytest.fail("the server built an engine"))
    values: dict[str, Any] = settings(tiny_folder, tmp_path, clients={"rank": {"ann": 1, "bob": 1}})
    values["data"] = {"source": "sites", "groups": {"ann": "a", "bob": "a", "cleo": "b"}}
    values["graph"] = {"name": "groups"}
    return Experiment(**values)


def test_a_site_that_is_revoked_before_it_joined_frees_the_server(wanted: Experiment) -> None:
    sites = Joining()
    session = sites.opener()(wanted)
    assert session.names == ["ann", "cleo"]
    assert sites.numbers == {"ann": [0, 0], "cleo": [2, 1]}, "who joined before joins anew, under its new number"
    assert session.environment["data"]["clients"] == len(session.environment["groups"]) == 2
    data, clients = session.experiment.data, session.experiment.clients
    assert isinstance(data, Sites)
    assert (data.examples, data.groups) == ({"ann": 4, "cleo": 4}, {"ann": "a", "cleo": "b"})
    assert clients.rank == {"ann": 1}
    assert len(session.initial_state().rows) == 2


def test_where_all_are_revoked_it_ends(wanted: Experiment) -> None:
    with pytest.raises(UserError, match="all sites were revoked before the run began"):
        Joining(revoked=NAMES).opener()(wanted)


def test_a_run_that_goes_on_keeps_its_numbers_and_does_not_wait_for_the_revoked(wanted: Experiment) -> None:
    """Nor is a site in it that was issued later."""
    began = wanted.model_copy(update={"data": Sites(examples={"ann": 4, "bob": 4, "cleo": 4})})
    sites = Joining(looks=3)
    session = sites.opener()(began.model_copy(update={"graph": Complete()}))
    assert session.names == NAMES
    assert sites.numbers == {"ann": [0], "cleo": [2]}
    engine = session.remote
    assert isinstance(engine, RemoteClients)
    assert list(engine.run.names) == NAMES
