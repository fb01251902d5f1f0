"""A site that lies over TLS, in real processes: the server counts it for little, and names it in log, metrics and report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'mira-fl[flower]'")

from helpers.federation_processes import NAMES, PATIENCE, Federation, free_port, write_data
from helpers.sample_config import mira, settings
from mira.fleet.identity import kit

pytestmark = pytest.mark.slow

LIAR = "liar"
LYING = """\
import sys
if "mira.fleet.site.worker" in sys.orig_argv:
    from dataclasses import replace
    from mira.engine.batched import BatchedEngine
    train = BatchedEngine.train
    def lie(self, work, round, lr):
        done = train(self, work, round, lr)
        return replace(done, rows=work.start[done.job] - 5 * (done.rows - work.start[done.job]))
    BatchedEngine.train = lie
"""


def test_a_site_that_turns_its_adapter_around_is_named_and_counts_for_little(tiny_folder: Path, tmp_path: Path) -> None:
    """Five times an ordinary displacement passes the server's norm bound of ten times the median."""
    port = free_port()
    federation = Federation(tmp_path, port, port)
    kit.make_server(tmp_path / "server-kit", f"127.0.0.1:{port}", days=2)
    for k, name in enumerate([*NAMES, LIAR]):
        federation.issue(name)
        write_data(tmp_path, k, name)
    plan = settings(
        tiny_folder, tmp_path / "all", engine={"threads": 1, "tokens_per_pass": 1}, graph={"name": "complete"}, rounds=2,
        evaluation={"generate": False, "transfer_clients": 0, "every": 2}, server={"robust": "clip"},
    )  # fmt: skip
    plan["data"] = {"source": "jsonl", "path": str(tmp_path / "all")}
    (tmp_path / "c.yaml").write_text(json.dumps(plan))
    (tmp_path / "lying").mkdir()
    (tmp_path / "lying" / "sitecustomize.py").write_text(LYING)
    path = os.pathsep.join([str(tmp_path / "lying"), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        federation.server("server", "c.yaml", "--out", "run")
        for name in NAMES:
            federation.site(name)
        federation.site(LIAR, PYTHONPATH=path)
        assert federation.started["server"].wait(PATIENCE) == 0, federation.log_tail()
    finally:
        federation.stop(*federation.started)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    assert [record["lost"] for record in records] == [{}, {}]
    for record in records:
        assert record["counted"][LIAR] < 0.3
        assert min(record["counted"][name] for name in NAMES) > 0.8
    assert f"round 1 doubts {LIAR}: its adapter counted for" in federation.log("server")
    assert mira("report", tmp_path / "run").status == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Defence</h2>" in page
    assert f'<th scope="row">{LIAR}</th><td>1–2</td>' in page
