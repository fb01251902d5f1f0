"""`mira compare` from end to end, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from helpers.documented_json import TYPES, documented, fields, one_object
from helpers.sample_config import NAMES, Ended, Interrupt, mira, settings, snapshot, write_clients
from mira import comparison
from mira.comparison import work
from mira.core.errors import UserError
from mira.core.git_commit import commit
from mira.core.types import Scores
from mira.engine.batched import BatchedEngine
from mira.runner import run as experiment
from mira.runner.callbacks import Callback
from mira.runner.run import Open
from mira.store import Store
from mira.store.folders import alone_in

KINDS = {
    **TYPES,
    "true or false": (bool,),
    "true, false or null": (bool, type(None)),
    "mean and interval": TYPES["number or null"],
}
LINE = {"Local": {"method.name": "local"}, "MIRA (s = 1)": {"method.strength": 1.0}}


def write(folder: Path, model: Path, entries: dict[str, Any] = LINE, **changes: Any) -> Path:
    data = folder / "data.jsonl"
    if not data.exists():
        write_clients(data)
    values = {
        "experiment": settings(model, data, rounds=2), "seeds": [0, 1], "grid": {"training.lr": [0.001, 0.03]},
        "entries": entries, **changes,
    }  # fmt: skip
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def compare(*arguments: object) -> Ended:
    """The command, serial."""
    return mira("compare", *arguments, "--workers", 1)


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder of a comparison, what it printed, and its progress. The test split is read in its place only."""
    folder = tmp_path_factory.mktemp("compare")
    reading = False
    evaluate, tested = BatchedEngine.evaluate, work.tested

    def watched(
        self: BatchedEngine, rows: Tensor, client: Tensor, splits: Sequence[str], limit: int | None = None
    ) -> Scores:
        assert reading or "test" not in splits
        return evaluate(self, rows, client, splits, limit)

    def allowed(place: Path) -> None:
        nonlocal reading
        reading = True
        tested(place)
        reading = False

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BatchedEngine, "evaluate", watched)
        patched.setattr(work, "tested", allowed)
        claims = [{"entry": "MIRA (s = 1)", "against": ["Local"], "margin": 0.02}]
        ended = compare(
            write(folder, tiny_folder, primary=claims), "--out", folder / "o", "--results", folder / "r", "--json"
        )
    assert ended.status == 0, ended.err
    return folder, one_object(ended.out), ended.err


def validation(run: Path) -> float:
    return min(json.loads(line)["validation_loss"] for line in (run / "metrics.jsonl").read_text().splitlines())


def test_json_is_as_documented(done: tuple[Path, dict[str, Any], str]) -> None:
    value = done[1]
    expected = documented("mira compare")
    plain = [(name.removesuffix(".mean").removesuffix(".interval"), item) for name, item in fields(value)]
    same = [(name, name.replace("primary[]", "entries[].against[]")) for name, _ in plain]
    found = [(name if name in expected else other, item) for (name, other), (_, item) in zip(same, plain, strict=True)]
    inner = [name for name, _ in found if name.startswith("entries[].runs[].")]
    assert inner
    shown = {name for name, _ in found} - set(inner)
    assert value["failed"] == []  # the fields of a failure: test_compare_workers
    assert shown == {name for name in expected if not name.startswith(("entries[].runs[]", "failed[]"))}
    for name, item in found:
        if name in shown:
            assert isinstance(item, KINDS[expected[name]]), f"{name}={item!r} is not {expected[name]}"
    text = (Path(__file__).parents[2] / "docs" / "commands" / "compare.md").read_text(encoding="utf-8")
    of_runs = [line for line in text.splitlines() if line.startswith("| `entries[].runs[]")]
    for name in inner:
        part = name.rsplit(".", 1)[1]
        assert f"`{part}`" in "".join(of_runs) or f"entries[].{part}" in expected, name


def test_the_point_of_the_lowest_validation_loss_is_chosen(done: tuple[Path, dict[str, Any], str]) -> None:
    folder, value, _ = done
    assert value["complete"]
    for entry, slug in zip(value["entries"], ("local", "mira-s-1"), strict=True):
        runs = folder / "o" / "runs" / slug
        means = {
            place.name: sum(validation(place / f"seed-{n}") for n in (0, 1)) / 2 for place in sorted(runs.iterdir())
        }
        assert len(means) == 2
        assert entry["chosen"] == min(means, key=means.__getitem__)
        tuning = {point["point"]: point["validation_loss"] for point in entry["tuning"]}
        assert tuning == pytest.approx(means)
        assert {file.parent.parent.name for file in runs.rglob("test.json")} == {entry["chosen"]}


