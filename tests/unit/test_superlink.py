"""Sites are registered with the SuperLink in one process, and only those that it does not know."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mira.fleet import kit
from mira.fleet.commands import END
from mira.fleet.superlink import SuperLink


@dataclass
class Flower:
    """Stands for the process that runs Flower's commands: it refuses ``against`` with ``refusal`` and dies before ``before``."""

    against: str | None = None
    before: str | None = None
    refusal: str = "no"
    asked: list[list[str]] = field(default_factory=list)

    def __call__(self, line: object, *, input: str, **rest: Any) -> subprocess.CompletedProcess[str]:
        names = [json.loads(one)[5] for one in input.splitlines()]
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
    superlink = SuperLink(tmp_path / "here", lambda: kit.admitted(server), tmp_path / "relay", lambda line: None)
    flower = Flower(**trouble)
    monkeypatch.setattr(subprocess, "run", flower)
    assert superlink.admit() == {"ann", "bob", "cid"}
    assert flower.asked == [["ann", "bob", "cid"]]
    flower.against = flower.before = None
    kit.make_site(server, "dan", tmp_path / "dan")
    assert "dan" in superlink.admit()
    assert flower.asked[1:] == [[*again, "dan"]]
    superlink.admit()
    assert len(flower.asked) == 2, "nobody is new"
