"""Private sites over TLS, in real processes: one is killed amid its training, and pays for the round twice; others insist on more
than the run gives."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'mira-fl[flower]'")
pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")

from helpers.federation_processes import MIRA, PATIENCE, Federation, free_port, processes, write_data
from helpers.sample_config import mira, settings
from mira.fleet.identity import kit
from mira.fleet.site.state import SiteState

pytestmark = pytest.mark.slow

KILLED, STRICT, COSTLY, LOOSE = "killed", "strict", "costly", "loose"
INSISTS = {
    STRICT: ("--privacy-metrics", "none"), COSTLY: ("--max-epsilon", 2), LOOSE: ("--max-epsilon", 8, "--max-delta", 1e-6),
}  # fmt: skip
REFUSED = {
    STRICT: r"privacy\.metrics=noised tells too much: it takes part only in runs with none",
    COSTLY: r"epsilon=(8|7\.9\d) is too much: it takes part up to 2",
    LOOSE: r"privacy\.delta=1e-05 is too large for --max-epsilon: it takes part up to 1e-06; .* --max-delta here",
}
ROUNDS, STEPS = 3, 2
HANGS = "hangs"  # the file that says so, in the folder of the federation
HANGING = f"""\
import sys
if "mira.fleet.site.worker" in sys.orig_argv:
    import time
    from pathlib import Path
    from mira.engine.batched import BatchedEngine
    train = BatchedEngine.train
    def once(self, work, round, lr):
        if round == 1 and not Path("{HANGS}").exists():
            Path("{HANGS}").touch()
            time.sleep({PATIENCE})
        return train(self, work, round, lr)
    BatchedEngine.train = once
"""


def start_site(federation: Federation, name: str, *options: object, **environment: str) -> None:
    own = ("--kit", f"{name}-kit", "--data", f"{name}.yaml", "--state", f"{name}-state", "--threads", 1)
    federation.start(name, *MIRA, "client", *own, *options, **environment)


def counted(federation: Federation, name: str) -> int:
    """The private steps in the account on a site's disk."""
    [folder] = (federation.folder / f"{name}-state").glob("[0-9a-f]" * 16)
    told = SiteState(folder).noted("releases")
    assert told is not None
    return int(told["count"])


def kill_amid_a_round(federation: Federation) -> None:
    """Kill -9 of Flower's app, so that the server asks again those that have not answered, and of the worker that trains."""
    end = time.monotonic() + PATIENCE
    while not (federation.folder / HANGS).exists():
        assert time.monotonic() < end, federation.log_tail()
        time.sleep(0.1)
    server = federation.held("server").name
    for entry in [entry for entry, line in processes() if "flwr-serverapp" in line]:
        with suppress(OSError):  # another's process, or one that has ended
            if server in (entry / "environ").read_bytes().decode(errors="replace"):
                os.kill(int(entry.name), signal.SIGKILL)
    federation.until("server", "Flower's app on the server went away")
    [worker] = re.findall(r"worker is ready \(process (\d+)\)", federation.log(KILLED))
    os.kill(int(worker), signal.SIGKILL)


def test_a_site_killed_amid_a_round_pays_twice_and_leaves_when_its_budget_is_spent(
    tiny_folder: Path, tmp_path: Path
) -> None:
    port = free_port()
    federation = Federation(tmp_path, port, port)
    kit.make_server(tmp_path / "server-kit", f"127.0.0.1:{port}", days=2)
    for name in (KILLED, *INSISTS):
        federation.issue(name)
        write_data(tmp_path, 0, name)
    plan = settings(
        tiny_folder, tmp_path / "all", engine={"threads": 1, "tokens_per_pass": 1}, graph={"name": "complete"}, rounds=ROUNDS,
        training={"local_steps": STEPS}, evaluation={"generate": False, "transfer_clients": 0, "every": ROUNDS},
        privacy={"unit": "example", "epsilon": 8.0, "clip": 0.5, "metrics": "noised", "metrics_noise": 20.0},
    )  # fmt: skip
    plan["data"] = {"source": "sites", "expected": list(INSISTS)}
    (tmp_path / "c.yaml").write_text(json.dumps(plan))
    (tmp_path / "hanging").mkdir()
    (tmp_path / "hanging" / "sitecustomize.py").write_text(HANGING)
    path = os.pathsep.join([str(tmp_path / "hanging"), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        federation.server("server", "c.yaml", "--out", "run")
        for name, options in INSISTS.items():
            start_site(federation, name, *options)
        for name in INSISTS:
            federation.until("server", f"online: .*{name}")
        start_site(federation, KILLED, "--max-epsilon", 8, "--privacy-metrics", "noised", PYTHONPATH=path)
        kill_amid_a_round(federation)
        assert counted(federation, KILLED) == 2 * STEPS, "before any of them was done"
        assert federation.started["server"].wait(PATIENCE) == 0, federation.log_tail()
    finally:
        federation.stop(*federation.started)

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    account = [record["privacy"].get(KILLED) for record in records]
    assert [told["steps"] for told in account] == [0, STEPS, 3 * STEPS, 3 * STEPS]
    assert 7.5 < account[-1]["epsilon"] <= 8
    lost = [record["lost"] for record in records[1:]]
    last = lost[-1]
    assert last.pop(KILLED) == "privacy.epsilon=8 is spent"
    for each in lost:
        assert each.keys() == INSISTS.keys()
        assert all(
            reason in (last[name], "it was not waited for") for name, reason in each.items()
        )  # that of a busy site
    said = " ".join(federation.log("server").split())
    for name, reason in last.items():
        assert re.fullmatch(REFUSED[name], reason)
        assert f"open: {reason}" in federation.log(name)
        assert f"lost {name}: {reason}" in said
    assert counted(federation, KILLED) == ROUNDS * STEPS
    assert [record["train_loss"] for record in records[1:]] == [{KILLED: None}, {KILLED: None}, {}]
    assert records[-1]["clients"][KILLED]["validation_loss"] >= 0
    log = federation.log(KILLED)
    [own] = re.findall(rf"privacy: after {ROUNDS * STEPS} steps its adapters are \((.*), 1e-05\)", log)
    assert 7.5 < float(own) <= account[-1]["epsilon"], "the server's is a bound for all sites"
    assert f"round {ROUNDS}: privacy.epsilon=8 is spent" in log
    assert log.count("the worker is ready") == 2
    shown = mira("server", "status", tmp_path / "server-kit").out
    assert re.search(rf"^{KILLED} .* 2 +0 +0 +1 +0 .* {account[-1]['epsilon']:.3g} ", shown, flags=re.MULTILINE), shown
    assert re.search(rf"^{STRICT} .* 0 +0 +0 +3 +0 .* – ", shown, flags=re.MULTILINE), shown
