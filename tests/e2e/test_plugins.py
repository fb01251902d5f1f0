"""A package of plug-ins (tests/plugin_package) in a fresh environment: run, kill, resume, compare, report, server.

The environment of these tests does not have the package: it stands for a machine where it is missing, and for sites.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.federation_processes import Federation
from helpers.fresh_environment import ROOT, build, call, environment
from helpers.sample_config import Ended, lasting, mira, outcome, settings, write_clients
from mira.fleet.flower.superlink import free_port
from mira.fleet.identity import kit

PACKAGE = ROOT / "tests" / "plugin_package"
PATIENCE = 300.0  # seconds; usually it takes a few
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with MIRA and the package of plug-ins."""
    out = tmp_path_factory.mktemp("dist")
    build(ROOT, out, tmp_path_factory.mktemp("mira"), "--wheel")
    build(PACKAGE, out, tmp_path_factory.mktemp("plugins"), "--wheel")
    return environment(tmp_path_factory.mktemp("with-plugins"), *out.glob("*.whl"), extras=("flower",))


def plugged(model: Path, **sections: Any) -> dict[str, Any]:
    """An experiment of four plug-ins."""
    values = settings(model, Path("unused"), rounds=4, **sections)
    named = {"method": {"name": "half-way", "step": 0.25}, "graph": {"name": "ring"}, "adapter": {"kind": "ia3"}}
    return values | {"data": {"source": "sums"}} | named


def commands(python: Path, folder: Path, *lines: Sequence[object]) -> list[Ended]:
    """The ends of commands of MIRA, one after another in one process of the environment: its imports take seconds."""
    program = (
        "import json, sys; from dataclasses import astuple; from helpers.sample_config import mira\n"
        "print(json.dumps([astuple(mira(*words)) for words in json.loads(sys.argv[1])]))"
    )
    around = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    words = json.dumps([[str(word) for word in line] for line in lines])
    done = subprocess.run([python, "-c", program, words], cwd=folder, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Ended(*each) for each in json.loads(done.stdout)]


@pytest.fixture
def file(tiny_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(plugged(tiny_folder)), encoding="utf-8")
    return path


def test_none_of_the_plug_ins_is_over_forty_lines() -> None:
    modules = sorted((PACKAGE / "mira_example").glob("*.py"))
    assert len(modules) == 5
    assert all(len(module.read_text(encoding="utf-8").splitlines()) <= 40 for module in modules)


def test_its_own_tests_pass_here(python: Path) -> None:
    """The contracts of ``mira.testing`` hold in the package's own environment, without pytest."""
    program = (
        "import sys; from mira.testing import *; from mira_example import adapter, graph, method, source\n"
        "checks = [*method_checks(method.HalfWay()), *graph_checks(graph.Ring()), *source_checks(source.Sums()),"
        " *adapter_checks(adapter.Ia3())]\n"
        "[check() for check in checks]; print(len(checks)); sys.exit('pytest' in sys.modules)"
    )
    assert int(call(python, "-W", "ignore", "-c", program, cwd=python.parent).splitlines()[-1]) > 20


def test_the_schema_and_the_check_know_them(python: Path, file: Path) -> None:
    wrong = file.with_name("wrong.yaml")
    wrong.write_text(file.read_text().replace("step: 0.25", "stp: 0.25"))
    shown, checked, refused = commands(
        python, file.parent, ["config", "schema"], *(["config", "check", each] for each in (file, wrong))
    )
    schema = json.loads(shown.out)
    for section, name in (("method", "half-way"), ("graph", "ring"), ("data", "sums"), ("adapter", "ia3")):
        assert name in schema["properties"][section]["discriminator"]["mapping"]
    assert "step" in schema["$defs"]["HalfWay"]["properties"]
    assert "4 rounds of half-way" in checked.out
    assert refused.error == "method.stp: unknown key; did you mean 'step'?"


def test_a_killed_run_goes_on_to_the_same_end(python: Path, file: Path, tmp_path: Path) -> None:
    command = python.parent / "mira"
    whole = json.loads(call(command, "run", file, "--out", "whole", "--json", cwd=tmp_path))
    assert whole["method"] == "half-way"
    assert whole["local_loss"] < whole["local_loss_start"]

    killed = subprocess.Popen([command, "run", file, "--out", "killed"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    metrics, end = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()

    environment = json.loads((tmp_path / "killed" / "environment.json").read_text())
    recorded = environment["plugins"]["method"]
    assert (recorded["package"], recorded["version"]) == ("mira-example-plugins", "0.3.0")
    assert set(environment["plugins"]) == {"method", "graph", "data", "adapter"}

    missing = mira("run", tmp_path / "killed", "--resume").error
    assert "mira-example-plugins 0.3.0, which is not installed; pip install 'mira-example-plugins==0.3.0'" in missing
    assert mira("runs", tmp_path).status == 0

    resumed = json.loads(call(command, "run", "killed", "--resume", "--json", cwd=tmp_path))
    assert lasting(resumed) | {"run": "", "clients": []} == lasting(whole) | {"run": "", "clients": []}
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")

    *_, exported = each = commands(
        python, tmp_path, ["evaluate", "killed"], ["report", "killed"], ["export", "killed", "--client", "plus"]
    )
    assert [ended.status for ended in each] == [0, 0, 0], each
    assert "half-way" in (tmp_path / "killed" / "report.html").read_text(encoding="utf-8")
    folder = tmp_path / exported.out.splitlines()[0]
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "IA3"


def test_a_comparison(python: Path, tiny_folder: Path, tmp_path: Path) -> None:
    values = {
        "experiment": plugged(tiny_folder, evaluation={"generate": False}) | {"rounds": 1}, "seeds": [0, 1],
        "entries": {"Local": {"method.name": "local"}, "Half way": {"method.step": 0.5}, "Own": {"method.name": "half-way"}},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    compared, reported = commands(python, tmp_path, ["compare", "c.yaml", "--out", "c", "--json"], ["report", "c"])
    assert compared.status == 0, compared
    assert [entry["name"] for entry in json.loads(compared.out)["entries"]] == ["Local", "Half way", "Own"]
    assert reported.status == 0, reported


def test_over_machines_the_server_alone_needs_the_method(python: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Method and graph are the server's; sites run without the package."""
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    names = ("north", "south")
    gate = free_port()
    federation = Federation(tmp_path, gate, gate)
    kit.make_server(tmp_path / "server-kit", f"127.0.0.1:{gate}", days=2)
    data = write_clients(tmp_path / "data.jsonl", names)
    for name in names:
        federation.issue(name)
        section = {"source": "jsonl", "path": str(data), "client_column": "client"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"data": section}))
    values = settings(tiny_folder, data, rounds=2, evaluation={"generate": False})
    values |= {"data": {"source": "sites"}, "method": {"name": "half-way"}, "graph": {"name": "ring"}}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        federation.start(
            "server", python.parent / "mira", "server", "fleet.yaml", "--kit", "server-kit", "--out", "run", "--json",
            PATH=f"{python.parent}:{os.environ['PATH']}",
        )  # fmt: skip
        for name in names:
            federation.site(name)
        assert federation.started["server"].wait(PATIENCE) == 0, federation.log_tail()
    finally:
        federation.stop(*(name for name in federation.started if federation.started[name].poll() is None))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["method"] == "half-way"
    assert [client["name"] for client in result["clients"]] == list(names)
    assert result["local_loss"] < result["local_loss_start"]
