"""Comparing: what a file means, what the statistics say, and what the tables show."""

from __future__ import annotations

import csv
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mira import Experiment
from mira.comparison import load
from mira.comparison.plan import parse, points, shown
from mira.comparison.progress import of_a_run
from mira.comparison.summary import MEASURES
from mira.comparison.tables import csv_text, latex, markdown, rich_tables
from mira.core.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("compare-*.yaml"))
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


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_comparison_resolves(file: Path) -> None:
    plan = load(file)
    jobs = [job for by_point in plan.jobs.values() for jobs in by_point for job in jobs]
    assert len({job.folder for job in jobs}) == len(jobs)
    assert len({config_of_all(job.experiment) for job in jobs}) == len(plan.comparison.seeds)
    assert not any(job.experiment.evaluation.test for job in jobs)
    assert plan.base.engine.threads
    assert plan.base.name in {each.stem for each in CONFIGS}  # of another one where its finished runs are taken over
    assert f"mira compare configs/{file.name} " in file.read_text(encoding="utf-8")


def config_of_all(experiment: Any) -> str:
    """What decides data, order and schedule."""
    training = experiment.training
    schedule = (training.local_steps, training.local_epochs, training.batch_size, experiment.rounds, experiment.cohort)
    return repr((experiment.data, experiment.split, experiment.prompt, experiment.model, experiment.seed, schedule))


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
        ({"tune_seeds": [3]}, r"tune_seeds: unknown value 3; allowed: 0, 1, 2"),
        ({"against": ["local"]}, r"against: unknown value 'local'; did you mean 'Local'\?"),
        ({"experiment": None}, r"base: give the experiment either as base, a YAML file, or under experiment"),
        ({"base": "x.yaml"}, r"base: give the experiment either as base"),
        ({"grid": {"rounds": [1, 2]}}, r"grid\.rounds: must be the same for all"),
        ({"entries": {"a": {"data.source": "builtin"}}}, r"entries\.a\.data\.source: must be the same for all"),
        ({"entries": {"a": {"training.local_steps": 1}}}, r"entries\.a\.training\.local_steps: must be the same for all"),
        ({"entries": {"a": {"training": {}}}}, r"entries\.a\.training: must be the same for all"),
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
    about = {"name": name, "sets": f"method.name={name}", "chosen": "training.lr=0.1, method.s=1", "against": []}
    return {**about, **measures, **changes}


def duel(baseline: str, p: float | None = 0.0123) -> dict[str, Any]:
    counts = {"clients": 12, "wins": 9, "ties": 0, "win_rate": 0.75}
    return {"baseline": baseline, **counts, "difference": -0.1, "p": p}


def value(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "demo", "date": "2026-01-02", "command": "mira compare c.yaml", "commit": None,
        "machine": {"processor": "P", "threads": 2, "device": "cpu"}, "model": {"name": "m", "sha256": "0123456789abcdef"},
        "complete": True, "seeds": [0, 1], "tune_seeds": [0, 1], "entries": list(entries),
    } | changes  # fmt: skip


TWO = value(
    entry("a"), entry("b_c", rouge_l=spread(None), against=[duel("a", p=0.0001), ]), entry("d", against=[duel("a", p=None)])
)  # fmt: skip


def test_markdown() -> None:
    lines = markdown(TWO).splitlines()
    assert "| a | lr=0.1, s=1 | 0.5000 ± 0.2500 | 0.5000 ± 0.2500 | 0.500 ± 0.250 |" in lines
    assert "|  | beats a (p) |" in lines
    assert {"| a |  |", "| b_c | 9 of 12 (<0.001) |", "| d | – |"} <= set(lines)
    assert "| b_c | – | 0.500 ± 0.250 | 2.5 | 0 ± 0 |" in lines
    assert any(
        line.startswith("2026-01-02, commit unknown, P, 2 threads, cpu; m (sha256 0123456789ab)") for line in lines
    )
    assert "Not complete" not in markdown(TWO)
    assert "Not complete" in markdown(TWO | {"complete": False})
    assert "of seeds 0)" in markdown(TWO | {"tune_seeds": [0]})


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
    assert [rows[1][f"{what} a"] for what in ("wins against", "difference to", "p against")] == ["9", "-0.1", "0.0123"]
    assert rows[0]["wins against a"] == ""


def test_latex_is_well_formed() -> None:
    text = latex(value(entry("50 % of A_1 & {B}"), entry("c\\d", against=[duel("50 % of A_1 & {B}", p=1e-4)])))
    assert "($<$0.001)" in text  # in text alone LaTeX prints another sign for it
    assert r"50 \% of A\_1 \& \{B\}" in text
    assert r"c\textbackslash{}d" in text
    assert text.isascii()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns)}


def test_the_table_fits_a_terminal_and_takes_names_as_they_are() -> None:
    stream = StringIO()
    Console(file=stream, width=80).print(rich_tables(value(entry("[red]x"), entry("b", against=[duel("[red]x")]))))
    text = stream.getvalue()
    assert "[red]x" in text
    assert "9 of 12 (0.012)" in text
    assert "0.5000 ± 0.2500" in text
    assert max(map(len, text.splitlines())) <= 80
