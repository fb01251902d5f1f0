"""When an answer has come whole: what is pushed after it is waited for, and only what its own site pushes."""

from __future__ import annotations

from mira.fleet import uploads
from mira.fleet.uploads import Uploads


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


def test_old_ones_are_forgotten() -> None:
    seen = Uploads(quiet=-1.0)
    for n in range(uploads._REMEMBERED + 5):
        seen.announce(str(n), "ann")
    assert len(seen.whole()) == uploads._REMEMBERED
    assert "4" not in seen.whole()
