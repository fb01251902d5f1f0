"""Comparing: what a file means, what the statistics say, and what the tables show."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mira import Experiment
from mira.comparison import load
from mira.comparison.grid import beyond, edges, points
from mira.comparison.paired import against, primary
from mira.comparison.plan import Primary, parse, shown
from mira.comparison.progress import of_a_run
from mira.comparison.run import compare
from mira.comparison.summary import MEASURES
from mira.comparison.tables import csv_text, latex, markdown, rich_tables
from mira.core.errors import UserError
from mira.results.statistics import holm

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("compare-*.yaml"))
PROTOCOL = [file for file in CONFIGS if file.stem.split("-")[1] in ("shared", "mixed", "apart")]
EXPERIMENT = {
    "rounds": 2, "model": {"name": "m"}, "data": {"source": "builtin"}, "training": {"local_steps": 2},
    "method": {"name": "mira", "strength": 0.25},
}  # fmt: skip
WHOLE: dict[str, Any] = {
    "experiment": EXPERIMENT, "seeds": [0, 1, 2], "grid": {"training.lr": [0.1, 0.2]},
    "entries": {"Local": {"method.name": "local"}, "MIRA (s = 1)": {"method.strength": 1.0, "graph.name": "complete"}},
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(WHOLE | changes, sort_keys=False), encoding="utf-8")
    return file


# The file


def test_runs_with_real_noise_are_said_to_add_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    private = {"unit": "example", "clip": 1.0, "noise": 1.0}
    told = "privacy: each run counts its own epsilon; all runs of this comparison are on the same data and cost more together"
    for privacy, lines in ((None, 0), (private | {"simulation": True}, 0), (private, 1)):
        caplog.clear()
        plan = load(write(tmp_path, experiment=EXPERIMENT | {"privacy": privacy}))
        with caplog.at_level("WARNING", "mira"), pytest.raises(UserError, match="give one of the two"):
            compare(plan, tmp_path / "out", "again", workers=3, ray="auto")  # refused, but after the warning
        assert caplog.text.count(told) == lines


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_comparison_resolves(file: Path) -> None:
    plan = load(file)
    jobs = [job for by_point in plan.jobs.values() for jobs in by_point for job in jobs]
    assert len({job.folder for job in jobs}) == len(jobs)
    assert len({config_of_all(job.experiment) for job in jobs}) == len({*plan.comparison.seeds, *plan.tune_seeds})
    assert not any(job.experiment.evaluation.test for job in jobs)
    assert plan.base.engine.threads
    assert plan.base.name in {each.stem for each in CONFIGS}  # of another one where its finished runs are taken over
    assert f"mira compare configs/{file.name} " in file.read_text(encoding="utf-8")


def config_of_all(experiment: Any) -> str:
    """The settings that decide data, order and schedule, as text. An entry may have a base of its own precision."""
    training = experiment.training
    schedule = (training.local_steps, training.local_epochs, training.batch_size, experiment.rounds, experiment.cohort)
    model = replace(experiment.model, dtype="float32")
    return repr((experiment.data, experiment.split, experiment.prompt, model, experiment.seed, schedule))


def test_every_job_of_a_plan(tmp_path: Path) -> None:
    plan = load(write(tmp_path, tune_seeds=[1], set={"rounds": 5}), ["cohort=0.5"])
    assert list(plan.jobs) == ["Local", "MIRA (s = 1)"]
    assert plan.total == 2 * (2 * 1 + 2)
    assert plan.baselines == ["Local", "MIRA (s = 1)"]
    local, mira = (plan.jobs[name][1][2] for name in plan.jobs)
    assert (local.entry, local.point, local.seed) == ("Local", {"training.lr": 0.2}, 2)
    assert local.folder == Path("runs/local/training.lr=0.2/seed-2")
    assert mira.folder == Path("runs/mira-s-1/training.lr=0.2/seed-2")
    for job in (local, mira):
        e = job.experiment
        assert (e.seed, e.training.lr, e.rounds, e.cohort, e.evaluation.test) == (2, 0.2, 5, 0.5, False)
    assert local.experiment.method.name == "local"  # and the base's strength, which it does not have, is gone
    assert mira.experiment.method.strength == 1.0  # type: ignore[attr-defined]
    assert mira.experiment.graph.name == "complete"
    assert plan.base.method.strength == 0.25  # type: ignore[attr-defined]


def test_seeds_that_tune_may_be_apart_from_those_that_are_reported(tmp_path: Path) -> None:
    plan = load(write(tmp_path, seeds=[3, 4, 5], tune_seeds=[7, 3]))
    assert [job.seed for job in plan.jobs["Local"][0]] == [3, 4, 5, 7]
    assert (plan.tune_seeds, plan.other_seeds) == ([7, 3], [4, 5])
    assert plan.total == 2 * (2 * 2 + 2)


def test_the_edge_of_a_grid() -> None:
    tried = points(
        {"training.lr": [0.1, 0.4, 0.2], "method.form": ["a", "b"], "method.s": [1.0], "method.n": [1, None]}
    )
    ends = {each["training.lr"]: edges(tried, each) for each in tried}
    assert ends == {0.1: {"training.lr": 0.1}, 0.4: {"training.lr": 0.4}, 0.2: {}}


@pytest.mark.parametrize(
    ("grid", "below", "above"),
    [
        ({"lr": [0.001, 0.002, 0.004]}, [0.0005, 0.00025], [0.008, 0.016]),
        ({"lr": [0.01, 0.003]}, [0.0009, 0.00027], [0.0333333333, 0.111111111]),
        ({"rank": [1, 2, 10]}, [0.5, 0.25], [50, 250]),
        ({"lr": [0.0, 1.0]}, [], []),
        ({"lr": [1.0]}, [], []),
        ({"on": [False, True]}, [], []),
        ({"form": ["a", "b"]}, [], []),
        ({"n": [1, None]}, [], []),
        ({"lr": [1, 2], "n": [1, 2]}, [], []),
    ],
)
def test_what_lies_beyond_a_grid(grid: Any, below: list[float], above: list[float]) -> None:
    sides = [[value for point in side for value in point.values()] for side in beyond(grid, 2)]
    assert sides == [below, above]
    assert list(map(type, sides[1])) == list(map(type, above))
    assert beyond(grid, 0) == ([], [])


def test_a_grid_is_extended_as_far_as_the_configuration_allows(tmp_path: Path) -> None:
    entries = {"MIRA": {"grid": {"method.strength": [0.25, 0.5]}}, "Local": {"method.name": "local"}}
    plan = load(write(tmp_path, entries=entries, extend=3))
    lower, upper = plan.beyond["MIRA"]
    assert [jobs[0].point for jobs in lower] == [{"method.strength": s} for s in (0.125, 0.0625, 0.03125)]
    assert [jobs[0].point for jobs in upper] == [{"method.strength": 1.0}]
    assert [[job.seed for job in jobs] for jobs in upper] == [[0, 1, 2]]
    assert plan.total == 2 * 2 * 3
    assert len(list(plan.every_job())) == (2 + 4) * 3 + (2 + 6) * 3
    assert load(write(tmp_path)).beyond["Local"] == ([], [])


@pytest.mark.parametrize("file", PROTOCOL, ids=lambda file: file.name)
def test_the_protocol_reports_no_seed_that_tuned_or_was_used_before(file: Path) -> None:
    plan = load(file)
    tuned, reported = set(plan.tune_seeds), set(plan.comparison.seeds)
    assert not tuned & reported
    assert not (tuned | reported) & set(range(10)), "seeds of development"
    assert len(tuned) >= 2
    assert len(reported) >= 5
    for name in plan.jobs:
        (rates,) = plan.comparison.grid_of(name).values()
        assert len(rates) >= 3, "an inner point can be chosen"
    training = {job.experiment.training.local_steps for points in plan.jobs.values() for jobs in points for job in jobs}
    assert len(training) == 1


def test_the_base_lies_beside_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
    values = {key: value for key, value in WHOLE.items() if key != "experiment"} | {"base": "base.yaml"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load(tmp_path / "c.yaml").base == load(write(tmp_path)).base


def test_an_entry_with_a_grid_of_its_own(tmp_path: Path) -> None:
    entries = {**WHOLE["entries"], "slow": {"grid": {"training.lr": [1e-6, 1e-5]}}}
    slow = load(write(tmp_path, entries=entries)).jobs["slow"]
    assert [jobs[0].experiment.training.lr for jobs in slow] == [1e-6, 1e-5]


def test_points_are_every_combination() -> None:
    assert points({}) == [{}]
    grid = {"a.b": [1, 2], "c.d": ["x", None]}
    assert [shown(point) for point in points(grid)] == [
        "a.b=1, c.d=x", "a.b=1, c.d=null", "a.b=2, c.d=x", "a.b=2, c.d=null"
    ]  # fmt: skip


def test_an_entry_may_have_a_base_of_its_own_precision(tmp_path: Path) -> None:
    plan = load(write(tmp_path, entries={"a": {}, "b": {"model.dtype": "float32"}}, set={"model.dtype": "bfloat16"}))
    assert [plan.jobs[entry][0][0].experiment.model.dtype for entry in "ab"] == ["bfloat16", "float32"]


def test_points_that_differ_in_signs_have_folders_of_their_own(tmp_path: Path) -> None:
    values = ["q|v", "q_v", "x" * 300]
    plan = load(write(tmp_path, grid={"adapter.targets": values}))
    folders = [jobs[0].folder.parts[2] for jobs in plan.jobs["Local"]]
    assert folders[1] == "adapter.targets=q_v"
    assert re.fullmatch(r"adapter\.targets=_q_v_-[0-9a-f]{8}", folders[0])
    assert len(set(folders)) == 3
    assert max(map(len, folders)) < 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"training.lr": [0.1, 0.1]}}, r"grid\.training\.lr=\[0\.1, 0\.1\]: has a repeated value"),
        (
            {"entries": {"a": {"method.name": "flexlora", "adapter.kind": "prompt"}}},
            r"entries\.a: method\.name=flexlora: needs the factors A and B of LoRA",
        ),
        ({"entires": {}}, r"entires: unknown key; did you mean 'entries'\?"),
        ({"entries": {}}, r"entries=\{\}: .*at least 1"),
        ({"seeds": []}, r"seeds=\[\]: .*at least 1"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]: has a repeated value"),
        ({"tune_seeds": [3, 3]}, r"tune_seeds=\[3, 3\]: has a repeated value"),
        ({"against": ["local"]}, r"against: no entry 'local'; did you mean 'Local'\?"),
        ({"primary": [{"entry": "Lokal", "against": ["Local"]}]}, r"primary\[0\]\.entry: no entry 'Lokal'; did you mean"),
        ({"primary": [{"entry": "Local", "against": ["x"]}]}, r"primary\[0\]\.against: no entry 'x'; allowed: Local, MIRA"),
        ({"primary": [{"entry": "Local", "against": []}]}, r"primary\.0\.against=\[\]: .*at least 1"),
        ({"primary": [{"entry": "Local", "against": ["Local"]}]}, r"primary: compares 'Local' with itself"),
        (
            {"primary": [{"entry": "Local", "against": ["MIRA (s = 1)"], "margin": m} for m in (None, 0.02)]},
            r"primary: compares 'Local' with 'MIRA \(s = 1\)' twice",
        ),
        ({"extend": 9}, r"extend=9: .*less than or equal to 8"),
        ({"experiment": None}, r"base: give the experiment either as base, a YAML file, or under experiment"),
        ({"base": "x.yaml"}, r"base: give the experiment either as base"),
        ({"grid": {"rounds": [1, 2]}}, r"grid\.rounds: must be the same for all"),
        ({"entries": {"a": {"data.source": "builtin"}}}, r"entries\.a\.data\.source: must be the same for all"),
        ({"entries": {"a": {"training.local_steps": 1}}}, r"entries\.a\.training\.local_steps: must be the same for all"),
        ({"entries": {"a": {"training": {}}}}, r"entries\.a\.training: must be the same for all"),
        ({"entries": {"a": {"model.name": "other"}}}, r"entries\.a\.model\.name: must be the same for all"),
        ({"entries": {"a": {"seed": 1}}}, r"entries\.a\.seed: must be the same for all"),
        ({"entries": {"a": {"grid": {"training.lr": [1]}}}}, r"entries\.a\.grid: 1 points, but the others have 2"),
        ({"entries": {"a": {"grid": 3}}}, r"entries\.a\.grid=3: must be dotted keys, each with a list"),
        ({"entries": {"a": {"training.lr": 1}}}, r"entries\.a\.training\.lr: is in the grid too"),
        ({"entries": {"a b": {}, "A-B": {}}}, r"entries\.a b: gives no unique folder name \('a-b'\)"),
        ({"entries": {"±": {}}}, r"entries\.±: gives no unique folder name"),
        ({"entries": {"a": {"method.name": "fedid"}}}, r"entries\.a: method\.name='fedid': .*did you mean 'fedit'\?"),
        ({"entries": {"a": {"method.strenght": 1}}}, r"entries\.a: method\.strenght: unknown key; did you mean"),
        ({"grid": {"training.lr": [-1]}}, r"entries\.Local: training\.lr=-1: "),
        ({"set": {"seed": 3}}, r"seed: give the seeds of a comparison in seeds"),
    ],
)  # fmt: skip
def test_a_fault_is_named_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{message}") as caught:
        load(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["training.lr=0.5", "method.name=fedit", "seed=3"])
def test_an_override_does_not_touch_what_is_compared(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^(override|seed)"):
        load(write(tmp_path), [text])


def test_a_comparison_is_no_single_run() -> None:
    file = Path(__file__).parents[2] / "configs" / "demo-compare.yaml"
    with pytest.raises(UserError, match=f"^{file}: has the key entries .*; use: mira compare {file}$"):
        Experiment.from_yaml(file)


def test_a_comparison_needs_its_entries() -> None:
    with pytest.raises(UserError, match=r"^seeds: missing"):
        parse({"base": "x.yaml", "entries": {"a": {}}})


# The time it takes


@pytest.mark.parametrize(
    ("measured", "rounds", "every", "expected"),
    [
        (True, 8, 1, 3 + 8 * (10 - 3) + 8 * 3),
        (True, 8, 2, 3 + 8 * (10 - 3) + 4 * 3),  # the first round is the last of one: measured in any case
        (False, 8, 2, 3 + 8 * 10 + 4 * 3),
        (False, 7, 3, 3 + 7 * 10 + 3 * 3),
    ],
)
def test_a_run_by_its_first_round(measured: bool, rounds: int, every: int, expected: float) -> None:
    """3 s to measure, 10 s for the first round with what was measured after it."""
    assert of_a_run(3.0, 10.0, measured, rounds, every) == expected


# Tables


def spread(mean: float | None, interval: float | None = None) -> dict[str, float | None]:
    return {"mean": mean, "interval": interval}


def entry(name: str, **changes: Any) -> dict[str, Any]:
    measures = {measure: spread(0.5, 0.25) for measure in MEASURES} | {"bytes": spread(2.5e6, 0.0)}
    about = {
        "name": name,
        "sets": f"method.name={name}",
        "chosen": "training.lr=0.1, method.s=1",
        "edge": "",
        "against": [],
    }
    about["tuning"] = [{"point": "training.lr=0.1"}, {"point": "training.lr=0.2"}]
    return {**about, **measures, **changes}


def duel(baseline: str, **changes: Any) -> dict[str, Any]:
    counts = {"clients": 12, "wins": 9, "ties": 0, "win_rate": 0.75, "pairs": 24, "pair_wins": 17}
    effects = {"difference": -0.1, "difference_low": -0.15, "difference_high": -0.05}
    effects |= {"relative": -0.2, "relative_low": -0.3, "relative_high": -0.1}
    worst = {"worst": "c", "worst_difference": 0.0123, "worst_relative": 0.0456}
    return {"baseline": baseline, **counts, **effects, **worst, "p": 0.0123, **changes}


def claim(baseline: str, **changes: Any) -> dict[str, Any]:
    return duel(baseline) | {"entry": "b", "margin": None, "p_holm": 0.0246, "shown": True, **changes}


MISSING = dict.fromkeys(key for key in duel("") if key != "baseline")


def value(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "demo", "date": "2026-01-02", "command": "mira compare c.yaml", "commit": None,
        "machine": {"processor": "P", "threads": 2, "device": "cpu"}, "model": {"name": "m", "sha256": "0123456789abcdef"},
        "complete": True, "seeds": [0, 1], "tune_seeds": [2, 3], "primary": [], "entries": list(entries),
    } | changes  # fmt: skip


TWO = value(
    entry("a"), entry("b_c", rouge_l=spread(None), against=[duel("a")]), entry("d", against=[duel("a", **MISSING)])
)  # fmt: skip


def test_markdown() -> None:
    lines = markdown(TWO).splitlines()
    assert "| a | lr=0.1, s=1 | 0.5000 ± 0.2500 | 0.5000 ± 0.2500 | 0.500 ± 0.250 | 0.500 ± 0.250 |" in lines
    assert "|  | lower than a |" in lines
    assert {"| a |  |", "| b_c | 9 of 12, −0.100 [−0.150, −0.050] |", "| d | – |"} <= set(lines)
    assert "|  | ROUGE-L | exact match | accuracy | MB | s |" in lines
    assert "| b_c | – | 0.500 ± 0.250 | 0.500 ± 0.250 | 2.5 | 0 ± 0 |" in lines
    assert "| a | 0.500 ± 0.250 | 0.500 ± 0.250 | 2.5 | 0 ± 0 |" in markdown(
        value(entry("a", label_accuracy=spread(None)))
    )
    assert any(
        line.startswith("2026-01-02, commit unknown, P, 2 threads, cpu; m (sha256 0123456789ab)") for line in lines
    )
    assert "Not complete" not in markdown(TWO)
    assert "Not complete" in markdown(TWO | {"complete": False})
    assert "(of seeds 2, 3)" in markdown(TWO)
    assert "of seeds" not in markdown(TWO | {"tune_seeds": [0, 1]})


def test_claims_come_first() -> None:
    found = [
        claim("a"),
        claim("c", margin=0.02, p_holm=0.0001, shown=False),
        claim("d", **MISSING, p_holm=None, shown=None),
    ]
    lines = markdown(TWO | {"primary": found}).splitlines()
    effects = "−0.100 [−0.150, −0.050] | −20.0 [−30.0, −10.0] % | 9 of 12 | c +0.012; +4.6 %"
    assert lines[:5] == [
        "| claim | difference | relative | lower on | worst client | p (Holm) | shown |", "|---|---|---|---|---|---|---|",
        f"| b < a | {effects} | 0.025 | yes |", f"| b < c + 2 % | {effects} | <0.001 | no |",
        "| b < d | – | – | – | – | – | – |",
    ]  # fmt: skip
    alone = dict.fromkeys(("difference_low", "difference_high", "relative_low", "relative_high", "p", "p_holm"))
    assert "| b < a | −0.100 | −20.0 % | 9 of 12 | c +0.012; +4.6 % | – | – |" in markdown(
        TWO | {"primary": [claim("a", **alone, shown=None)]}
    )


def test_doubts_about_tuning_are_said_below_the_table() -> None:
    edge = value(entry("a", edge="training.lr=0.1"), entry("b"))
    assert "a: lr=0.1 is the edge of its grid; a better value may lie beyond." in markdown(edge).splitlines()
    said = "Seeds that chose points of the grid and are reported too: 1."
    assert said in markdown(edge | {"tune_seeds": [1, 2]}).splitlines()
    untuned = [entry(name, tuning=[{"point": ""}]) for name in "ab"]
    assert "are reported too" not in markdown(value(*untuned, tune_seeds=[0, 1]))


# Entries against each other


def measured(name: str, losses: dict[int, list[float | None]], seeds: int = 3) -> dict[str, Any]:
    """An entry with the losses of its clients for each seed that did not fail. Two clients share a task."""
    runs = [
        {
            "seed": seed,
            "clients": [{"name": f"c{k}", "group": f"t{k // 2}", "loss": loss} for k, loss in enumerate(own)],
        }
        for seed, own in losses.items()
    ]
    return {"name": name, "bytes": spread(1.0 if len(runs) == seeds else None), "runs": runs}


NOISE = [[0.01 * ((7 * seed + 3 * k) % 5 - 2) for k in range(8)] for seed in range(3)]
BASE = measured("base", {seed: [2.0] * 8 for seed in range(3)})
LOWER = measured("lower", {seed: [1.8 + x for x in NOISE[seed]] for seed in range(3)})
EQUAL = measured("equal", {seed: [2.0 + x for x in NOISE[seed]] for seed in range(3)})


def test_claims_are_shown_where_the_corrected_p_and_the_side_agree() -> None:
    claims = [
        Primary(entry="lower", against=["base", "equal"]),
        Primary(entry="equal", against=["base"], margin=0.02),
        Primary(entry="base", against=["lower"]),
        Primary(entry="base", against=["equal"]),
    ]
    found = primary(claims, [BASE, LOWER, EQUAL])
    assert [(each["entry"], each["baseline"]) for each in found] == [
        ("lower", "base"), ("lower", "equal"), ("equal", "base"), ("base", "lower"), ("base", "equal")
    ]  # fmt: skip
    assert [each["shown"] for each in found] == [True, True, True, False, False]
    assert found[3]["p_holm"] < 0.05, "shown to be higher, which was not the claim"
    assert [each["p_holm"] for each in found] == holm([each["p"] for each in found])
    assert found[2]["p"] != against(EQUAL, BASE)["p"], "the p of a margin is not that of no difference"
    assert found[0]["difference"] == pytest.approx(against(LOWER, BASE)["difference"])


@pytest.mark.parametrize(
    "broken",
    [
        measured("lower", {seed: [1.0] * 8 for seed in range(2)}),
        measured("lower", {seed: [1.0] * 7 + [None] for seed in range(3)}),
    ],
    ids=["a seed failed", "a loss is not finite"],
)
def test_what_is_missing_counts_among_the_claims(broken: dict[str, Any]) -> None:
    claims = [Primary(entry="lower", against=["base"]), Primary(entry="equal", against=["base"], margin=0.02)]
    without, whole = primary(claims, [BASE, broken, EQUAL])
    assert {value for key, value in without.items() if key not in ("entry", "baseline")} == {None}
    assert whole["p_holm"] == min(1.0, 2 * whole["p"])
    assert set(against(broken, BASE).values()) == {"base", None}
    assert primary(claims, [BASE])[1]["shown"] is None, "an entry that is not there yet"


def test_runs_of_another_commit_than_the_tables_are_told() -> None:
    runs = [
        {"seed": n, "best_round": 1, "lost": 0, "commit": c} for n, c in enumerate(["ab", "cd-dirty", "cd-dirty", None])
    ]
    assert "2026-01-02, commit ab (runs of cd-dirty), P," in markdown(value(entry("a", runs=runs), commit="ab"))
    assert "2026-01-02, commit ab, P," in markdown(value(entry("a", runs=runs[:1]), commit="ab"))


def test_what_a_mean_hides_is_said_below_the_table() -> None:
    runs = [{"seed": n, "best_round": n, "lost": 2 * n, "commit": None} for n in range(3)]
    lines = markdown(value(entry("a"), entry("b", runs=runs))).splitlines()
    assert "b: no round was better on validation data than the start (seeds 0)." in lines
    assert "b: a client fell out of a round 6 times." in lines
    assert not any(line.startswith("a: ") for line in lines)


def test_csv_reads_back_in_full() -> None:
    precise = entry('x,"y"', local_loss=spread(0.1 + 0.2, None), against=[duel("a")])
    rows = list(csv.DictReader(StringIO(csv_text(value(entry("a"), precise)))))
    assert [row["entry"] for row in rows] == ["a", 'x,"y"']
    assert float(rows[1]["local_loss_mean"]) == 0.1 + 0.2
    assert rows[1]["local_loss_interval"] == ""
    titles = ("wins against", "difference to", "lower end to", "upper end to", "p against")
    assert [rows[1][f"{title} a"] for title in titles] == ["9", "-0.1", "-0.15", "-0.05", "0.0123"]
    assert rows[0]["wins against a"] == ""


def test_latex_is_well_formed() -> None:
    both = value(entry("50 % of A_1 & {B}"), entry("c\\d", against=[duel("50 % of A_1 & {B}")]))
    text = latex(both | {"primary": [claim("x", p_holm=1e-4)]})
    assert "& $<$0.001 &" in text  # in text alone LaTeX prints another sign for it
    assert "$-$0.100 [$-$0.150, $-$0.050]" in text
    assert r"50 \% of A\_1 \& \{B\}" in text
    assert r"c\textbackslash{}d" in text
    assert text.isascii()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 4
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}


def test_the_table_fits_a_terminal_and_takes_names_as_they_are() -> None:
    stream = StringIO()
    Console(file=stream, width=80).print(rich_tables(value(entry("[red]x"), entry("b", against=[duel("[red]x")]))))
    text = stream.getvalue()
    assert "[red]x" in text
    assert "9 of 12, −0.100 [−0.150, −0.050]" in text
    assert "0.5000 ± 0.2500" in text
    assert max(map(len, text.splitlines())) <= 80
