"""What the page says of runs: means, groups of seeds, labels, verdicts, notes; and that data stays text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from helpers.generated_runs import ROW, write_comparison, write_run
from helpers.sample_config import mira
from mira.results.html.load import read
from mira.results.html.notes import notes
from mira.results.html.strengths import strengths
from mira.results.html.svg import Scale, cividis, scale, spread, tag
from mira.results.html.tables import call, client_table, ranges
from mira.results.html.variants import differing, group
from mira.results.html.verdict import difference, row, wins
from mira.results.html.write import page
from mira.results.statistics import Mean

NAMES, GROUPS = ["ann", "bob", "cleo", "dan"], ["even", "odd", "even", "odd"]


@given(st.text(), st.text())
def test_no_text_becomes_markup(content: str, value: str) -> None:
    made = str(tag("text", content, class_=value))
    assert made.startswith('<text class="')
    assert made.count("<") == 2
    assert made.count('"') == 2
    assert all(c.isprintable() or c in "\n\t" for c in made)


def test_markup_is_kept_and_attributes_are_named() -> None:
    assert tag("g", tag("circle", r=2.50), "a<b", aria_hidden="true") == Markup(
        '<g aria-hidden="true"><circle r="2.5"></circle>a&lt;b</g>'
    )


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_a_scale_keeps_order_and_stays_inside(values: list[float]) -> None:
    x = scale(values, 10, 110)
    places = [x(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(10 <= place <= 110 for place in places)
    ticks = x.ticks()
    assert ticks == sorted(set(ticks))
    assert all(x.low <= tick * 1.0001 and tick <= x.high * 1.0011 for tick in ticks)


def test_scales() -> None:
    assert scale([0.01, 5], 0, 1).log
    assert not scale([0, 5], 0, 1).log
    assert scale([1.0, 2.0], 0, 1).low == 0
    assert Scale(0, 10, 100, 0).ticks() == [0, 2, 4, 6, 8, 10]
    assert Scale(0.01, 1, 0, 1, log=True)(0.1) == pytest.approx(0.5)
    assert Scale(0.01, 1, 0, 1, log=True).ticks() == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])


@given(st.lists(st.floats(0, 100), max_size=8))
def test_labels_do_not_overlap(places: list[float]) -> None:
    moved = sorted(spread(places, 10, 0, 100))
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(moved))
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in moved)


def test_colours_run_from_dark_blue_to_yellow() -> None:
    assert (cividis(0), cividis(1)) == ("#00224e", "#fee838")
    assert (cividis(-1), cividis(2)) == (cividis(0), cividis(1))


def test_seeds_are_one_variant_and_labels_tell_variants_apart(tmp_path: Path) -> None:
    runs = [
        read(write_run(tmp_path / str(n), NAMES, GROUPS, seed=seed, method=method, training={"local_steps": 1, "lr": lr}))
        for n, (seed, method, lr) in enumerate([
            (1, {"name": "mira", "strength": 0.5}, 0.1), (0, {"name": "mira", "strength": 0.5}, 0.1),
            (0, {"name": "local"}, 0.1), (0, {"name": "mira", "strength": 1.0}, 0.1), (0, {"name": "local"}, 0.2),
        ])
    ]  # fmt: skip
    variants = group(runs)
    assert [v.label for v in variants] == [
        "mira · strength 0.5",
        "local · lr 0.1",
        "mira · strength 1",
        "local · lr 0.2",
    ]
    assert [run.seed for run in variants[0].runs] == [0, 1]
    assert dict(differing([variants[0].first, variants[2].first])) == {"method.strength": ["0.5", "1.0"]}
    assert variants[0].seed_means(NAMES) == [
        pytest.approx(sum(run.losses(3)[name] or 0 for name in NAMES) / 4) for run in variants[0].runs
    ]
    assert variants[0].sent == 3 * 2 * ROW * len(NAMES)


def test_who_should_use_what(tmp_path: Path) -> None:
    falls = {"mira": 3.0, "local": 2.0, "fedit": 3.0}
    runs = [
        read(write_run(tmp_path / f"{name}-{seed}", NAMES, GROUPS, seed=seed, fall=fall, method={"name": name}))
        for name, fall in falls.items()
        for seed in range(3)
    ]
    variants = group(runs)
    found = row("everyone", NAMES, variants)
    assert found.best in (0, 2)
    assert found.equal in ((2,), (0,)), "mira and fedit cannot be told apart"
    gap = difference(variants[1], variants[0], NAMES)
    assert gap is not None
    assert gap.low > 0
    assert wins(variants, NAMES) == [0, 0, 0], "mira and fedit are equal to the bit, so neither is the lowest"
    assert wins(variants[:2], NAMES) == [4, 0]
    assert call(variants[:2], [row("everyone", NAMES, variants[:2])]).startswith("Use mira: ")
    assert call(variants, [found]) == "mira and fedit have the same mean loss, the lowest."
    near = replace(found, best=0, equal=(2,), losses=(Mean(1.0, None), Mean(2.0, None), Mean(1.1, None)))
    assert "mira has the lowest mean loss, but not clearly below fedit." in call(variants, [near])
    assert client_table(variants, [("", "ann")])["rows"][0][-1] is None
    assert client_table(variants[:2], [("", "ann")])["rows"][0][-1] == 0


def test_without_a_finite_loss_nothing_is_recommended(tmp_path: Path) -> None:
    runs = [read(write_run(tmp_path / name, NAMES, GROUPS, method={"name": name})) for name in ("mira", "local")]
    for run in runs:
        run.records[run.best]["clients"]["ann"]["test_loss"] = None
    variants = group(runs)
    found = row("everyone", NAMES, variants)
    assert (found.best, found.losses) == (None, (None, None))
    assert "no finite loss for ann" in " ".join(notes(runs, variants, NAMES))
    assert "No variant has a finite mean loss." in page(runs)


def test_notes(tmp_path: Path) -> None:
    first = read(
        write_run(tmp_path / "a", NAMES, GROUPS, finished=False, lost={"ann": "out of memory"}, truncated={"bob": 2})
    )
    told = " ".join(notes([first], group([first]), NAMES))
    assert "not finished: 2 of 3 rounds" in told
    assert "continued without a client once: ann" in told
    assert "truncated inputs to prompt.max_length=1024: bob" in told
    other = read(write_run(tmp_path / "b", [*NAMES[:3], "eve"], GROUPS, method={"name": "local"}, fall=-1.0))
    other.environment["data"]["sha256"] = other.environment["model"]["sha256"] = "other"
    told = " ".join(notes([first, other], group([first, other]), NAMES[:3]))
    assert "not made on the same data" in told
    assert "have different base models" in told
    assert "have different clients" in told
    assert "Fewer than three seeds" in told
    assert "local: validation loss was lowest in round 0 of 3" in told


def test_clients_that_counted_for_little_are_listed(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "a", NAMES, GROUPS))
    assert "<h2>Defence</h2>" not in page([run])
    for record, share in zip(run.records[1:], (0.2, 0.9, 0.04), strict=True):
        record["counted"] = {"ann": 1.1, "<bob>": share}
    assert run.doubted == [("<bob>", [1, 3], 0.04)]
    html = page([run])
    assert (
        '<th scope="row">&lt;bob&gt;</th><td>1, 3</td><td>too unlike the others: counted for 4% of its weight' in html
    )
    assert "let clients count for little: <bob>; see Defence" in " ".join(notes([run], group([run]), NAMES))
    assert ranges([1, 2, 3, 5, 7, 8]) == "1–3, 5, 7–8"


def test_a_report_is_one_file_beside_the_run_or_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", NAMES, GROUPS)
    write_run(tmp_path / "b", NAMES, GROUPS, method={"name": "local"})
    assert mira("report", "a").out == "a/report.html\n"
    assert mira("report", "a", "b").out == "report.html\n"
    before = (tmp_path / "report.html").read_bytes()
    assert mira("report", "a", "b").status == 0
    assert (tmp_path / "report.html").read_bytes() == before, "the same runs give the same page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "report.html"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "Missing argument 'RUN...'"),
        (("nowhere",), "nowhere: there is no run here"),
        (("a", "--out", "no/folder.html"), "--out no/folder.html: cannot be written (No such file or directory)"),
        (("a", "c"), "have no common client; report them one by one"),
    ],
)
def test_what_cannot_be_reported(
    arguments: tuple[str, ...], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", NAMES, GROUPS)
    write_run(tmp_path / "c", [f"{name}-2" for name in NAMES], GROUPS)
    assert error in mira("report", *arguments).error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.parametrize(
    "transfer",
    [
        "abc",
        [1],
        {"names": ["a"]},
        {"names": ["a"], "matrix": [[1, 2]]},
        {"names": [{}], "matrix": [[1]]},
        {"names": ["a"], "matrix": [["<b>"]]},
    ],
)
def test_a_damaged_test_file_of_a_comparison_is_one_line(transfer: Any, tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "o", {"a": 1.0, "b": 2.0}, NAMES, GROUPS)
    assert mira("report", folder, "--out", tmp_path / "page.html").status == 0
    assert "Adapters on other clients' data" in (tmp_path / "page.html").read_text(encoding="utf-8")
    broken = folder / "runs" / "1" / "seed-0" / "test.json"
    broken.write_text(json.dumps({"best": {"transfer": transfer}}))
    assert f"{broken}: not a file of 'mira compare'" in mira("report", folder, "--out", tmp_path / "page.html").error


def test_a_comparison_without_an_entry_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"entries": [], "command": "mira compare x.yaml"}))
    told = mira("report", tmp_path, "--out", tmp_path / "page.html").error
    assert "has no entry yet; wait, or continue with: mira compare x.yaml" in told


def test_the_configuration_what_differs_and_whose_graph(tmp_path: Path) -> None:
    """A graph is shown for those who mix along it alone."""
    mixing = write_run(tmp_path / "a", NAMES, GROUPS, method={"name": "mira", "strength": 0.25})
    alone = write_run(tmp_path / "b", NAMES, GROUPS, method={"name": "local"}, training={"local_steps": 1, "lr": 0.5})
    one, both, other = (page([read(folder) for folder in folders]) for folders in ([mixing], [mixing, alone], [alone]))
    for text in (one, both, other):
        assert "lr: 0.001" in text or "lr: 0.5" in text
        assert "<summary>Versions, machine, model and data</summary>" in text
        assert ("Differences" in text) is (text is both)
        assert text.count("Graph between clients") == (text is not other)
    row = both.split("<code>training.lr</code>")[1].split("</tr>")[0]
    assert re.findall(r"<td><code>([^<]*)</code>", row) == ["0.001", "0.5"]
    assert both.count("Weight of the edge between two clients") == one.count("Weight of the edge between two clients")


def test_the_strength_of_every_client_by_round(tmp_path: Path) -> None:
    """Only of runs in which clients have one of their own; of more than forty clients in blocks."""
    fixed = read(write_run(tmp_path / "a", NAMES, GROUPS))
    taken = [{}, {"ann": 0.25, "bob": 0.0}, {"ann": 1.0, "<i>": 0.5}, {"ann": 0.75}]
    chosen = replace(fixed, records=[r | {"strength": s} for r, s in zip(fixed.records, taken, strict=True)])
    order = [("", name) for name in NAMES]
    assert strengths(group([fixed])[0], order) is None
    drawn = strengths(group([chosen])[0], order)
    assert drawn is not None
    assert re.findall(r"<title>(\w+), round (\d): s = ([\d.]+)", drawn) == [
        ("ann", "1", "0.25"), ("ann", "2", "1"), ("ann", "3", "0.75"), ("bob", "1", "0"),
    ]  # fmt: skip
    assert "mean strength 0.12 in the first round, 0.75 in the last" in drawn
    many = strengths(group([chosen])[0], [("", name) for name in (*NAMES, *(f"c{n}" for n in range(80)))])
    assert many is not None
    assert "ann … cleo, round 1: s = 0.125" in many
    whole, without = page([chosen]), page([fixed])
    assert ("Mixing strength of every client" in whole, "Mixing strength" in without) == (True, False)
