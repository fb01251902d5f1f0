"""The relay to Flower's app: rounds end in time, answers find their question, an app that dies is brought back."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mira.core.errors import UserError
from mira.fleet.flower import frames
from mira.fleet.flower.transport import FlowerTransport
from mira.fleet.messages.transport import NoReply


@dataclass
class App:
    """What Flower's app does, in a thread: ``reply`` says what a site answers, None for not yet."""

    path: Path
    reply: Callable[[str, bytes], bytes | str | None]
    nodes: dict[str, str] = field(default_factory=lambda: {"11": "ann", "12": "bob", "13": "stranger"})
    pushed: list[tuple[str, bytes]] = field(default_factory=list)
    dies_on: set[str] = field(default_factory=set)
    twice: bool = False
    asked: list[list[str]] = field(default_factory=list)

    def start(self) -> None:
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        messages: dict[str, tuple[str, bytes]] = {}
        with frames.connect(self.path) as server:
            while True:
                try:
                    asked = json.loads(frames.receive(server))
                except frames.Closed:
                    return
                if asked["do"] in self.dies_on:
                    self.dies_on.clear()
                    return
                if asked["do"] == "roster":
                    frames.send(server, json.dumps([[node, name] for node, name in self.nodes.items()]).encode())
                elif asked["do"] == "push":
                    contents = [frames.receive(server) for _ in asked["nodes"]]
                    new = [str(len(self.pushed) + n) for n in range(len(contents))]
                    names = [self.nodes[node] for node in asked["nodes"]]
                    self.pushed += zip(names, contents, strict=True)
                    messages |= dict(zip(new, zip(names, contents, strict=True), strict=True))
                    frames.send(server, json.dumps(new).encode())
                else:
                    self.asked.append(asked["ids"])
                    self.pull(server, {id: messages[id] for id in asked["ids"]})

    def pull(self, server: object, waiting: dict[str, tuple[str, bytes]]) -> None:
        found = {id: said for id, (name, data) in waiting.items() if (said := self.reply(name, data)) is not None}
        told: list[tuple[str, str | None]] = [
            (id, said if isinstance(said, str) else None) for id, said in found.items()
        ]
        contents = [said for said in found.values() if isinstance(said, bytes)]
        if self.twice:  # and one to nobody's question
            told, contents = [*told, ("99", None)], [*contents, b"?"]
        frames.send(server, json.dumps(told).encode())  # type: ignore[arg-type]
        for content in contents:
            frames.send(server, content)  # type: ignore[arg-type]


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[FlowerTransport]:
    made = FlowerTransport(
        frames.listen(tmp_path / "relay"), lambda: {name: name for name in ("ann", "bob", "cleo")}, patience=5.0
    )
    yield made
    made.close()


def echo(name: str, data: bytes) -> bytes:
    return name.encode() + data


def test_only_admitted_names_are_online(relay: FlowerTransport, tmp_path: Path) -> None:
    said: list[str] = []
    relay.say = said.append
    App(tmp_path / "relay", echo).start()
    assert relay.roster() == relay.roster() == {"ann", "bob"}
    assert said == ["online: ann, bob (2 of 3)"]


def test_of_the_nodes_of_a_name_only_the_one_of_the_admitted_key_counts(relay: FlowerTransport, tmp_path: Path) -> None:
    """The other was revoked, says still that it is online, and comes last."""
    relay.names = lambda: {"ann.2": "ann", "bob.1": "bob"}
    app = App(tmp_path / "relay", echo, nodes={"11": "ann.2", "12": "bob.1", "13": "ann.1"})
    app.start()
    assert relay.roster() == {"ann", "bob"}
    assert relay.exchange({"ann": b"1", "bob": b"2"}, 60.0, 2) == {"ann": b"ann.21", "bob": b"bob.12"}


def test_each_gets_its_own_and_answers_find_their_question(relay: FlowerTransport, tmp_path: Path) -> None:
    app = App(tmp_path / "relay", echo, twice=True)
    app.start()
    seen: dict[str, object] = {}
    replies = relay.exchange(
        {"ann": b"1", "bob": b"2", "cleo": b"3"}, 30.0, 3, lambda name, reply: not seen.update({name: reply})
    )
    assert replies == {"ann": b"ann1", "bob": b"bob2", "cleo": NoReply("it went offline", sent=False, kind="offline")}
    assert app.pushed == [("ann", b"1"), ("bob", b"2")]
    assert {name: seen[name] for name in ("ann", "bob")} == {"ann": b"ann1", "bob": b"bob2"}


def test_how_much_each_may_answer_is_told_before_it_is_asked(relay: FlowerTransport, tmp_path: Path) -> None:
    app = App(tmp_path / "relay", echo, dies_on={"pull"})
    app.start()
    told: list[tuple[dict[str, int], int]] = []
    relay.allow = lambda most: told.append((dict(most), len(app.pushed)))
    relay.revive = app.start
    relay.exchange({"ann": b"1", "bob": b"2"}, 60.0, 2, lambda name, reply: True, {"ann": 5, "bob": 7})
    assert told == [({"ann": 5, "bob": 7}, 0), ({"ann": 5, "bob": 7}, 2)], "and again where the app died"


