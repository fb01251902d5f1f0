"""A site that lies over TLS, in real processes: the server counts it for little or not at all, and says so everywhere; the others
train on, one behind a proxy and one with a new key."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

pytest.importorskip("flwr", reason="needs Flower: pip install 'mira-fl[flower]'")

from prometheus_client.parser import text_string_to_metric_families

from helpers.federation_processes import NAMES, PATIENCE, Federation, free_port, write_data
from helpers.sample_config import mira, settings
from helpers.tunnel import tunnel
from helpers.wrong_replies import GO, LIAR, ROUNDS, TURNED, WAITS, WRONG, kept
from mira.fleet.identity import join, kit, registry
from mira.fleet.monitor.totals import REJECTIONS

pytestmark = pytest.mark.slow


def test_a_site_that_lies_in_each_round_is_named_and_harms_nobody(tiny_folder: Path, tmp_path: Path) -> None:
    """Five times an ordinary displacement, turned around, passes the server's norm bound of ten times the median: the defence has
    it count for little. All other lies are rejected."""
    assert set(WRONG) == set(REJECTIONS)
    port, watched = free_port(), free_port()
    federation = Federation(tmp_path, port, port)
    kit.make_server(tmp_path / "server-kit", f"127.0.0.1:{port}", days=2)
    for k, name in enumerate([*NAMES, LIAR]):
        federation.issue(name)
        write_data(tmp_path, k, name)
    plan = settings(
        tiny_folder, tmp_path / "all", engine={"threads": 1, "tokens_per_pass": 1}, graph={"name": "complete"},
        rounds=ROUNDS, evaluation={"generate": False, "transfer_clients": 0, "every": ROUNDS}, server={"robust": "clip"},
    )  # fmt: skip
    plan["data"] = {"source": "jsonl", "path": str(tmp_path / "all")}
    (tmp_path / "c.yaml").write_text(json.dumps(plan))
    path = kept(tmp_path / "lying")
    with ExitStack() as stack:
        proxy = stack.enter_context(tunnel(tmp_path))  # one that asks for no password
        stack.callback(lambda: federation.stop(*federation.started))
        federation.server("server", "c.yaml", "--out", "run", "--metrics", watched)
        federation.site(NAMES[0], HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}", NO_PROXY="", no_proxy="")
        federation.site(NAMES[1])
        for name in (WAITS, LIAR):
            federation.site(name, PYTHONPATH=path)
        federation.until("server", f"round {ROUNDS - 1}/{ROUNDS}")
        told_while_it_runs(federation, watched)
        replaced_amid_a_round(federation)
        assert federation.started["server"].wait(PATIENCE) == 0, federation.log_tail()
        assert set(proxy.lines) - {"502"} == {f"127.0.0.1:{port}"}  # 502: before the server listened
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    named(records)
    assert f"round 1 doubts {LIAR}: its adapter counted for" in federation.log("server")
    assert mira("report", tmp_path / "run").status == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Defence</h2>" in page
    assert f'<th scope="row">{LIAR}</th><td>1–2' in page, "and of the last round, where it is still far from the others"
    for name in NAMES:
        file = tmp_path / f"{name}-state" / "adapter" / "adapter_model.safetensors"
        assert file.read_bytes() == (tmp_path / "run" / "adapters" / name / file.name).read_bytes()
        tensors = load_file(file)
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        assert all(float(tensor.abs().max()) > 0 for key, tensor in tensors.items() if "lora_B" in key), (
            "it was trained"
        )
        losses = [record["train_loss"][name] for record in records]
        assert sum(losses[-3:]) < sum(losses[:3])
    assert federation.log(WAITS).count(f"trains in round {ROUNDS}\n") == 2, "the request was sent once more"
    keys = [entry for entry in registry.read_registry(tmp_path / "server-kit")[1] if entry.name == WAITS]
    assert [entry.revoked is None for entry in keys] == [False, True]


def named(records: list[dict[str, Any]]) -> None:
    """The records say of each round what became of each reply."""
    assert [record["lost_kind"] for record in records] == [
        *[{}] * TURNED, *[{LIAR: kind} for kind in WRONG], {},
    ]  # fmt: skip
    for record in records:
        assert set(record["train_loss"]) == {*NAMES, LIAR} - set(record["lost"])
    for record in records[:TURNED]:
        assert record["counted"][LIAR] < 0.3
        assert min(record["counted"][name] for name in NAMES) > 0.8


def told_while_it_runs(federation: Federation, port: int) -> None:
    """Metrics and status name each lie, and nobody else."""
    with httpx.Client(trust_env=False, timeout=PATIENCE) as client:
        text = client.get(f"http://127.0.0.1:{port}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    rejected = {
        (sample.labels["site"], sample.labels["reason"]): sample.value
        for sample in samples if sample.name == "mira_site_rejected_replies_total"
    }  # fmt: skip
    assert rejected == {(name, kind): float(name == LIAR) for name in (*NAMES, LIAR) for kind in WRONG}
    status = mira("server", "status", federation.folder / "server-kit").out
    assert "rejected replies: " + ", ".join(f"{LIAR} 1 × {kind}" for kind in sorted(WRONG)) in status


def replaced_amid_a_round(federation: Federation) -> None:
    """The key of the site that trains is replaced, and then it goes on."""
    federation.until(WAITS, f"trains in round {ROUNDS}\n")
    site = federation.folder / f"{WAITS}-kit"
    federation.admit(join.join_again(site), site)
    federation.until(WAITS, "goes on with its new key")
    (federation.folder / GO).touch()
