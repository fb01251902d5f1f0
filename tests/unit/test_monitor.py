"""The metrics of a server, made of the records of its rounds; and the dashboard and alert rules, which name only those."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("prometheus_client", reason="needs prometheus-client: pip install 'mira-fl[flower]'")

from prometheus_client.parser import text_string_to_metric_families

from helpers.generated_runs import write_run
from helpers.monitored import END, FEDERATION
from mira.fleet.monitor import metrics
from mira.fleet.monitor.totals import OUTCOMES, PHASES, REJECTIONS, Totals, outcome_of, totals
from mira.fleet.monitor.watch import Federation, RunWatch, health, is_here

ROOT = Path(__file__).parents[2]
DASHBOARD, ALERTS = ROOT / "deploy" / "grafana" / "mira-server.json", ROOT / "deploy" / "prometheus" / "alerts.yml"
RECORDS: list[dict[str, Any]] = [
    {"round": 0, "seconds": 2.0, "validation_loss": 4.0, "clients": {"a": {}, "b": {}}},
    {
        "round": 1, "cohort": ["a", "b"], "lost": {"b": "its adapter moved by 9"}, "lost_kind": {"b": "norm"},
        "train_loss": {"a": 3.0}, "tokens": 100, "phase_seconds": {"prepare": 0.5, "train": 3.0},
        "client_bytes": {"a": {"down": 10, "up": 20}, "b": {"down": 10, "up": 0}}, "validation_loss": 3.5,
    },
    {
        "round": 2, "cohort": ["a", "b"], "lost": {"b": "no reply within 9 s"}, "lost_kind": {"b": "late"},
        "train_loss": {"a": 2.0}, "tokens": 100, "phase_seconds": {"prepare": 0.25, "train": 4.0, "measure": 1.0},
        "client_bytes": {"a": {"down": 10, "up": 20}, "b": {"down": 10, "up": 0}},
        "privacy": {"a": {"epsilon": 1.5, "delta": 1e-5, "steps": 6}}, "counted": {"a": 1.25, "b": 0.375},
    },
]  # fmt: skip


def watch(records: list[dict[str, Any]]) -> RunWatch:
    run = RunWatch()
    for record in records:
        run.round(record)
    return run


def samples(run: RunWatch, federation: Federation = FEDERATION) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Value of each sample, by its name and labels, as a scraper reads them."""
    text = metrics.text(metrics.registry(run, federation)).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Mapping[Any, float], name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_metrics_are_the_sums_of_the_records() -> None:
    run = watch(RECORDS)
    run.rounds = 10
    found = samples(run)
    assert value(found, "mira_rounds_total") == 2
    assert value(found, "mira_rounds_planned") == 10
    assert value(found, "mira_tokens_total") == 200
    assert {phase: value(found, "mira_phase_seconds_total", phase=phase) for phase in PHASES} == {
        "prepare": 0.75, "train": 7.0, "aggregate": 0.0, "measure": 1.0,
    }  # fmt: skip
    of = {
        name: [value(found, "mira_site_replies_total", site=name, outcome=each) for each in OUTCOMES] for name in "ab"
    }
    assert of == {"a": [2, 0, 0, 0, 0], "b": [0, 1, 0, 0, 1]}, "accepted, late, offline, failed, rejected"
    name = "mira_site_rejected_replies_total"
    assert {(site, kind) for site in "ab" for kind in REJECTIONS if value(found, name, site=site, reason=kind)} == {
        ("b", "norm")
    }
    assert [value(found, "mira_site_counted_ratio", site=site) for site in "ab"] == [1.25, 0.375]
    assert [value(found, "mira_site_doubted_rounds_total", site=site) for site in "ab"] == [0, 1]
    assert value(found, "mira_site_adapter_bytes_total", site="a", direction="up") == 40
    assert value(found, "mira_site_adapter_bytes_total", site="b", direction="down") == 20
    assert value(found, "mira_loss", split="train") == 2.0
    assert value(found, "mira_loss", split="validation") == 3.5, "of the last round that was measured"
    assert value(found, "mira_site_privacy_epsilon", site="a") == 1.5
    assert value(found, "mira_site_online", site="a") == 1
    assert value(found, "mira_site_online", site="b") == 0
    assert value(found, "mira_certificate_expiry_timestamp_seconds", certificate="ca") == END.timestamp()
    assert value(found, "mira_site_admission_expiry_timestamp_seconds", site="b") == END.timestamp()
    assert time.time() - value(found, "mira_last_round_timestamp_seconds") < 60
    assert value(found, "process_resident_memory_bytes") > 2**20


def test_labels_are_names_of_this_federation_alone() -> None:
    """Whoever signed a request once and is admitted no more has no series."""
    run = watch(RECORDS)
    sites = {dict(labels).get("site") for _, labels in samples(run)}
    assert sites == {None, "a", "b"}
    assert {name for name, _ in samples(RunWatch())} <= {name for name, _ in samples(run)}