def test_no_run_records_anything_of_the_test_split(done: tuple[Path, dict[str, Any], str]) -> None:
    for metrics in (done[0] / "o" / "runs").rglob("metrics.jsonl"):
        for record in map(json.loads, metrics.read_text().splitlines()):
            assert record["local_loss"] is None
            assert {client["test_loss"] for client in record["clients"].values()} == {None}
            assert not {"answers", "transfer"} & record.keys()


def test_figures_are_those_of_evaluate(done: tuple[Path, dict[str, Any], str]) -> None:
    folder, value, _ = done
    entry = value["entries"][1]
    run = entry["runs"][1]
    result = one_object(mira("evaluate", folder / "o" / run["run"], "--round", "best", "--json").out)
    assert (run["seed"], run["best_round"]) == (1, result["rounds"])
    for key in ("local_loss", "validation_loss", "global_loss", "mean_row_loss", "rouge_l", "exact_match"):
        assert run[key] == result[key]
    assert run["bytes"] == result["bytes_up"] + result["bytes_down"] > 0
    assert [(c["name"], c["loss"]) for c in run["clients"]] == [(c["name"], c["loss"]) for c in result["clients"]]
    both = [run["local_loss"] for run in entry["runs"]]
    assert entry["local_loss"]["mean"] == pytest.approx(sum(both) / 2)
    assert entry["local_loss"]["interval"] == pytest.approx(12.7062 * abs(both[0] - both[1]) / 2, rel=1e-4)


def test_wins_are_counted_client_by_client(done: tuple[Path, dict[str, Any], str]) -> None:
    local, other = done[1]["entries"]
    mean = [
        [sum(run["clients"][k]["loss"] for run in entry["runs"]) / 2 for k in range(len(NAMES))]
        for entry in (other, local)
    ]
    (duel,) = other["against"]
    assert duel["baseline"] == "Local"
    assert duel["win_rate"] == (duel["wins"] + duel["ties"] / 2) / len(NAMES)
    assert duel["wins"] == sum(mine < theirs for mine, theirs in zip(*mean, strict=True))
    assert duel["difference"] == pytest.approx(sum(a - b for a, b in zip(*mean, strict=True)) / len(NAMES))
    assert duel["pairs"] == 2 * len(NAMES)
    assert duel["difference_low"] < duel["difference"] < duel["difference_high"]
    assert duel["relative"] == pytest.approx(sum(mean[0]) / sum(mean[1]) - 1)
    (claim,) = done[1]["primary"]
    assert {key: claim[key] for key in duel.keys() - {"p"}} == {key: duel[key] for key in duel.keys() - {"p"}}
    assert claim["p_holm"] == claim["p"]


def test_groups_of_the_data_are_the_tasks(done: tuple[Path, dict[str, Any], str]) -> None:
    folder, value, _ = done
    for run in (run for entry in value["entries"] for run in entry["runs"]):
        environment = json.loads((folder / "o" / run["run"] / "environment.json").read_text())
        assert [client["group"] for client in run["clients"]] == environment["groups"]


def test_progress_and_files(done: tuple[Path, dict[str, Any], str]) -> None:
    folder, value, err = done
    assert "8 runs: 2 entries × 2 points × 2 seeds" in err
    assert err.index("for 8 runs, estimated from the first round") < err.index("run 1 of 8")
    assert err.count("plus the evaluation on test data") == 1
    assert "run 1 of 8 · Local · training.lr=0.001 · seed 0 · validation " in err
    assert "run 8 of 8 · MIRA (s = 1) · training.lr=0.03 · seed 1 · validation " in err
    assert json.loads((folder / "o" / "compare.json").read_text()) == value
    assert sorted(file.name for file in (folder / "r").iterdir()) == ["compare.json", "table.csv", "table.md"]
    assert (folder / "o" / "table.tex").is_file()
    made = {run["commit"] for entry in value["entries"] for run in entry["runs"]}
    assert made == {value["commit"]} == {commit()}


def test_runs_are_listed_with_the_test_loss_of_those_that_were_chosen(done: tuple[Path, dict[str, Any], str]) -> None:
    folder, value, _ = done
    listed = {run["run"]: run for run in json.loads(mira("runs", folder / "o", "--json").out)["runs"]}
    chosen = {str(folder / "o" / run["run"]): run for entry in value["entries"] for run in entry["runs"]}
    assert len(listed) == 8
    assert {name for name, run in listed.items() if run["best_loss"] is not None} == set(chosen)
    for name, run in chosen.items():
        assert listed[name]["best_loss"] == run["local_loss"]
        assert listed[name]["exact_match"] == run["exact_match"]


