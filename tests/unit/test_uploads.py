"""When an answer has come whole: what is pushed after it is waited for, and only what its own site pushes."""

from __future__ import annotations

import threading
import time

from mira.fleet.gate import quota as uploads
from mira.fleet.gate.quota import Uploads


def test_an_answer_is_whole_once_its_site_is_quiet() -> None:
    seen = Uploads(quiet=0.0)
    with seen.pushing("ann"):
        seen.announce("q", "ann")
        assert seen.whole() == set()
    assert seen.whole() == {"q"}
    with seen.pushing("bob"), seen.pushing("bob"):
        seen.announce("r", "bob")
        assert seen.whole() == {"q"}, "bob's is not, ann's is"
    assert seen.whole() == {"q", "r"}
    seen.quiet = 60.0
    assert seen.whole() == set()


def test_an_answer_is_whole_at_once_where_its_parts_were_counted() -> None:
    seen = Uploads(quiet=60.0)
    with seen.pushing("ann"):
        seen.announce("q", "ann", 2)
        seen.came("ann")
        seen.came("bob")  # nobody waits for a part of it
        assert seen.whole() == set()
        seen.came("ann")
        assert seen.whole() == {"q"}
    seen.announce("r", "ann", 1)
    assert "r" not in seen.whole(), "its parts are those of the last answer"
    seen.announce("s", "bob", 0)
    assert "s" in seen.whole(), "the SuperLink has all of it already"


def test_who_waits_for_an_answer_goes_on_when_it_is_whole() -> None:
    seen = Uploads(quiet=60.0)
    seen.announce("q", "ann", 1)
    seen.announce("r", "bob", 0)
    threading.Timer(0.05, seen.came, ("ann",)).start()
    began = time.monotonic()
    seen.wait({"r"}, 20.0)
    assert seen.whole() >= {"q"}
    assert time.monotonic() - began < 10.0
    seen.wait({"q", "r"}, 0.01)  # nothing else comes


def test_a_site_pushes_what_it_was_asked_for_and_no_more() -> None:
    seen, spare = Uploads(), uploads._UNASKED
    assert seen.take("ann", spare), "to announce something, nobody needs to be asked"
    assert not seen.take("ann", 1)
    seen.allow({"ann": 1000})
    assert not seen.take("ann", 2000 + spare + 1)
    assert seen.take("ann", 1500 + spare), "more than once over: what a broken line lost is sent again"
    assert not seen.take("ann", 501)
    assert seen.take("ann", 500)
    assert seen.take("bob", 1), "it has an allowance of its own"
    for _ in range(9):
        seen.allow({"ann": 1000})
    assert not seen.take("ann", 2000 + spare + 1), "what was not used does not add up"
    seen.give_back("ann", 7)
    assert seen.take("ann", 2000 + spare + 7), "what did not come whole is not counted"
    seen.allow({"ann": 10**9})
    assert seen.take("ann", 10**9)
    seen.allow({"ann": 0})
    assert seen.take("ann", 10**9), "who is late with an earlier answer may end it"


def test_old_ones_are_forgotten() -> None:
    seen = Uploads(quiet=-1.0)
    for n in range(uploads._REMEMBERED + 5):
        seen.announce(str(n), "ann")
    assert len(seen.whole()) == uploads._REMEMBERED
    assert "4" not in seen.whole()