def test_counters_are_there_from_the_start() -> None:
    """Prometheus sees no increase where a series begins with 1."""
    found = samples(RunWatch())
    for name in "ab":
        assert [value(found, "mira_site_replies_total", site=name, outcome=each) for each in OUTCOMES] == [0] * 5
        assert value(found, "mira_site_rejected_replies_total", site=name, reason="norm") == 0
        assert value(found, "mira_site_doubted_rounds_total", site=name) == 0


def test_losses_that_sites_do_not_tell_count_as_none() -> None:
    assert totals([{**RECORDS[1], "train_loss": {"a": None, "b": 2.0}}]).train_loss == 2.0
    assert totals([{**RECORDS[1], "train_loss": {"a": None}}]).train_loss is None


def test_a_record_of_an_earlier_version_counts() -> None:
    old = {key: value for key, value in RECORDS[1].items() if key not in ("lost_kind", "phase_seconds")}
    found = totals([old])
    assert found.replies == {("a", "accepted"): 1, ("b", "failed"): 1}
    assert found.seconds == {}
    assert outcome_of("a word of a later version") == "failed"


def test_sums_do_not_change_what_they_came_from() -> None:
    before = totals(RECORDS[:2])
    copy = replace(before)
    assert before.after(RECORDS[2]) != before == copy
    assert Totals() == totals([])


@pytest.mark.parametrize(
    ("changes", "begun", "reason"),
    [
        ({}, True, None),
        ({}, False, "1 of 2 sites are online; the start of the run needs 2"),
        ({"online": lambda: {"a", "b"}}, False, None),
        ({"online": lambda: set()}, True, "0 of 2 sites are online; a round needs 1"),
        ({"online": lambda: {"stranger"}}, True, "0 of 2 sites are online; a round needs 1"),
        ({"trouble": lambda: "the SuperLink has ended"}, True, "the SuperLink has ended"),
    ],
)
def test_health_has_the_reason(changes: dict[str, Any], begun: bool, reason: str | None) -> None:
    run = RunWatch(folder=Path("run") if begun else None, places=frozenset("ab"))
    federation = replace(FEDERATION, **changes)
    found = health(run, federation)
    assert (found.reason, found.well) == (reason, reason is None)
    assert value(samples(run, federation), "mira_healthy") == (reason is None)


def test_sites_that_come_later_are_not_waited_for() -> None:
    assert health(RunWatch(expected=("b",)), FEDERATION).well
    assert not health(RunWatch(expected=("a",)), FEDERATION).well


def test_the_watch_knows_the_run_once_it_begins(tmp_path: Path) -> None:
    data = {"source": "sites", "examples": {"a": 4, "b": 4}, "expected": ["c"]}
    write_run(tmp_path / "run", ["a", "b", "c"], [""] * 3, data=data)
    began: list[Path] = []
    run = RunWatch(began=began.append)
    run.start(tmp_path / "run", 3, 3, 0)
    assert (run.folder, run.rounds, run.places, began) == (tmp_path / "run", 3, {*"abc"}, [tmp_path / "run"])
    run.stage("measuring the start")
    assert run.doing == "measuring the start"
    run.earlier(RECORDS[0])
    assert run.doing == "training"


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False), ("::ffff:10.0.0.1", False), ("evil.example", False), ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False), ("", False), ("0.0.0.0", False),
    ],
)  # fmt: skip
def test_what_is_this_machine(host: str, here: bool) -> None:
    assert is_here(host) is here


# The files for Prometheus and Grafana.


def expressions(values: Any, keys: tuple[str, ...]) -> list[str]:
    """All texts under ``keys``, at any depth."""
    if isinstance(values, list):
        return [found for each in values for found in expressions(each, keys)]
    if not isinstance(values, dict):
        return []
    here = [text for key, text in values.items() if key in keys and isinstance(text, str)]
    return here + [found for each in values.values() for found in expressions(each, keys)]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:mira|process)_[a-z_]+\b", re.sub(r'"[^"]*"', "", expression)))


@pytest.mark.parametrize(("file", "keys", "least"), [(DASHBOARD, ("expr", "definition"), 16), (ALERTS, ("expr",), 10)])
def test_dashboard_and_alert_rules_name_metrics_that_exist(file: Path, keys: tuple[str, ...], least: int) -> None:
    text = file.read_text(encoding="utf-8")
    read: Any = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    found, federation = expressions(read, keys), replace(FEDERATION, superlink=lambda: 1)
    known = {name for name, _ in samples(watch(RECORDS), federation)}
    assert len(found) >= least
    assert [(e, sorted(metrics_in(e) - known)) for e in found if metrics_in(e) - known] == []
    assert metrics_in("rate(mira_no_such_total[5m])") - known, "the test sees a wrong name"


def test_the_page_lists_every_metric() -> None:
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    found = {name for name, _ in samples(watch(RECORDS)) if name.startswith("mira_")}
    assert sorted(found - set(re.findall(r"`(mira_[a-z_]+)`", text))) == []
