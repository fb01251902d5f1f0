"""`mira runs`: every run below a folder, and what is broken, with its reason."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from helpers.generated_runs import ROW, write_run
from helpers.sample_config import mira, snapshot
from mira.results import list_runs as listing
from mira.store import Store
from mira.store.files import is_locked
from mira.store.folders import alone_in

NAMES, GROUPS = ["ann", "bob"], ["even", "odd"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path / "deep" / "below" / "done", NAMES, GROUPS, method={"name": "fedit"})
    write_run(tmp_path / "begun", NAMES, GROUPS, finished=False)
    return tmp_path


def test_headline_figures(root: Path) -> None:
    before = snapshot(root)
    found = json.loads(mira("runs", root, "--json").out)
    assert snapshot(root) == before, "a run is only read"
    assert found["broken"] == []
    begun, done = found["runs"]
    assert done.pop("date")[:2] == "20"
    assert done.pop("best_loss") < 1
    assert done == {
        "run": str(root / "deep/below/done"), "name": "made-up", "seed": 0, "method": "fedit", "adapter": "lora r8",
        "graph": "none", "clients": 2, "round": 3, "rounds": 3, "state": "finished", "host": None, "best_round": 3,
        "exact_match": 0.5, "bytes": 3 * 2 * 2 * ROW, "seconds": 4.0,
    }  # fmt: skip
    assert (begun["state"], begun["round"], begun["rounds"]) == ("interrupted", 2, 3)
    text = mira("runs", root).out
    assert "3/3" in text
    assert "interrupted" in text


def test_a_run_that_is_written_to_is_running(root: Path) -> None:
    with Store.open(root / "begun"):
        assert is_locked(root / "begun")
        assert [run["state"] for run in json.loads(mira("runs", root, "--json").out)["runs"]] == ["running", "finished"]
    assert not is_locked(root / "begun")


def test_broken_folders_are_named_with_the_reason(root: Path) -> None:
    (root / "begun" / "rounds" / "000001.json").write_text("{}")
    (root / "empty").mkdir()
    (root / "empty" / ".lock").touch()
    found = json.loads(mira("runs", root, "--json").out)
    assert [Path(run["run"]).name for run in found["runs"]] == ["done"]
    reasons = {Path(each["run"]).name: each["reason"] for each in found["broken"]}
    assert "000001.json: corrupt checkpoint" in reasons["begun"]
    assert "its creation was interrupted" in reasons["empty"]
    shown = mira("runs", root)
    assert shown.status == 0
    assert "corrupt checkpoint" in "".join(shown.out.split("\n"))


@pytest.mark.parametrize(
    "text", ['{"best": null}', '{"best": {"answers": 3}}', '{"best": {"local_loss": "<b>"}}', "[]", "{"]
)
def test_a_damaged_test_file_hides_nobody_else(text: str, root: Path) -> None:
    write = root / "begun" / "test.json"
    write.write_text(text)
    found = json.loads(mira("runs", root, "--json").out)
    assert "done" in [Path(run["run"]).name for run in found["runs"]]
    assert "begun" in [Path(each["run"]).name for each in found["broken"]]
    assert mira("runs", root).status == 0


@pytest.mark.parametrize("text", ["[]", "{}", "5", '["a"]', '[{"place": "x"}]', "null"])
def test_a_damaged_list_of_machines_hides_nobody_else(text: str, root: Path) -> None:
    (root / "begun" / "where.json").write_text(text)
    found = json.loads(mira("runs", root, "--json").out)
    assert [Path(run["run"]).name for run in found["runs"]] == ["done"]
    assert "where.json: corrupt checkpoint" in found["broken"][0]["reason"]


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """A comparison whose first run is under way on another machine: its copy here is not locked."""
    folder = tmp_path / "cmp"
    for seed in (0, 1):
        write_run(folder / f"runs/local/only/seed-{seed}", NAMES, GROUPS, finished=False)
    failed = {"run": "runs/mira/only/seed-0", "task": "run", "reason": "out of\x1bmemory"}
    going = {"run": "runs/local/only/seed-0", "task": "run"}
    (folder / going["run"] / "where.json").write_text('[{"host": "node3"}, {"host": "node7"}]')
    counts = {"runs": 12, "trained": 3, "tests": 4, "tested": 1}
    (folder / "progress.json").write_text(
        json.dumps({"name": "cmp", **counts, "under_way": [going], "failed": [failed]})
    )
    return folder


def test_a_comparison_under_way_elsewhere(compared: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with alone_in(compared):
        found = json.loads(mira("runs", tmp_path, "--json").out)
        text = mira("runs", tmp_path).out
    assert snapshot(tmp_path) == before
    assert found["comparisons"] == [
        {
            "comparison": str(compared), "name": "cmp", "state": "running", "runs": 12, "trained": 3, "tests": 4, "tested": 1,
            "under_way": 1, "failed": [{"run": "runs/mira/only/seed-0", "task": "run", "reason": "out of\x1bmemory"}],
        }
    ]  # fmt: skip
    assert [(run["state"], run["host"]) for run in found["runs"]] == [("running", "node7"), ("interrupted", None)]
    assert "2/3 running on node7" in " ".join(text.split())
    assert "comparison cmp: running, 3 of 12 runs, 1 of 4 on test data, 1 under way, 1 failed" in " ".join(text.split())
    assert "failed: runs/mira/only/seed-0: out of\\x1bmemory" in text


def test_a_comparison_whose_process_is_gone(compared: Path, tmp_path: Path) -> None:
    """Its file still names tasks under way: nobody works on them."""
    found = json.loads(mira("runs", compared / "runs", "--json").out)
    assert [run["state"] for run in found["runs"]] == ["interrupted", "interrupted"]
    found = json.loads(mira("runs", tmp_path, "--json").out)
    assert [(each["state"], each["under_way"]) for each in found["comparisons"]] == [("failed", 0)]


ENDLESS = '{"name": "x", "runs": 1e999, "trained": 1, "tests": 1, "tested": 1, "failed": [], "under_way": []}'


@pytest.mark.parametrize("text", ["[]", "{", '{"name": "x"}', '{"under_way": [3]}', ENDLESS])
def test_a_damaged_comparison_hides_no_run(text: str, compared: Path, tmp_path: Path) -> None:
    (compared / "progress.json").write_text(text)
    with alone_in(compared):
        found = json.loads(mira("runs", tmp_path, "--json").out)
    assert [run["state"] for run in found["runs"]] == ["interrupted", "interrupted"]
    assert [each["run"] for each in found["broken"]] == [str(compared)]


def test_where_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "runs: no such folder" in mira("runs").error
    (tmp_path / "runs").mkdir()
    assert mira("runs").out == "runs: no runs here\n"
    assert json.loads(mira("runs", "--json").out) == {"runs": [], "comparisons": [], "broken": []}


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_every_name_and_figure_is_whole_at_any_width(width: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = listing.listing(root)
    stream = StringIO()
    Console(file=stream, width=width).print(listing.table(root, found))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert all(len(line) <= width for line in lines if str(root) not in line)
    text = " ".join(stream.getvalue().split())
    for part in ("deep/below/done", "fedit, lora r8, none", "mira, lora r8,", "3/3", "2/3 interrupted", "kB"):
        assert part in text
    lengths = {40: 4, 60: 3}  # lines a run
    if width in lengths:
        assert sum(line.startswith("  ") for line in lines) <= len(found.runs) * lengths[width]
