"""Sites are registered with the SuperLink in one process, and only those that it does not know."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.admission import admit_request
from mira.fleet.flower import superlink
from mira.fleet.flower.flwr_commands import END
from mira.fleet.flower.superlink import SuperLink
from mira.fleet.identity import join, kit, registry


@dataclass
class Flower:
    """Stands for the process that runs Flower's commands: it refuses ``against`` with ``refusal`` and dies before ``before``."""

    against: str | None = None
    before: str | None = None
    refusal: str = "no"
    asked: list[list[str]] = field(default_factory=list)

    def __call__(self, line: object, *, input: str, **rest: Any) -> subprocess.CompletedProcess[str]:
        names = [json.loads(one)[5].partition(".")[0] for one in input.splitlines()]
        self.asked.append(names)
        said = ""
        for name in names:
            if name == self.before:
                break
            said += (self.refusal if name == self.against else 'Note.\n{"success": true}\n') + END
        return subprocess.CompletedProcess([], 0, said, "")


@pytest.mark.parametrize(
    ("trouble", "again"),
    [
        ({"against": "bob"}, ["bob"]),
        ({"against": "bob", "refusal": '{"success": false, "error-message": "Public key already in use."}'}, []),
        ({"before": "bob"}, ["bob", "cid"]),
        ({}, []),
    ],
)
def test_who_is_known_is_not_registered_again(
    trouble: dict[str, str], again: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = tmp_path / "server"
    kit.make_server(server, "127.0.0.1:9443", days=2)
    for name in ("ann", "bob", "cid"):
        kit.make_site(server, name, tmp_path / name)
    (tmp_path / "here").mkdir()
    made = SuperLink(tmp_path / "here", lambda: registry.admitted(server), tmp_path / "relay", lambda line: None)
    flower = Flower(**trouble)
    monkeypatch.setattr(subprocess, "run", flower)
    assert list(made.admit().values()) == ["ann", "bob", "cid"]
    assert flower.asked == [["ann", "bob", "cid"]]
    flower.against = flower.before = None
    kit.make_site(server, "dan", tmp_path / "dan")
    assert "dan" in made.admit().values()
    assert flower.asked[1:] == [[*again, "dan"]]
    made.admit()
    assert len(flower.asked) == 2, "nobody is new"
    [old] = [node for node, name in made.admit().items() if name == "dan"]
    kit.revoke(server, "dan")
    kit.make_site(server, "dan", tmp_path / "dan-again")
    [new] = [node for node, name in made.admit().items() if name == "dan"]
    assert flower.asked[2:] == [["dan"]]
    assert new != old, "the node of a key that was revoked is nobody's"


@dataclass
class Stand:
    """Stands for a process: alive while it has a number."""

    pid: int | None = 1
    stopped: int = 0

    def tend(self) -> bool:
        return self.pid is not None

    def stop(self) -> None:
        self.pid = None
        self.stopped += 1


def test_a_superlink_that_is_new_is_told_all_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows nobody and runs nothing: sites are registered and the app is submitted, once; and once more where it was killed,
    where the app went, and where the app does not come."""
    server, now = tmp_path / "server", [0.0]
    kit.make_server(server, "127.0.0.1:9443", days=2)
    kit.make_site(server, "ann", tmp_path / "ann")
    (tmp_path / "here").mkdir()
    made = SuperLink(tmp_path / "here", lambda: registry.admitted(server), tmp_path / "relay", lambda line: None)
    process, executors, asked = Stand(), list[Stand](), list[str]()

    def executor(self: SuperLink) -> Stand:
        executors.append(Stand())
        return executors[-1]

    def flower(self: SuperLink, *commands: tuple[str, ...]) -> list[bool]:
        asked.extend(command[0] for command in commands)
        return [True] * len(commands)

    monkeypatch.setattr(made, "_process", process)
    monkeypatch.setattr(SuperLink, "_new_executor", executor)
    monkeypatch.setattr(SuperLink, "_flwr", flower)
    monkeypatch.setattr(superlink, "_listens", lambda port: process.pid is not None)
    monkeypatch.setattr(superlink.time, "monotonic", lambda: now[0])
    assert not made.ready()
    for _ in range(3):
        made.revive()
    assert asked == ["supernode", "run"]
    assert made.ready()
    assert (made.knows("ann"), made.knows("bob")) == (True, False)
    made.dropped()  # the app went away
    made.revive()
    assert asked == ["supernode", "run", "run"]
    process.pid = None  # killed
    made.revive()
    assert not made.ready()
    process.pid = 2
    made.revive()
    assert asked[3:] == ["supernode", "run"]
    assert [one.stopped for one in executors] == [1, 0], "the executor goes with its SuperLink"
    now[0] = 121.0  # and no app has come
    made.revive()
    assert process.stopped == 1
    process.pid = 3
    made.revive()
    assert asked[5:] == ["supernode", "run"]
    made.stop()
    assert (process.stopped, executors[-1].stopped) == (2, 1)


def test_a_site_is_known_with_all_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes with its new key, before the SuperLink has it, must be told to wait, and not that it is unknown."""
    server, asked = tmp_path / "server", list[tuple[str, ...]]()
    kit.make_server(server, "127.0.0.1:9443", days=2)
    kit.make_site(server, "ann", tmp_path / "ann")
    (tmp_path / "here").mkdir()
    made = SuperLink(tmp_path / "here", lambda: registry.admitted(server), tmp_path / "relay", lambda line: None)

    def flower(self: SuperLink, *commands: tuple[str, ...]) -> list[bool]:
        asked.extend(commands)
        return [True] * len(commands)

    monkeypatch.setattr(SuperLink, "_flwr", flower)
    assert list(made.admit().values()) == ["ann"]
    assert made.knows("ann")
    admit_request(server, join.join_again(tmp_path / "ann").request, tmp_path / "ann.reply")
    assert not made.knows("ann")
    assert list(made.admit().values()) == ["ann", "ann"]
    assert made.knows("ann")
    files = [Path(command[2]) for command in asked]
    assert [file.read_text().strip() for file in files] == [site.public_key for site in registry.admitted(server)]