def test_what_is_finished_is_not_done_again(done: tuple[Path, dict[str, Any], str]) -> None:
    folder, value, _ = done
    before = snapshot(folder / "o" / "runs")
    ended = compare(folder / "c.yaml", "--out", folder / "o")
    assert ended.err.count("finished before") == 8
    assert snapshot(folder / "o" / "runs") == before
    assert "lower than Local" in ended.out
    assert "MIRA (s = 1) < Local + 2 %" in ended.out
    again = json.loads((folder / "o" / "compare.json").read_text())
    assert again["entries"] == value["entries"]


def test_the_start_is_measured_once_and_added_where_an_older_comparison_left_it_out(
    done: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    folder, value, _ = done
    starts = [
        [client["loss_start"] for client in run["clients"]] for entry in value["entries"] for run in entry["runs"]
    ]
    assert starts[:2] == starts[2:], "the entries begin alike, seed by seed"
    assert min(min(each) for each in starts) > 1.0
    shutil.copytree(folder / "o", tmp_path / "o")
    [*kept] = (tmp_path / "o").rglob("test.json")
    for file in kept:
        older = {key: item for key, item in json.loads(file.read_text()).items() if key != "start"}
        older["best"]["local_loss"] = 7.0  # what is there is not measured again
        file.write_text(json.dumps(older))
    ended = compare(folder / "c.yaml", "--out", tmp_path / "o", "--json")
    again = [run for entry in one_object(ended.out)["entries"] for run in entry["runs"]]
    assert [[client["loss_start"] for client in run["clients"]] for run in again] == starts
    assert {run["local_loss"] for run in again} == {7.0}


def test_an_older_comparison_whose_runs_cannot_be_opened_keeps_its_table(
    done: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, value, _ = done
    shutil.copytree(folder / "o", tmp_path / "o")
    for file in (tmp_path / "o").rglob("test.json"):
        file.write_text(json.dumps({key: item for key, item in json.loads(file.read_text()).items() if key != "start"}))

    def gone(*_: object, **__: object) -> None:
        raise UserError("model.name=x: not here any more")

    monkeypatch.setattr("mira.runner.recording.open_session", gone)
    ended = compare(folder / "c.yaml", "--out", tmp_path / "o", "--json")
    assert ended.err.count("the losses before training cannot be measured: model.name=x: not here any more") == 4
    for entry, before in zip(one_object(ended.out)["entries"], value["entries"], strict=True):
        assert entry["local_loss"] == before["local_loss"]
        assert [run["local_loss_start"] for run in entry["runs"]] == [None, None]
    assert mira("report", tmp_path / "o", "--out", tmp_path / "page.html").status == 0
    assert "Every client, before" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_folder_with_a_process_at_work_is_refused(done: tuple[Path, dict[str, Any], str]) -> None:
    """At once, with nothing changed; and so is a run in it that somebody else goes on with."""
    folder = done[0]
    before = snapshot(folder / "o")
    with alone_in(folder / "o"):
        error = compare(folder / "c.yaml", "--out", folder / "o").error
    assert error == f"{folder / 'o'}: another process is at work here; wait for it, or give another --out"
    assert snapshot(folder / "o") == before
    run = folder / "o" / "runs" / "local" / "training.lr=0.03" / "seed-1"
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    with Store.open(run):
        assert (
            "seed-1: another process is writing to this run" in compare(folder / "c.yaml", "--out", folder / "o").error
        )
    (run / "result.json").write_bytes(result)


def test_another_configuration_is_refused(done: tuple[Path, dict[str, Any], str]) -> None:
    folder = done[0]
    before = snapshot(folder / "o")
    ended = compare(folder / "c.yaml", "--out", folder / "o", "--set", "rounds=3")
    assert "seed-0: was started with another configuration: rounds: 2 here, 3 there (here: the run" in ended.error
    assert snapshot(folder / "o") == before


def test_other_data_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    small = {"seeds": [3], "grid": {}}
    assert compare(write(tmp_path, tiny_folder, {"Local": LINE["Local"]}, **small), "--out", tmp_path / "o").status == 0
    write_clients(tmp_path / "data.jsonl", examples=9)
    ended = compare(write(tmp_path, tiny_folder, **small), "--out", tmp_path / "o")
    assert ended.error.startswith("runs/mira-s-1/only/seed-3: data is ")


def test_results_that_cannot_be_written_are_refused_before_anything_is_run(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    file = write(tmp_path, tiny_folder, {"MIRA": {}})
    ended = compare(file, "--out", tmp_path / "o", "--results", tmp_path / "taken")
    assert ended.error == f"--results {tmp_path / 'taken'}: cannot be written to (File exists); name another folder"
    assert not list((tmp_path / "o").glob("runs/*"))


def test_a_comparison_goes_on_within_a_run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned on one of two seeds, and interrupted after a round of the run that follows: as if it had not been."""
    file = write(tmp_path, tiny_folder, {"MIRA": {}}, tune_seeds=[1])
    value = comparison.compare(comparison.load(file), tmp_path / "whole", "")
    with monkeypatch.context() as patched:
        count = 0

        def interrupted(wanted: Any, folder: Path, callbacks: Sequence[Callback], open: Open) -> dict[str, Any]:
            nonlocal count
            count += 1
            return experiment_run(wanted, folder, [Interrupt(1)] if count == 3 else callbacks, open)

        experiment_run = experiment.run
        patched.setattr(Interrupt, "Pulled", KeyboardInterrupt)
        patched.setattr(experiment, "run", interrupted)
        ended = compare(file, "--out", tmp_path / "o")
    assert ended.status == 130
    assert ended.err.endswith("repeat the command to resume\n")
    assert not (tmp_path / "o" / "compare.json").exists()
    assert "2 points × 1 seeds, and 1 more seeds" in ended.err
    lines: list[str] = []
    again = comparison.compare(comparison.load(file), tmp_path / "o", "", say=lines.append)
    assert [line.endswith("finished before") for line in lines[:3]] == [True, True, False]
    assert lines[2] == "started · MIRA · training.lr=0.03 · seed 0 · after round 1"
    assert lines[3].endswith("for 1 runs, estimated from 2 finished runs, plus the evaluation on test data")
    assert lines[4].startswith("run 3 of 3 · MIRA · training.lr=0.03 · seed 0 · validation ")
    assert [line.startswith("test data · ") for line in lines[5:]] == [True, True]
    for one, other in zip(value["entries"][0]["runs"], again["entries"][0]["runs"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_grid_grows_where_its_end_is_the_best(tiny_folder: Path, tmp_path: Path) -> None:
    """On the tiny model higher rates are better up to a point; the totals grow with the grid."""
    file = write(
        tmp_path, tiny_folder, {"Local": LINE["Local"]}, seeds=[0], grid={"training.lr": [1e-4, 1e-3]}, extend=1
    )
    ended = compare(file, "--out", tmp_path / "o", "--json")
    entry = one_object(ended.out)["entries"][0]
    assert [each["point"] for each in entry["tuning"]] == [f"training.lr={lr}" for lr in (0.0001, 0.001, 0.01)]
    assert "2 points × 1 seeds (and up to 1 beyond an end that is the best)" in ended.err
    assert [line[:10] for line in ended.err.splitlines() if line[:4] == "run "] == [
        "run 1 of 2",
        "run 2 of 2",
        "run 3 of 3",
    ]
    assert entry["edge"] == entry["chosen"] == "training.lr=0.01"
    again = compare(file, "--out", tmp_path / "o", "--json")
    assert again.err.count("finished before") == 3
    assert one_object(again.out)["entries"] == one_object(ended.out)["entries"]


def test_the_page_shows_what_was_chosen_and_tested(done: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    folder, value, _ = done
    out = tmp_path / "page.html"
    assert mira("report", folder / "o", "--out", out).status == 0
    html = out.read_text(encoding="utf-8")
    for entry in value["entries"]:
        assert f"<code>{entry['chosen']}</code>" in html
        assert f"{entry['local_loss']['mean']:.3f} ± {entry['local_loss']['interval']:.3f}" in html
        for duel in entry["against"]:
            ends = [duel[f"difference{end}"] for end in ("", "_low", "_high")]
            mean, low, high = (f"{each:+.3f}".replace("-", "−") for each in ends)
            assert f"{duel['wins']} of {duel['clients']}, {mean} [{low}, {high}]" in html
    assert "<h3>Primary comparisons</h3>" in html
    assert "MIRA (s = 1) &lt; Local + 2 %" in html
    assert "Seeds that chose points of the grid and are reported too: 0, 1." in html
    assert f"MIRA (s = 1): {value['entries'][1]['edge'].removeprefix('training.')} is the edge of its grid" in html
    assert "Every client, before and after" in html
    assert "Mean validation loss by round" in html, "the rounds of a comparison leave the test split alone"
    assert "no finite loss" not in html


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"run": "../elsewhere"}, "names a run outside its folder: ../elsewhere"),
        ({"clients": None}, "not a file of 'mira compare'"),
    ],
)
def test_the_page_refuses_a_file_that_was_tampered_with(
    change: dict[str, Any], error: str, done: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    value = json.loads((done[0] / "o" / "compare.json").read_text(encoding="utf-8"))
    value["entries"][0]["runs"][0] |= change
    (tmp_path / "compare.json").write_text(json.dumps(value), encoding="utf-8")
    (tmp_path / "runs").symlink_to(done[0] / "o" / "runs")
    assert error in mira("report", tmp_path).error