def test_a_round_ends_by_its_deadline(relay: FlowerTransport, tmp_path: Path) -> None:
    App(tmp_path / "relay", lambda name, data: echo(name, data) if name == "ann" else None).start()
    replies = relay.exchange({"ann": b"1", "bob": b"2"}, 1.0, 2)
    assert replies == {"ann": b"ann1", "bob": NoReply("no reply within 1 s", busy=True, kind="late")}


def test_or_when_enough_are_in(relay: FlowerTransport, tmp_path: Path) -> None:
    App(tmp_path / "relay", lambda name, data: echo(name, data) if name == "ann" else None).start()
    assert relay.exchange({"ann": b"1", "bob": b"2"}, 600.0, 1) == {
        "ann": b"ann1",
        "bob": NoReply("it was not waited for", busy=True, kind="late"),
    }


def test_a_reply_that_does_not_count_is_not_enough(relay: FlowerTransport, tmp_path: Path) -> None:
    """Who sends what will be refused, and is the first, does not end the round for the others."""
    begun = time.monotonic()
    App(
        tmp_path / "relay",
        lambda name, data: echo(name, data) if name == "ann" or time.monotonic() > begun + 1 else None,
    ).start()
    replies = relay.exchange({"ann": b"1", "bob": b"2"}, 60.0, 1, lambda name, reply: name == "bob")
    assert replies == {"ann": b"ann1", "bob": b"bob2"}


def test_a_site_that_fails_is_lost_at_once(relay: FlowerTransport, tmp_path: Path) -> None:
    App(tmp_path / "relay", lambda name, data: "it died" if name == "bob" else echo(name, data)).start()
    assert relay.exchange({"ann": b"1", "bob": b"2"}, 600.0, 2) == {"ann": b"ann1", "bob": NoReply("it died")}


@pytest.mark.parametrize("moment", ["roster", "push", "pull"])
def test_an_app_that_dies_is_brought_back_and_asked_again(relay: FlowerTransport, tmp_path: Path, moment: str) -> None:
    app = App(tmp_path / "relay", echo, dies_on={moment})
    lives: list[None] = []
    relay.revive = lambda: (lives.append(None), app.start())[0]
    assert relay.exchange({"ann": b"1", "bob": b"2"}, 60.0, 2) == {"ann": b"ann1", "bob": b"bob2"}
    assert len(lives) == 2


@pytest.mark.parametrize(
    ("comes_back", "answer"), [(True, b"bob2"), (False, NoReply("it went offline", kind="offline"))]
)
def test_a_superlink_that_began_anew_is_given_time_to_meet_its_sites(
    relay: FlowerTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool, answer: bytes | NoReply
) -> None:
    """It knows nobody at first. Who was online before is waited for, and asked again."""
    monkeypatch.setattr("mira.fleet.flower.transport._LOOK", 0.02)
    app = App(tmp_path / "relay", echo, dies_on={"pull"})
    app.start()
    assert relay.roster() == {"ann", "bob"}

    def revive() -> None:
        app.nodes = {"21": "ann"}
        if comes_back:
            threading.Timer(0.1, app.nodes.update, [{"22": "bob"}]).start()
        else:
            relay.grace = 0.1
        app.start()

    relay.revive = revive
    assert relay.exchange({"ann": b"1", "bob": b"2"}, 60.0, 2) == {"ann": b"ann1", "bob": answer}


