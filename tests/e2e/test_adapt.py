"""A client that joins a finished run later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.sample_config import Ended, mira, settings, snapshot, write_clients
from mira import Experiment, run
from mira.adapters.lora_peft import from_peft
from mira.config import parse_text
from mira.setup.build import open_session
from mira.store import Store

NEW = "eve"


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clients in two groups, trained for some rounds; and the file of a fifth, of the group "even"."""
    folder = tmp_path_factory.mktemp("adapt")
    values = settings(
        tiny_folder, write_clients(folder / "data.jsonl"), rounds=6, method={"strength": 0.5}, graph={"name": "groups"},
        training={"local_steps": 4}, evaluation={"generate": False, "transfer_clients": 0},
    )  # fmt: skip
    run(Experiment(**values), folder / "run")
    own = [{"instruction": "Add.", "input": f"{n} and 4", "output": str(n + 4)} for n in range(8)]
    (folder / "eve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    return folder


def adapt(folder: Path, *more: object) -> Ended:
    return mira("adapt", folder / "run", "--client", NEW, "--data", folder / "eve.jsonl", *more)


@pytest.mark.parametrize("how", [("--group", "even"), ("--neighbours", 2)])
def test_a_newcomer_starts_better_than_from_the_common_start(finished: Path, how: tuple[object, ...]) -> None:
    before = {k: v for k, v in snapshot(finished / "run").items() if not k.startswith("adapted")}
    ended = adapt(finished, *how, "--rounds", 2, "--json")
    assert ended.status == 0, ended
    result = json.loads(ended.out)
    assert [one["name"] for one in result["neighbours"]] == ["ann", "cleo"]
    assert [point["steps"] for point in result["rounds"]] == [0, 4, 8]
    first = result["rounds"][0]
    with Store.open(finished / "run", writable=False) as store:
        start = store.metrics()[0]["local_loss"]
    assert first["warm"]["test_loss"] < 0.8 * first["common"]["test_loss"]
    for point in result["rounds"]:  # and ahead after each step of training alike
        assert point["warm"]["test_loss"] < point["common"]["test_loss"]
    assert first["common"]["test_loss"] == pytest.approx(start, rel=0.5)  # an untrained row, on another client's data
    after = snapshot(finished / "run")
    assert {k: v for k, v in after.items() if not k.startswith("adapted")} == before
    assert Path(result["adapter"]) == finished / "run" / "adapted" / NEW
    kept = json.loads((finished / "run" / "adapted" / f"{NEW}.json").read_text())
    assert kept == {k: v for k, v in result.items() if k != "run"} | {"adapter": NEW}


def test_without_training_it_is_the_mean_of_its_neighbours(finished: Path) -> None:
    assert adapt(finished, "--group", "odd", "--rounds", 0).status == 0
    with Store.open(finished / "run", writable=False) as store:
        rows, config = store.rows(), store.config()
        layout = open_session(parse_text(config)).layout
        expected = rows[torch.tensor([1, 3])].mean(0)
    found = from_peft(finished / "run" / "adapted" / NEW, layout)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # a mean in float64, rounded once


def test_neighbours_of_other_ranks_count_in_their_own_scale(tiny_folder: Path, tmp_path: Path) -> None:
    """ann has rank 1, whose scale is twice that of cleo's 2: s·B of the start is the mean of theirs, the second rank cleo's."""
    values = settings(
        tiny_folder, write_clients(tmp_path / "data.jsonl"), rounds=1, clients={"rank": {"ann": 1}},
        evaluation={"generate": False, "transfer_clients": 0},
    )  # fmt: skip
    run(Experiment(**values), tmp_path / "run")
    (tmp_path / "eve.jsonl").write_text((tmp_path / "data.jsonl").read_text())
    ended = adapt(tmp_path, "--group", "even", "--rounds", 0)
    assert ended.status == 0, ended
    with Store.open(tmp_path / "run", writable=False) as store:
        rows = store.rows()[torch.tensor([0, 2])]
        layout = open_session(parse_text(store.config())).layout
    rows[0] *= layout.within(1)
    warm = from_peft(tmp_path / "run" / "adapted" / NEW, layout)
    for entry in layout.entries:
        ann, cleo = entry.view(rows)
        scale = 2 if entry.factor == "B" else 1
        both = entry.view(layout.within(1))
        expected = torch.where(both, (scale * ann + cleo) / 2, cleo)
        torch.testing.assert_close(entry.view(warm), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--group", "evn"), "--group evn: no client of the run is in this group; did you mean 'even'?"),
        (("--set", "split.train=50"), "data: client 'eve' has 8 different examples"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        # Its start is made of its neighbours' rows: read with another adapter they would be noise.
        (
            ("--set", "adapter.rank=1"),
            "--set adapter.rank=1: a new client has the adapter of the run; it may",
        ),
        (("--set", "data.source=builtin"), "a new client has the data"),
        (("--set", "clients.rank={eve: 1}"), "a new client has the clients"),
    ],
)
def test_what_cannot_be_is_one_line(finished: Path, more: tuple[str, ...], message: str) -> None:
    assert message in adapt(finished, *more).error


def test_a_name_that_is_taken_is_refused(finished: Path) -> None:
    ended = mira("adapt", finished / "run", "--client", "ann", "--data", finished / "eve.jsonl")
    assert ended.error == "--client ann: is a client of this run; give the new client another name"


def test_a_human_sees_both_curves(finished: Path) -> None:
    out = adapt(finished, "--group", "even", "--rounds", 1).out
    assert "starts from ann (1.00), cleo (1.00)" in out
    assert "from the common start" in out


@pytest.fixture(scope="module")
def alike(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients without groups that all describe the same task."""
    folder = tmp_path_factory.mktemp("alike")
    for k in range(4):
        lines = [{"instruction": "Add.", "input": f"{n} and {k}", "output": str(n + k)} for n in range(8)]
        place = folder / ("eve.jsonl" if k == 3 else f"data/c{k}.jsonl")
        place.parent.mkdir(exist_ok=True)
        place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = settings(
        tiny_folder, folder, graph={"name": "complete"}, rounds=2, evaluation={"generate": False, "transfer_clients": 0}
    )
    run(Experiment(**values | {"data": {"source": "jsonl", "path": str(folder / "data")}}), folder / "run")
    return folder


def test_where_all_describe_the_same_task_all_are_neighbours(alike: Path) -> None:
    ended = adapt(alike, "--rounds", 0)
    assert ended.status == 0, ended
    assert ended.out.startswith("starts from c0 (1.00), c1 (1.00), c2 (1.00)\n")
    assert "all clients of the run have the same task description; using equal weights" in ended.err
    assert "its clients have no group, leave --group out" in adapt(alike, "--group", "any").error


def test_another_task_than_theirs_starts_from_all_of_them(alike: Path) -> None:
    other = alike / "other.jsonl"
    other.write_text((alike / "eve.jsonl").read_text().replace("Add.", "Sing."))
    ended = mira("adapt", alike / "run", "--client", "other", "--data", other, "--rounds", 0)
    assert ended.out.startswith("starts from c0 (1.00), c1 (1.00), c2 (1.00)\n")
    assert "no task description of the run is similar to this client's, and its clients have no groups" in ended.err


def test_data_of_the_run_need_not_be_there(alike: Path) -> None:
    (alike / "data").rename(alike / "gone")
    try:
        assert adapt(alike, "--rounds", 0).status == 0
    finally:
        (alike / "gone").rename(alike / "data")


@pytest.mark.parametrize("name", ["knn", "similarity"])
def test_a_graph_of_descriptions_that_are_all_the_same_says_so(name: str, alike: Path, tiny_folder: Path) -> None:
    config = alike / "config.yaml"
    data = {"source": "jsonl", "path": str(alike / "data"), "client_column": None, "group_column": None}
    config.write_text(json.dumps(settings(tiny_folder, alike, graph={"name": name}, data=data)))
    for command in (["config", "check", config], ["run", config, "--out", alike / f"run-{name}"]):
        refused = mira(*command).error
        assert refused.startswith(f"graph.name={name}: all clients have the same task description, so")
    assert mira("config", "check", config, "--set", "graph.source=displacement").status == 0
    assert mira("config", "check", config, "--set", "graph.name=complete").status == 0


def test_data_that_is_needed_and_gone_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [{"question": f"{n} of {name}?", "answer": str(n)} for n in range(8)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = settings(
        tiny_folder,
        tmp_path,
        graph={"name": "complete"},
        rounds=1,
        evaluation={"generate": False, "transfer_clients": 0},
    )
    run(Experiment(**values | {"data": {"source": "jsonl", "path": str(tmp_path / "data")}}), tmp_path / "run")
    (tmp_path / "data" / "a.jsonl").rename(tmp_path / "eve.jsonl")
    (tmp_path / "data").rename(tmp_path / "gone")
    refused = adapt(tmp_path, "--rounds", 0).error
    assert refused.startswith(
        "--client: the run's clients have no descriptions and are compared by their data, which is no longer at"
    )
