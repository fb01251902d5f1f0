"""The messages that a site's node fetches and answers, over a SuperLink of a dictionary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.app import Message, Metadata
from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, inflate_object_from_contents
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from mira.fleet.flower import contents, frames, node
from mira.fleet.flower.contents import content_of, record_of
from mira.fleet.flower.node import ask_worker, take_part
from mira.fleet.identity import kit


class Line:
    """One connection of a node: it is asked ``request`` once, and then the connection fails. ``spoil``: changes a part on its
    way."""

    def __init__(self, request: bytes, spoil: Callable[[bytes], bytes] = lambda part: part) -> None:
        about = Metadata(
            run_id=5, message_id="", src_node_id=1, dst_node_id=7, reply_to_message_id="", group_id="", created_at=1.0,
            ttl=1e12, message_type="query",
        )  # fmt: skip
        with no_object_id_recompute():
            message = Message(metadata=about, content=record_of(request))  # type: ignore[call-overload]
            message.metadata.__dict__["_message_id"] = message.object_id
            self.parts = {id: spoil(part.deflate()) for id, part in get_all_nested_objects(message).items()}
            self.questions = [(message, get_object_tree(message))]
        self.fetched: list[str] = []
        self.confirmed: list[tuple[int, str]] = []
        self.replies: list[Message] = []
        self.pushed: dict[str, bytes] = {}
        self.number = message.metadata.message_id

    def receive(self) -> Any:
        if not self.questions:
            raise ConnectionError("the end")
        return self.questions.pop()

    def pull(self, run: int, part: str) -> bytes:
        self.fetched.append(part)
        return self.parts[part]

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        self.replies.append(message)
        return {part.object_id for part in node.iterate_object_tree(tree)}, "session"

    def push(self, run: int, session: str, part: str, content: bytes) -> None:
        assert (run, session) == (5, "session")
        self.pushed[part] = content

    @property
    def answer(self) -> Message:
        [reply] = self.replies
        back = inflate_object_from_contents(reply.metadata.message_id, self.pushed)
        assert isinstance(back, Message)
        assert back.metadata.reply_to_message_id == self.number
        return back


class Parts(InMemoryCoreState):
    """The parts of messages at a SuperLink, without messages."""

    def get_node_id(self) -> int:
        raise NotImplementedError

    def store_message_and_object_tree(self, *_: object) -> tuple[bool, list[str]]:
        raise NotImplementedError


class Shaky(Line):
    """A line to the store of a SuperLink, which keeps each part of an answer once. ``lost``: pushes whose answer is lost, so that
    Flower's client repeats them; ``missed``: pushes that the SuperLink does not take, as after a long silence."""

    def __init__(self, lost: int = 0, missed: int = 0) -> None:
        super().__init__(b"?")
        self.lost, self.missed, self.one = lost, missed, threading.Lock()
        self.store = InMemoryObjectStore()
        self.state = Parts(self.store)

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        session = self.state.start_session(5)
        if not self.replies:
            self.replies.append(message)
        return set(self.state.preregister_object_tree(tree, session)), session

    def push(self, run: int, session: str, part: str, content: bytes) -> None:
        with self.one:
            missed, self.missed = self.missed, max(self.missed - 1, 0)
            lost, self.lost = (self.lost, self.lost) if missed else (self.lost, max(self.lost - 1, 0))
            taken = not missed and self.state.store_object(run, session, part, content)
            if lost and not missed:
                taken = self.state.store_object(run, session, part, content)
        if not taken:
            raise ObjectPushError(part, run, session)

    @property
    def answer(self) -> Message:
        self.pushed = {id: self.store.get(id) or b"" for id in self.store.store}
        return super().answer


def taken_part(monkeypatch: pytest.MonkeyPatch, folder: Path, line: Line, ask: Callable[[bytes], bytes]) -> None:
    @contextmanager
    def connected(*_: object) -> Iterator[Any]:
        unused = None
        yield 7, line.receive, line.send, unused, unused, line.pull, line.push, lambda *m: line.confirmed.append(m)

    monkeypatch.setattr(node, "http_request_response", connected)
    kit.make_server(folder / "server", "127.0.0.1:1", days=2)
    site = kit.make_site(folder / "server", "a", folder / "a")
    with pytest.raises(ConnectionError, match="the end"):
        take_part(site.address, site.authority, site.key, ask)


@pytest.mark.parametrize("size", [10, contents.SHORT + 1], ids=["short", "long"])
def test_a_message_is_answered_by_the_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int) -> None:
    line = Line(b"?" * size)
    taken_part(monkeypatch, tmp_path, line, lambda request: b"!" + request)
    assert content_of(line.answer) == b"!" + b"?" * size
    assert line.confirmed == [(5, line.number)], "so that the SuperLink forgets it"
    assert sorted(line.fetched) == sorted(line.parts), "each part once"


def test_an_answer_arrives_though_confirmations_of_its_parts_are_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A SuperLink refuses a part that it has, and the others of the answer follow."""
    line = Shaky(lost=2)
    taken_part(monkeypatch, tmp_path, line, lambda request: b"!")
    assert content_of(line.answer) == b"!"


def test_parts_that_are_not_taken_are_told_and_the_others_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = Shaky(missed=2)
    taken_part(monkeypatch, tmp_path, line, lambda request: b"!")
    assert not line.missed
    assert sum(bool(line.store.get(part)) for part in line.store.store) == 1, "of three parts"
    assert "no longer takes, 2 of 3 parts of an answer" in capfd.readouterr().err


def test_a_worker_that_does_not_answer_is_told_without_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node, "_WORKER", 0.0)
    line, path = Line(b"?"), tmp_path / "worker"
    taken_part(monkeypatch, tmp_path, line, lambda request: ask_worker(path, request))
    assert line.answer.error.reason == "the site's worker did not answer"
    assert str(path) in capfd.readouterr().err, "its log says it"


def test_a_part_that_is_not_the_one_announced_reaches_no_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line, asked = Line(b"a request", spoil=lambda part: part.replace(b"request", b"forgery")), list[bytes]()
    taken_part(monkeypatch, tmp_path, line, lambda request: asked.append(request) or b"")  # type: ignore[func-returns-value]
    assert (asked, line.replies, line.confirmed) == ([], [], [])
    assert "not the one that was announced" in capfd.readouterr().err


def test_a_message_that_is_too_long_is_not_fetched_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frames, "LIMIT", 100)
    line = Line(b"?" * 200)
    taken_part(monkeypatch, tmp_path, line, lambda request: pytest.fail("it was asked"))
    assert line.replies == []
    assert "more than 100 bytes" in capfd.readouterr().err
