"""Cost curves: what is measured is what the axis says, measured once, and drawn the same every time."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from benchmarks import curves
from benchmarks.curves import CURVES, LABELS, LENGTH, Curve, Point, measure, sample
from benchmarks.plot import draw, middle
from benchmarks.workload import Synthetic, Workload

from helpers.sample_config import settings, write_clients
from helpers.training_passes import watch_passes
from mira import Experiment
from mira.engine.batched import BatchedEngine
from mira.engine.packing import packed_tokens
from mira.setup.build import open_session

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workload(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    data = write_clients(tmp_path_factory.mktemp("data") / "data.jsonl", [f"client-{n}" for n in range(8)])
    values = settings(tiny_folder, data, training={"local_steps": 1, "clip": None})
    session = open_session(Experiment(**values))
    engine = session.engine
    assert isinstance(engine, BatchedEngine)
    return Workload(engine, session.start(), session.base.model)


def never() -> Workload:
    raise AssertionError("nothing is left to measure")


@pytest.mark.parametrize("name", ["tokens", "clients", "rank", "prefix"])
def test_a_curve_runs_and_leaves_the_model_as_it_was(name: str, workload: Workload) -> None:
    model = workload.made.spec.model
    before = {path: vars(module).get("forward") for path, module in model.named_modules()}
    with ExitStack() as stack:
        points = CURVES[name].points(lambda: workload, stack)
        records = sample(points, 1, CURVES[name].warm)
    assert all(len(record["seconds"]) == 1 and record["seconds"][0] > 0 for record in records)
    assert {path: vars(module).get("forward") for path, module in model.named_modules()} == before
    for series in {point.series for point in points}:
        places = [point.x for point in points if point.series == series]
        assert len(places) >= 2
        assert all(x < y for x, y in pairwise(places))


@pytest.mark.usefixtures("one_thread")
def test_one_client_a_pass_is_that(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[int] = []
    watch_passes(monkeypatch, lambda items: clients.append(len(items)))
    with ExitStack() as stack:
        for point in curves.by_clients(lambda: workload, stack):
            clients.clear()
            point.run()
            assert sum(clients) == point.per
            assert (max(clients) > 1) == (point.series.startswith("many") and point.per > 1)


@pytest.mark.parametrize("share", curves.SHARES)
def test_synthetic_sequences_share_what_they_say(share: float) -> None:
    corpus = Synthetic([0.5, share], 4, 128, LENGTH, LABELS)
    (batch,) = corpus.batches(0, 1)
    shared = int(share * LENGTH)
    assert [len(s.tokens) for s in batch] == [LENGTH] * 4
    assert packed_tokens(batch, True) == 4 * (LENGTH - 1) - 3 * shared  # the last token predicts nothing
    assert batch == corpus.batches(1, 1)[0]


def test_points_are_measured_in_turns() -> None:
    order: list[str] = []
    points = [Point(name, 0, lambda name=name: order.append(name)) for name in "ab"]
    sample(points, 2, warm=1)
    assert "".join(order) == "aabab"


@pytest.fixture
def counted() -> tuple[dict[str, Curve], list[int]]:
    runs: list[int] = []
    points = [Point("", x, lambda: runs.append(1), per=2) for x in (1, 2)]
    return {"one": Curve("title", "x", "seconds", lambda workload, stack: points, warm=0)}, runs


def test_what_is_finished_is_not_measured_again(
    counted: tuple[dict[str, Curve], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    todo, runs = counted
    file = tmp_path / "out" / "curves.json"
    first = measure(todo, never, file, 2)
    assert len(runs) == 4
    assert measure(todo, never, file, 2) == measure({}, never, file, 2) == measure(todo, never, file, 1) == first
    assert len(runs) == 4
    measure(todo, never, file, 3)
    assert len(runs) == 4 + 6
    monkeypatch.setattr(curves, "machine", lambda: {"processor": "another"})
    measure(todo, never, file, 3)
    assert len(runs) == 10 + 6
    assert list(file.parent.iterdir()) == [file]


def test_a_plot_is_the_same_again_and_has_nothing_of_the_day(tmp_path: Path) -> None:
    points = [
        {"series": series, "x": x, "per": 2, "seconds": [x * 2.0, x * 4.0, x * 9.0]}
        for series in "ab"
        for x in (1, 1000)
    ]
    assert middle(points[0]) == 2.0
    for file in ("one.svg", "two.svg"):
        draw(points, "what is drawn", "things", "seconds", "log", tmp_path / file)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert len(text) < 30_000
    assert "date" not in text
    words = {element.text for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"what is drawn", "things", "seconds", "1\N{NO-BREAK SPACE}000", "a", "b"} <= words


def test_ranks_are_those_of_the_axis(workload: Workload) -> None:
    with ExitStack() as stack:
        engines: list[BatchedEngine] = []
        original = curves._engine
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(curves, "_engine", lambda *a, **k: engines.append(original(*a, **k)) or engines[-1])
            points = curves.by_rank(lambda: workload, stack)
        assert [engine.spec.layout.rank for engine in engines] == [point.x for point in points]
        assert {engine.spec.layout.scale for engine in engines} == {2.0}
        assert all(engine.spec.layout.modules == workload.made.spec.layout.modules for engine in engines)
        work = curves.Work(torch.arange(1), torch.zeros(1, engines[0].spec.layout.size))
        engine = replace(engines[0], spec=replace(engines[0].spec, corpus=Synthetic([0.0], 1, 128, LENGTH, LABELS)))
        assert engine.train(work, 0, 0.1).rows.shape == work.start.shape