def test_a_site_that_goes_on_with_a_new_key_is_asked_again(
    relay: FlowerTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old node takes the request along. It is asked once more under its new one, the others are not, and the bytes that its
    answer may have are told anew."""
    monkeypatch.setattr("mira.fleet.flower.transport._MOVE", 0.1)
    nodes, told = {"11": "ann", "12": "bob"}, list[dict[str, int]]()
    relay.allow = lambda most: told.append(dict(most))

    def reply(name: str, data: bytes) -> bytes | str:
        if name != "bob":
            return echo(name, data)
        nodes.pop("12", None)
        nodes["22"] = "bob.new"
        relay.names = lambda: {"ann": "ann", "bob": "bob", "bob.new": "bob"}
        return frames.GONE  # Flower's answer for a node that signed off

    app = App(tmp_path / "relay", reply, nodes=nodes)
    app.start()
    replies = relay.exchange({"ann": b"1", "bob": b"2"}, 60.0, 2, lambda name, reply: True, {"ann": 5, "bob": 7})
    assert replies == {"ann": b"ann1", "bob": b"bob.new2"}
    assert app.pushed == [("ann", b"1"), ("bob", b"2"), ("bob.new", b"2")]
    assert told == [{"ann": 5, "bob": 7}, {"bob": 7}]


def test_the_time_in_which_the_app_is_away_does_not_count(relay: FlowerTransport, tmp_path: Path) -> None:
    app = App(tmp_path / "relay", echo, dies_on={"pull"})
    app.start()
    assert relay.roster() == {"ann", "bob"}
    relay.revive = lambda: (time.sleep(2.1), app.start())[0]
    assert relay.exchange({"ann": b"1", "bob": b"2"}, 2.0, 2) == {"ann": b"ann1", "bob": b"bob2"}


def test_a_worker_that_is_being_started_again_is_waited_for(tmp_path: Path) -> None:
    path, listening = tmp_path / "worker", list[socket.socket]()
    threading.Timer(0.1, lambda: listening.append(frames.listen(path))).start()
    with frames.connect(path, patience=60.0) as ours, listening[0], listening[0].accept()[0] as theirs:
        frames.send(ours, b"are you there?")
        assert frames.receive(theirs) == b"are you there?"


def test_an_app_that_never_comes_is_said(relay: FlowerTransport) -> None:
    relay.patience = 0.0
    with pytest.raises(UserError, match="Flower's app did not start"):
        relay.roster()


def test_an_app_that_dies_over_every_question_is_said(relay: FlowerTransport, tmp_path: Path) -> None:
    deaths: list[App] = []

    def revive() -> None:
        deaths.append(App(tmp_path / "relay", echo, dies_on={"roster"}))
        deaths[-1].start()

    relay.grace, relay.revive = 0.0, revive
    with pytest.raises(UserError, match="Flower's app has died 21 times over the same question"):
        relay.roster()
    assert len(deaths) == 21


def test_a_socket_is_its_owners_alone(tmp_path: Path) -> None:
    with frames.listen(tmp_path / "socket"):
        assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
    with pytest.raises(frames.Closed, match="nobody listens"):
        frames.connect(tmp_path / "socket")


def test_a_frame_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with frames.listen(tmp_path / "socket") as listener, frames.connect(tmp_path / "socket") as mine:
        theirs, _ = listener.accept()
        with theirs:
            mine.sendall((frames.LIMIT + 1).to_bytes(8, "big"))
            with pytest.raises(ValueError, match="a frame of 2147483649 bytes"):
                frames.receive(theirs)


def test_only_what_was_answered_is_asked_for_and_now_and_then_all(
    relay: FlowerTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mira.fleet.flower.transport._ALL", 1.0)
    answered = {"0"}
    relay.answered = lambda: answered
    relay._asked = time.monotonic()
    app = App(tmp_path / "relay", echo)
    app.start()
    assert relay.exchange({"ann": b"1", "bob": b"2"}, 60.0, 2) == {"ann": b"ann1", "bob": b"bob2"}
    assert app.asked == [["0"], ["1"]], "the second was asked for though nobody saw an answer pass"
    answered |= {"2", "3"}
    assert relay.exchange({"ann": b"1", "bob": b"2"}, 60.0, 2) == {"ann": b"ann1", "bob": b"bob2"}
    assert app.asked[2:] == [["2", "3"]]


def test_large_rows_pass_through_the_app_one_by_one_and_the_sites_are_told_of_each(
    relay: FlowerTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mira.fleet.flower.transport._SHARE", 10)
    app = App(tmp_path / "relay", echo)
    told: list[tuple[int, list[str]]] = []
    relay.pushed = lambda sites: told.append((len(app.pushed), sites))
    app.start()
    assert relay.exchange({"ann": b"1" * 9, "bob": b"2"}, 30.0, 2) == {"ann": b"ann" + b"1" * 9, "bob": b"bob2"}
    assert relay.exchange({"ann": b"1" * 11, "bob": b"2"}, 30.0, 2) == {"ann": b"ann" + b"1" * 11, "bob": b"bob2"}
    assert told == [(2, ["ann", "bob"]), (3, ["ann"]), (4, ["bob"])]


def test_a_request_that_is_too_long_is_not_sent_and_the_others_are(
    relay: FlowerTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "LIMIT", 200)
    app = App(tmp_path / "relay", echo)
    app.start()
    told: list[str] = []
    replies = relay.exchange(
        {"ann": b"1" * 201, "bob": b"2"}, 5.0, 2, lambda name, reply: told.append(name) or isinstance(reply, bytes)
    )
    assert replies["bob"] == b"bob2"
    assert isinstance(replies["ann"], NoReply)
    assert "has 201 bytes; at most 200" in replies["ann"].reason
    assert not replies["ann"].sent
    assert told == ["ann", "bob"]
    assert [name for name, _ in app.pushed] == ["bob"]


def test_what_came_too_late_is_fetched_with_the_next_answers_and_dropped(
    relay: FlowerTransport, tmp_path: Path
) -> None:
    late: list[bytes] = []

    def reply(name: str, data: bytes) -> bytes | None:
        if name == "bob" and data == b"1":
            late.append(data)
            return None if len(late) == 1 else b"late"
        return echo(name, data)

    App(tmp_path / "relay", reply).start()
    assert relay.exchange({"ann": b"1", "bob": b"1"}, 600.0, 1)["bob"] == NoReply(
        "it was not waited for", busy=True, kind="late"
    )
    assert relay.exchange({"ann": b"2", "bob": b"2"}, 600.0, 2) == {"ann": b"ann2", "bob": b"bob2"}
    assert len(late) == 2
    relay.exchange({"ann": b"3"}, 600.0, 1)
    assert len(late) == 2, "it is asked for until it came"
