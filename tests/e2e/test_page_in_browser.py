"""The page of `mira report` as a browser shows it: nothing runs, nothing is loaded, every chart has marks, all of it fits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.generated_runs import write_comparison, write_run
from helpers.headless_browser import CHROMIUM, Page, browser
from helpers.sample_config import mira

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style></svg><svg onload=alert(1)>",
    "{{ 7 * 7 }} \u202e\x1b[31m & &lt; a name that is longer than any label has room for, and then some more of it",
)
MARKS = "rect, circle, polyline, polygon"
EMPTY = f"[...document.querySelectorAll('main svg')].filter(s => !s.querySelector('{MARKS}')).length"
UNTOLD = "[...document.querySelectorAll('main svg')].filter(s => !s.hasAttribute('aria-hidden') && !s.ariaLabel).length"
# What would make the page wider than its window, or is drawn outside its own chart.
OUTSIDE = """[...document.querySelectorAll('main svg[role=img]')].flatMap(s => { const b = s.getBoundingClientRect();
  return [...s.querySelectorAll('text, circle, rect')].filter(e => { const r = e.getBoundingClientRect();
    return r.width && (r.left < b.left - 1 || r.right > b.right + 1 || r.top < b.top - 1 || r.bottom > b.bottom + 1)
  }).map(e => e.outerHTML) }).slice(0, 3)"""
# Boxes that scroll sideways, by what they hold.
BOXES = "[...document.querySelectorAll('.box')].filter(b => b.scrollWidth > b.clientWidth).map(b => b.ariaLabel + b.scrollWidth)"
WIDE = "document.documentElement.scrollWidth - window.innerWidth"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        if os.environ.get("MIRA_REQUIRE_CHROMIUM"):
            pytest.fail("MIRA_REQUIRE_CHROMIUM is set, but there is no chromium")
        pytest.skip("no chromium; on Debian: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def names_of(count: int) -> tuple[list[str], list[str]]:
    """Names and families of ``count`` clients; the first are hostile."""
    names = [HOSTILE[n] if n < len(HOSTILE) else f"client-{n}" for n in range(count)]
    return names, [f"<b>family</b> {n * 20 // count}" if count > 4 else HOSTILE[n // 2] for n in range(count)]


def runs(folder: Path, kind: str) -> list[Path]:
    if kind == "one of 4":
        names, groups = names_of(4)
        lost, cut = {names[0]: "<i>out of memory</i>"}, {names[1]: 3}
        return [write_run(folder / "a", names, groups, lost=lost, truncated=cut, finished=False)]
    if kind == "methods and seeds":
        names, groups = names_of(12)
        return [
            write_run(folder / f"{name}-{seed}", names, groups, seed=seed, fall=fall, method={"name": name})
            for name, fall in (("mira", 3.5), ("local", 3.0), ("fedit", 1.0))
            for seed in range(3)
        ]
    if kind == "12 strengths":
        return [
            write_run(folder / str(n), *names_of(4), fall=1 + n / 4, method={"name": "mira", "strength": n / 12})
            for n in range(12)
        ]
    if kind == "comparison of 17":
        falls = {HOSTILE[0]: 1.0} | {f"method {n} (with a word in brackets)": 1 + n / 9 for n in range(1, 17)}
        return [write_comparison(folder, falls, *names_of(12))]
    names, groups = names_of(400)
    return [write_run(folder / name, names, groups, method={"name": name}) for name in ("mira", "local")]


@pytest.mark.parametrize("kind", ["one of 4", "methods and seeds", "12 strengths", "two of 400", "comparison of 17"])
def test_the_page(kind: str, tab: Page, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert mira("report", *runs(tmp_path, kind), "--out", out).status == 0
    tab.said.clear()
    tab.requested.clear()
    for width, dark in ((1280, False), (1280, True), (400, False)):
        tab.open(out, width, dark)
        assert tab.ask(WIDE) <= 0, f"scrolls sideways at {width} px"
        assert tab.ask("document.querySelectorAll('main svg[role=img]').length") >= 4
        assert tab.ask(EMPTY) == 0, "a chart without marks"
        assert tab.ask(UNTOLD) == 0, "a chart that tells a screen reader nothing"
        assert tab.ask(OUTSIDE) == []
        paper = tab.ask("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (not dark)
        assert tab.ask("document.querySelectorAll('script, img, i, b, iframe').length") == 0, "data became markup"
        assert tab.ask(f"document.body.textContent.includes({HOSTILE[0]!r})")
        tab.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert tab.ask(WIDE) <= 0, f"scrolls sideways at {width} px with everything opened"
        assert width < 1280 or tab.ask(BOXES) == []
    assert tab.said == []
    assert set(tab.requested) == {out.resolve().as_uri()}, "the page loads something"


def test_the_policy_stops_what_a_flaw_in_escaping_would_let_through(tab: Page, tmp_path: Path) -> None:
    """The content security policy is the second line: here the first one is broken by hand."""
    out = tmp_path / "page.html"
    assert mira("report", *runs(tmp_path, "one of 4"), "--out", out).status == 0
    html = out.read_text(encoding="utf-8")
    out.write_text(html.replace("<main>", "<main><script>document.title = 'owned'</script>"), encoding="utf-8")
    tab.said.clear()
    tab.open(out)
    assert tab.ask("document.title") == "made-up: mira report"
    assert any("Content Security Policy" in line for line in tab.said)
    tab.said.clear()
