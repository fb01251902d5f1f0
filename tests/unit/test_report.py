"""A result as a table for people."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from mira.results.tables import number, table
from mira.runner.progress import RunProgress


def client(name: str, **changes: Any) -> dict[str, Any]:
    scores = {"exact_match_start": 0.0, "exact_match": 0.5, "rouge_l_start": 0.25, "rouge_l": 0.75}
    return {"name": name, "task": name, "examples": 24, "loss_start": 2.0, "loss": 1.0} | scores | changes


def result(*clients: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "run": "/somewhere/run", "method": "mira", "rounds": 3, "clients": list(clients),
        "model": {"name": "model", "source": "hub", "sha256": "0123456789abcdef"},
        "exact_match": 0.5, "global_loss": 1.25, "lost": 0,
        "best": {"round": 2, "local_loss": 0.875, "exact_match": 0.625},
        "bytes_up": 999, "bytes_down": 1_234_567_890, "seconds": 61.5, "tokens_per_second": 1234.5,
        "peak_memory_bytes": 2_500_000,
    } | changes  # fmt: skip


def shown(renderable: Any, width: int = 100) -> str:
    stream = StringIO()
    Console(file=stream, width=width).print(renderable)  # a console that does read markup
    return stream.getvalue()


def test_before_and_after_for_each_client_and_the_mean() -> None:
    lines = shown(table(result(client("ann"), client("bob", loss=0.5, exact_match=1.0)))).splitlines()
    words = {line.split()[0]: " ".join(line.split()) for line in lines if line.strip()}
    assert words["ann"] == "ann 24 2.000 → 1.000 0.00 → 0.50 0.25 → 0.75"
    assert words["mean"] == "mean 2.000 → 0.750 0.00 → 0.75 0.25 → 0.75"


def test_what_the_run_cost() -> None:
    text = shown(table(result(client("ann"), lost=2)))
    assert "sent 999 B up, 1.2 GB down; clients lost from a round: 2\n" in text
    assert "62 s, 1234 training tokens/s, peak memory 2.5 MB\n" in text
    assert "best round 2 by validation: test loss 0.875, exact match 0.62" in text
    assert "model model (hub, sha256 0123456789ab)" in text
    assert "run folder /somewhere/run" in text


def test_the_run_folder_is_shown_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run folder runs/x\n" in shown(table(result(client("ann"), run=str(tmp_path / "runs" / "x"))))


def test_without_answers_there_are_no_columns_for_them() -> None:
    none = dict.fromkeys(("exact_match_start", "exact_match", "rouge_l_start", "rouge_l"))
    best = {"round": 2, "local_loss": 0.875, "exact_match": None}
    text = shown(table(result(client("ann", **none), exact_match=None, best=best, global_loss=None)))
    assert "exact match" not in text
    assert "ROUGE" not in text
    assert "global loss" not in text


def test_what_is_no_number_is_a_dash() -> None:
    text = shown(table(result(client("ann", loss=None), client("bob"))))
    assert next(line for line in text.splitlines() if "ann" in line).split()[2:5] == ["2.000", "→", "–"]
    assert next(line for line in text.splitlines() if "mean" in line).split()[1:4] == ["2.000", "→", "–"]
    assert [number(None), number(0.0), number(1.23456, 2)] == ["–", "0.000", "1.23"]


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", ":smile:", "[link=file:///x]y"])
def test_names_are_no_markup_on_any_console(name: str) -> None:
    assert name in shown(table(result(client(name), run=f"/{name}")))


def record(round: int, **changes: Any) -> dict[str, Any]:
    return {
        "round": round, "cohort": ["ann", "bob"], "train_loss": {"ann": 1.0, "bob": 2.0}, "validation_loss": 1.75,
        "tokens_per_second": 123.0, "seconds": 2.0, "lost": {},
    } | changes  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal: bool) -> None:
    stream = StringIO()
    watcher = RunProgress(Console(file=stream, force_terminal=terminal, width=120))
    assert watcher.advice == "nothing was started"
    watcher.stage("preparing")
    watcher.start(Path("runs/[/]"), rounds=4, clients=2, done=1)
    assert watcher.advice == "committed rounds are kept, go on with: mira run 'runs/[/]' --resume"
    other = RunProgress(Console(file=StringIO()), lambda run: f"mira server --kit k --resume {run}")
    other.start(Path("runs/[/]"), rounds=4, clients=2, done=1)
    assert other.advice == "committed rounds are kept, go on with: mira server --kit k --resume 'runs/[/]'"
    watcher.tokens(100)
    watcher.round(record(2))
    watcher.round(record(3, train_loss={}, validation_loss=None, seconds=4.0))
    watcher.round(record(4))
    watcher.close()
    text = stream.getvalue()
    assert ("\x1b[" in text) == terminal
    assert "run folder runs/[/]: 2 clients, 4 rounds, going on after round 1" in text
    assert "round 2/4 · 2 clients · train loss 1.500 · validation 1.750 · 123 tokens/s · 2.0 s · about 4 s left" in text
    assert "round 3/4 · 2 clients · no client came back · 123 tokens/s · 4.0 s · about 3 s left" in text
    if terminal:
        assert "2 clients, " in text.split("going on after round 1")[1]


def test_a_bar_ends_with_its_run() -> None:
    stream = StringIO()
    watcher = RunProgress(Console(file=stream, force_terminal=True))
    watcher.start(Path("x"), rounds=1, clients=2, done=0)
    watcher.round(record(1))
    end = stream.getvalue()
    watcher.tokens(5)
    watcher.close()
    assert stream.getvalue() == end


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_a_narrow_console_shows_every_figure_whole(width: int) -> None:
    metrics = {"chrf": {"start": 0.25, "last": 0.5}}
    name = "a-hospital-in-the-north"
    text = shown(table(result(client(name), client("病院", loss=0.5), metrics=metrics)), width)
    assert all(cell_len(line.rstrip()) <= width for line in text.splitlines())
    assert name in text
    whole = " ".join(text.split())
    for figure in (
        "2.000 → 1.000",
        "2.000 → 0.500",
        "0.00 → 0.50",
        "0.25 → 0.75",
        "2.000 → 0.750",
        "chrf 0.250 → 0.500",
    ):
        assert figure in whole
    if width < 60:
        assert "test loss 2.000 → 1.000" in whole
