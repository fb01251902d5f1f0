"""The documentation site: built strictly, complete, readable without a network, on a phone and in the dark."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.headless_browser import CHROMIUM, Page, browser

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "true"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None and "MIRA_REQUIRE_CHROMIUM" not in os.environ:
        pytest.skip("no Chromium")
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def pages(site: Path) -> list[Path]:
    return [file for file in sorted(site.rglob("*.html")) if file.name != "404.html"]


def test_every_marker_is_replaced(site: Path) -> None:
    left = [file.name for file in pages(site) if re.search(r"<!-- (options|configuration|names)", file.read_text())]
    assert left == []


def test_every_option_of_a_command_is_there(site: Path) -> None:
    text = (site / "commands" / "run.html").read_text(encoding="utf-8")
    assert all(option in text for option in ("--set KEY=VALUE", "--out DIR", "--resume", "--data PATH"))


def test_every_key_of_the_configuration_is_there(site: Path) -> None:
    text = (site / "configuration.html").read_text(encoding="utf-8")
    assert all(key in text for key in ("training.lr", "method.strength", "adapter.rank", "data.partition.alpha"))


# Both widths and both schemes; not each with each, since the layout depends on the width alone.
@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)], ids=["wide and dark", "narrow and light"])
def test_pages_fit_and_need_no_network(site: Path, page: Page, width: int, dark: bool) -> None:
    for file in pages(site):
        page.said.clear()
        page.requested.clear()
        page.open(file, width=width, dark=dark)
        assert page.ask("document.documentElement.scrollWidth") <= width, f"{file.name} overflows at {width}"
        scheme = page.ask("document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default"), f"{file.name} is {scheme}"
        assert [url for url in page.requested if not url.startswith(("file:", "data:"))] == [], file.name
