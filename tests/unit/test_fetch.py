"""Uploads of sites: each at its own pace, none at the cost of another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from mira.fleet.flower.fetch import Fetches


class Uploads:
    """What sites upload: nothing until it is announced, then for as long as it takes."""

    def __init__(self) -> None:
        self.announced: set[str] = set()
        self.whole: dict[str, threading.Event] = {}
        self.begun: list[str] = []
        self.at_once, self.most = 0, 0

    def __call__(self, id: str) -> str | None:
        if id not in self.announced:
            return None
        self.begun.append(id)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        if id in self.whole:
            self.whole[id].wait(60)
        self.at_once -= 1
        if id == "broken":
            raise OSError("it does not inflate")
        return id.upper()


@pytest.fixture
def uploads() -> Iterator[Uploads]:
    made = Uploads()
    yield made
    for event in made.whole.values():
        event.set()


def test_an_upload_that_takes_its_time_holds_up_no_other(uploads: Uploads) -> None:
    uploads.announced, uploads.whole = {"a", "slow", "b"}, {"slow": threading.Event()}
    fetches = Fetches(uploads, turn=0.2)
    found = dict(fetches.come(["slow", "a", "b", "later"]))
    found |= fetches.come([id for id in ("slow", "a", "b", "later") if id not in found])
    assert found == {"a": "A", "b": "B"}
    uploads.whole["slow"].set()
    for _ in range(100):
        if found := dict(fetches.come(["slow", "later"])):
            break
    assert found == {"slow": "SLOW"}
    assert uploads.begun.count("slow") == 1, "it is not begun again"


def test_what_comes_at_once_is_held_one_by_one(uploads: Uploads) -> None:
    uploads.announced = {"a", "b", "c"}
    for id, found in Fetches(uploads).come(["a", "b", "c", "later"]):
        assert found == id.upper()
        assert uploads.begun[-1] == id, "the next is not fetched before this one was taken"
    assert uploads.most == 1


def test_one_that_cannot_be_read_is_told_and_the_others_come(uploads: Uploads) -> None:
    uploads.announced = {"a", "broken", "b"}
    found = dict(Fetches(uploads).come(["a", "broken", "b"]))
    assert (found["a"], found["b"], str(found["broken"])) == ("A", "B", "it does not inflate")


def test_everybody_has_a_turn(uploads: Uploads) -> None:
    """However many never end: in each turn those are begun first that waited longest."""
    slow = [f"slow-{n}" for n in range(4)]
    uploads.announced, uploads.whole = {*slow, "a"}, {id: threading.Event() for id in slow}
    fetches, found, turns = Fetches(uploads, turn=0.05), dict[str, object](), 0
    while not found:
        found, turns = dict(fetches.come([*slow, "a"])), turns + 1
    assert found == {"a": "A"}
    assert turns <= 6


def test_what_nobody_asks_for_any_more_is_dropped(uploads: Uploads) -> None:
    uploads.announced, uploads.whole = {"slow"}, {"slow": threading.Event()}
    fetches = Fetches(uploads, turn=0.05)
    assert not dict(fetches.come(["slow"]))
    assert not dict(fetches.come(["later"], keep=["slow"]))
    assert fetches.in_hand == 1
    assert not dict(fetches.come(["later"]))
    assert fetches.in_hand == 0
    assert fetches._asked.keys() == {"later"}


def test_what_was_begun_is_told_when_it_has_come_whether_asked_for_or_not(uploads: Uploads) -> None:
    uploads.announced, uploads.whole = {"slow"}, {"slow": threading.Event()}
    fetches = Fetches(uploads, turn=0.05)
    assert not dict(fetches.come(["slow"]))
    uploads.whole["slow"].set()
    for _ in range(100):
        if found := dict(fetches.come([], keep=["slow"])):
            break
        time.sleep(0.05)
    assert found == {"slow": "SLOW"}


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [ConnectionError, Stopped])
def test_what_is_wrong_with_all_is_raised(error: type[BaseException]) -> None:
    """A SuperLink that does not answer loses no site: the app dies over it, and is started anew."""

    def fail(id: str) -> str:
        raise error

    with pytest.raises(error):
        dict(Fetches(fail, fatal=(ConnectionError,)).come(["a"]))
