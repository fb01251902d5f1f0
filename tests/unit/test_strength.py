"""The strength of MIRA that a configuration leaves open: what a run takes, what it tells, and what old runs keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.sample_config import mira, write_clients, write_config
from mira import config
from mira.comparison import plan
from mira.comparison.run import fixed_strengths
from mira.config import Experiment

pytestmark = pytest.mark.quick

NOISED: dict[str, Any] = {"unit": "example", "noise": 1.0, "clip": 1.0, "delta": 1e-5, "metrics": "noised"}
UNTOLD: dict[str, Any] = {"noise": 1.0, "clip": 1.0, "metrics": "none"}


def experiment(**sections: Any) -> Experiment:
    values: dict[str, Any] = {
        "rounds": 2, "model": {"name": "m"}, "data": {"source": "builtin"}, "training": {"local_steps": 1},
    }  # fmt: skip
    return Experiment(**values | sections)


@pytest.mark.parametrize(
    ("sections", "strength", "reason"),
    [
        ({}, "personal", None),
        ({"method": {"space": "rotated", "neighbours": "all", "common_rounds": 1}}, "personal", None),
        ({"privacy": NOISED | {"metrics": "exact"}}, "personal", None),
        ({"privacy": NOISED}, 0.5, "privacy.metrics=noised"),
        ({"privacy": UNTOLD}, 0.5, "privacy.metrics=none"),
        ({"privacy": UNTOLD | {"metrics": "exact"}}, 0.5, "privacy.unit=site"),
        ({"method": {"space": "product"}}, 0.5, "method.space=product"),
        ({"method": {"strength_end": 0.0}}, 0.5, "method.strength_end=0"),
        ({"method": {"space": "product", "strength": 0.3}}, 0.3, None),
        ({"method": {"strength": 0.0}, "privacy": UNTOLD}, 0.0, None),
        ({"method": {"strength": "similarity"}, "privacy": UNTOLD}, "similarity", None),
        ({"method": {"form": "paper"}, "privacy": UNTOLD}, None, None),
    ],
)
def test_an_open_strength_is_personal_where_clients_can_choose(
    sections: dict[str, Any], strength: Any, reason: str | None
) -> None:
    given = experiment(**sections)
    assert config.resolved(given).method.strength == strength  # type: ignore[attr-defined]
    told = None if reason is None else f"method.strength is 0.5: clients cannot choose their own with {reason}"
    assert config.strength_told(given) == told
    again = config.resolved(given)
    assert config.resolved(again) == again
    assert config.strength_told(again) is None


def test_a_method_without_a_strength_is_left_as_it_is() -> None:
    given = experiment(method={"name": "fedit"})
    assert config.resolved(given).method == given.method
    assert config.strength_told(given) is None


def test_a_run_of_before_keeps_its_number() -> None:
    """Its folder holds 0.5, the default of then, in both forms; the paper's form had no use for it."""
    for form, strength in (("normalised", 0.5), ("paper", None)):
        old = config.dump(experiment(method={"form": form, "strength": 0.5}))
        kept = config.recorded(old, {}, "folder")
        assert kept.method.strength == strength  # type: ignore[attr-defined]
        new = config.resolved(experiment(method={"form": form}))
        changed = [] if form == "paper" else ['method.strength: 0.5 here, "personal" there']
        assert config.differences(kept, new) == changed


def test_each_entry_of_a_comparison_has_the_strength_of_its_own_settings(tmp_path: Path) -> None:
    given = experiment()
    file = tmp_path / "c.yaml"
    entries = "{MIRA: {}, Products: {method.space: product}, Half: {method.strength: 0.5}, Local: {method.name: local}}"
    file.write_text(
        f"experiment: {{rounds: 2, model: {{name: m}}, data: {{source: builtin}}, training: {{local_steps: 1}}}}\n"
        f"seeds: [0, 1]\nentries: {entries}\n"
    )
    made = plan.load(file)
    found = {name: config.resolved(jobs[0][0].experiment).method for name, jobs in made.jobs.items()}
    assert {name: getattr(method, "strength", None) for name, method in found.items()} == {
        "MIRA": "personal", "Products": 0.5, "Half": 0.5, "Local": None,
    }  # fmt: skip
    assert fixed_strengths(made) == [
        "entries.Products: method.strength is 0.5: clients cannot choose their own with method.space=product"
    ]
    assert made.base.method == given.method  # open still: entries decide


def test_a_run_says_why_its_strength_is_a_number_and_its_folder_holds_what_it_has(
    tiny_folder: Path, tmp_path: Path
) -> None:
    line = "method.strength is 0.5: clients cannot choose their own with method.space=product"
    brief = {"rounds": 1, "evaluation": {"generate": False, "transfer_clients": 0}}
    file = write_config(tmp_path / "a.yaml", tiny_folder, write_clients(tmp_path / "data.jsonl"), **brief)
    for given, strength in (([], "personal"), (["--set", "method.space=product"], 0.5)):
        ended = mira("run", file, "--out", tmp_path / str(strength), *given)
        assert ended.status == 0, ended.err
        assert ended.err.count(line) == int(strength == 0.5)
        assert config.load(tmp_path / str(strength) / "config.yaml").method.strength == strength  # type: ignore[attr-defined]
        assert (line in mira("config", "check", file, *given).out) is (strength == 0.5)
