"""What trackers are given, that each round is shown once, and that none of them can end or hold a run."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.sample_config import begin, outcome, write_clients, write_config
from mira import Experiment, resume, run
from mira.config import load
from mira.core.errors import UserError
from mira.trackers import Trackers, Tracking, follow, numbers
from mira.trackers.mlflow import Mlflow
from mira.trackers.tracker import Numbers
from mira.trackers.wandb import Wandb

TENANTS = ("Planted & Sons", "Planted Ltd")


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> Experiment:
    """Three rounds of two clients whose names, file and column all hold a planted word."""
    data = write_clients(tmp_path / "planted.jsonl", TENANTS)
    data.write_text(data.read_text().replace("Add.", "Planted add."))
    told = {"clients": {"rank": {TENANTS[0]: 1}}, "prompt": {"template": "chat", "system": "Planted: be brief."}}
    return load(write_config(tmp_path / "config.yaml", tiny_folder, data, **told))


def tracked(settings: Experiment, **trackers: Any) -> Experiment:
    return settings.model_copy(update={"tracking": Tracking(**trackers)})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# numbers

RECORD: dict[str, Any] = {
    "round": 3, "lr": 0.1, "cohort": ["ann", "bob"], "lost": {"bob": "out of memory"}, "train_loss": {"ann": 1.5},
    "steps": {"ann": 2}, "bytes_up": 8, "mixing_step": 0.5, "validation_loss": None, "local_loss": 2.0,
    "clients": {name: {"test_loss": k + 1.0, "validation_loss": None} for k, name in enumerate(("ann", "bob"))},
    "answers": {"exact_match": 0.5, "clients": {name: {"exact_match": 0.5, "rouge_l": 0.0} for name in ("ann", "bob")}},
    "transfer": {"names": ["ann", "bob"], "matrix": [[1.0]], "global_loss": 4.0},
    "strength": {"ann": 0.25, "bob": 0.0}, "offers": {"strength": {"options": [0.0, 0.25], "losses": {"ann": [2.0, 1.0]}}},
}  # fmt: skip


def test_a_record_becomes_flat_numbers() -> None:
    assert numbers.of_round(RECORD, {"ann": "client 0"}) == {
        "lr": 0.1, "bytes_up": 8.0, "mixing_step": 0.5, "local_loss": 2.0, "exact_match": 0.5, "global_loss": 4.0,
        "lost": 1.0, "train_loss": 1.5, "train/client 0": 1.5, "test/client 0": 1.0, "exact_match/client 0": 0.5,
        "ROUGE-L/client 0": 0.0, "strength/client 0": 0.25,
    }  # fmt: skip


def test_a_round_without_measuring_or_clients_is_fine() -> None:
    assert numbers.of_round({"round": 1, "lost": {"a": "gone"}, "train_loss": {}}, {"a": "a"}) == {"lost": 1.0}


def test_of_very_many_clients_only_means_are_shown() -> None:
    few, many = [str(n) for n in range(numbers.CLIENTS)], [str(n) for n in range(numbers.CLIENTS + 1)]
    assert len(numbers.by_name(few)) == len(numbers.by_number(few)) == numbers.CLIENTS
    assert numbers.by_name(many) == numbers.by_number(many) == {}
    assert list(numbers.by_number(few).values())[:2] == ["client 00", "client 01"]


def parameters(**sections: Any) -> dict[str, Any]:
    """The hyper-parameters of an experiment."""
    needed: dict[str, Any] = {
        "rounds": 3, "model": {"name": "/home/planted/model"}, "data": {"source": "sites"}, "training": {"local_steps": 1},
        "tracking": {"wandb": {"project": "planted"}},
    }  # fmt: skip
    return numbers.hyper_parameters(dict(Experiment(**needed | sections)))


def test_hyper_parameters_are_numbers_choices_and_names() -> None:
    shown = parameters(name="x", adapter={"targets": ["q_proj"], "rank": 8}, method={"upper_layers": [1.0, 0.5]})
    wanted = {
        "name": "x", "rounds": 3, "model.name": "model", "model.device": "auto", "model.trust_remote_code": False,
        "adapter.targets": '["q_proj"]', "adapter.rank": 8, "method.strength": None, "method.upper_layers": "[1.0, 0.5]",
        "data.source": "sites", "prompt.template": "auto", "prompt.max_length": 1024, "split.train": 0.8,
    }  # fmt: skip
    assert {key: shown.get(key) for key in wanted} == wanted
    assert all(isinstance(value, bool | int | float | str) for value in shown.values())


@pytest.mark.parametrize(
    ("sections", "kept"),
    [
        (
            {"data": {
                "source": "hub", "path": "planted", "subset": "planted", "columns": {"input": "planted"},
                "partition": {"by": "column", "column": "planted"},
            }},
            {"data.source": "hub", "data.partition.by": "column"},
        ),
        ({"data": {"source": "builtin", "tasks": ["planted"], "suite": "hard"}}, {"data.suite": "hard"}),
        (
            {"data": {
                "source": "sites", "examples": {"planted": 40}, "groups": {"planted": "planted"}, "expected": ["planted"],
                "descriptions": {"planted": "planted"},
            }},
            {"data.source": "sites"},
        ),
        ({"clients": {"rank": {"planted": 4}}}, {}),
        (
            {"prompt": {
                "system": "planted", "chat_template": "planted", "template_kwargs": {"planted": 1}, "template": "chat",
                "overlong": "drop",
            }},
            {"prompt.template": "chat", "prompt.overlong": "drop"},
        ),
    ],
)  # fmt: skip
def test_hyper_parameters_hold_no_name_of_a_client_and_no_text(sections: dict[str, Any], kept: dict[str, Any]) -> None:
    shown = parameters(**sections)
    assert "planted" not in json.dumps(shown)
    assert {key: shown.get(key) for key in kept} == kept


# TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard itself reads them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    board = reader.EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_shows_every_round_once_also_after_a_resume(settings: Experiment, tmp_path: Path) -> None:
    folder = begin(settings, tmp_path / "run", rounds=1)
    result = resume(folder)
    shown, recorded = scalars(folder), records(folder)
    for key in ("local_loss", "validation_loss", "seconds"):
        assert shown[key] == [(r["round"], pytest.approx(r[key])) for r in recorded]  # events hold fp32
    for key in ("lr", "bytes_up", "tokens_per_second", "mixing_step"):
        assert shown[key] == [(r["round"], pytest.approx(r[key])) for r in recorded[1:]]
    assert shown["final/local_loss"] == [(3, pytest.approx(result["local_loss"]))]
    assert shown["best/round"] == [(3, result["best"]["round"])]
    run(settings, tmp_path / "whole")
    assert {tag: [step for step, _ in curve] for tag, curve in scalars(tmp_path / "whole").items()} == {
        tag: [step for step, _ in curve] for tag, curve in shown.items()
    }


def test_time_on_the_axis_never_goes_back(settings: Experiment, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    resume(begin(settings, tmp_path / "run", rounds=2))
    board = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    times = [e.wall_time for e in board.Scalars("local_loss")]
    assert times == sorted(times)
    assert times[0] >= (tmp_path / "run" / "config.yaml").stat().st_mtime


# a tracker that fails, and one that hangs


class Broken:
    """A tracker that works up to a call of its own choice."""

    def __init__(self, at: str) -> None:
        self.at, self.calls, self.gate = at, list[str](), threading.Event()

    def start(self, parameters: Any, name: str, folder: Path) -> Broken:
        return self._called("start")

    def record(self, round: int, numbers: Numbers) -> None:
        self._called("record")

    def finish(self, round: int, numbers: Numbers) -> None:
        self._called("finish")

    def close(self) -> None:
        self.calls.append("close")

    def _called(self, what: str) -> Broken:
        self.calls.append(what)
        if what == self.at:
            raise ConnectionError("no route\nto host")
        if self.at == "hang":
            self.gate.wait(60)
        return self


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broken]:
    """In the place of TensorBoard, which every run has."""
    tracker = Broken("record")
    monkeypatch.setattr(follow, "TensorBoard", lambda: tracker)
    yield tracker
    tracker.gate.set()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["start", "record", "finish"])
def test_a_tracker_that_fails_is_off_after_one_warning(
    at: str, broken: Broken, settings: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(settings, tmp_path / "quiet")
    broken.at, broken.calls = at, []
    caplog.clear()
    run(settings, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "quiet")
    assert broken.calls.count(at) == 1
    assert broken.calls[-1] == ("start" if at == "start" else "close")
    warnings = [record.getMessage() for record in caplog.records if "TensorBoard" in record.getMessage()]
    assert warnings == [
        "TensorBoard: off for the rest of this run (ConnectionError: no route to host); the run itself goes on"
    ]


def test_a_tracker_that_hangs_does_not_hold_the_run(
    broken: Broken,
    settings: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken.at = "hang"
    monkeypatch.setattr(follow, "PATIENCE", 0.01)
    monkeypatch.setattr(follow, "HASTE", 0.01)
    with caplog.at_level(logging.WARNING):
        assert run(settings, tmp_path / "run")["rounds"] == 3
    assert "TensorBoard: did not answer" in caplog.text
    assert broken.calls == ["start"]


def test_nothing_is_lost_on_the_way(broken: Broken, tmp_path: Path) -> None:
    broken.at = "never"
    followers = Trackers(Tracking(), {"rounds": 2}, tmp_path, ["ann"])
    for round in range(3):
        followers.record({"round": round, "seconds": 1.0})
    followers.finish({"rounds": 2, "local_loss": 1.0, "best": {"round": 1}})
    followers.close()
    assert broken.calls == ["start", "record", "record", "record", "finish", "close"]


# what the user can mend


def test_a_password_in_the_configuration_is_refused_and_not_repeated(settings: Experiment) -> None:
    values = settings.model_dump(mode="json") | {"tracking": {"mlflow": {"uri": "https://me:hunter2@example.org"}}}
    with pytest.raises(UserError, match=r"^tracking\.mlflow\.uri: holds a password") as caught:
        Experiment(**values)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_before_the_run(
    name: str, settings: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "find_spec", lambda package: None)
    one: Any = {"wandb": Wandb(), "mlflow": Mlflow()}[name]
    with pytest.raises(UserError, match=rf"^tracking\.{name}: .*pip install 'mira-fl\[{name}\]'"):
        run(tracked(settings, **{name: one}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Weights & Biases


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    wandb = pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody's own key
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(follow, "PATIENCE", 120.0)  # a busy machine may need long to import it
    monkeypatch.setattr(follow, "HASTE", 120.0)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


@pytest.mark.slow
def test_wandb_is_given_numbers_and_no_data(
    offline: pytest.MonkeyPatch, settings: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(tracked(settings, wandb=Wandb(project="shown")), tmp_path / "run")
    assert "tracking.wandb" not in caplog.text
    pytest.importorskip("wandb").teardown()  # its service writes in its own time, and all of it before it ends
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    sent = kept.read_bytes() + b"".join(file.read_bytes() for file in kept.parent.glob("files/*"))
    for key in (b"train_loss", b"test/client 1", b"mixing_step", b"training.lr", b"final/local_loss", b"shown"):
        assert key in sent
    assert b"lanted" not in sent
    assert str(tmp_path).encode() not in sent


def test_wandb_without_a_key_is_off_and_says_so(
    offline: pytest.MonkeyPatch, settings: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offline.delenv("WANDB_MODE")
    with caplog.at_level(logging.WARNING):
        assert run(tracked(settings, wandb=Wandb()), tmp_path / "run")["rounds"] == 3
    assert caplog.text.count("tracking.wandb: off for the rest of this run (PermissionError: no key") == 1


# MLflow


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow 3.17 on SQLAlchemy 2.1
def test_mlflow_shows_every_round_once_also_after_a_resume(
    settings: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(follow, "PATIENCE", 120.0)
    monkeypatch.setattr(follow, "HASTE", 120.0)
    folder = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        begin(tracked(settings, mlflow=Mlflow()), folder, rounds=1)
        client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        identity = (folder / "tracking" / "mlflow").read_text()
        assert client.get_run(identity).info.status == "KILLED"
        result = resume(folder)
    assert "tracking.mlflow" not in caplog.text
    shown = client.get_metric_history(identity, "local_loss")
    assert [(m.step, m.value) for m in shown] == [(r["round"], r["local_loss"]) for r in records(folder)]
    ended = client.get_run(identity)
    assert (ended.info.status, ended.data.params["training.lr"]) == ("FINISHED", "0.02")
    assert ended.data.metrics["final/local_loss"] == result["local_loss"]
    assert "lanted" not in json.dumps(ended.to_dictionary())
