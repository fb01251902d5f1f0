"""The server of a private site is killed amid a round: neither the site's account nor the server's goes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'mira-fl[flower]'")
pytest.importorskip("dp_accounting", reason="needs the extra 'privacy'")

from helpers.federation_processes import NAMES, PATIENCE, Federation, free_port, write_data
from helpers.sample_config import settings
from mira.fleet.identity import kit
from mira.fleet.site.state import SiteState

pytestmark = pytest.mark.slow

ROUNDS, STEPS = 2, 2
TRAINS, GO = "trains", "go"  # files in the folder of the federation: the last round trains; it may end
WAITING = f"""\
import sys
if "mira.fleet.site.worker" in sys.orig_argv:
    import time
    from pathlib import Path
    from mira.engine.batched import BatchedEngine
    train = BatchedEngine.train
    def wait(self, work, round, lr):
        if round == {ROUNDS - 1}:
            Path("{TRAINS}").touch()
            end = time.monotonic() + {PATIENCE}
            while not Path("{GO}").exists() and time.monotonic() < end:
                time.sleep(0.05)
        return train(self, work, round, lr)
    BatchedEngine.train = wait
"""


def counted(federation: Federation, name: str) -> int:
    """The private steps in the account on a site's disk."""
    [folder] = (federation.folder / f"{name}-state").glob("[0-9a-f]" * 16)
    told = SiteState(folder).noted("releases")
    assert told is not None
    return int(told["count"])


def test_no_step_is_forgotten_when_the_server_is_killed_amid_a_round(tiny_folder: Path, tmp_path: Path) -> None:
    port, name = free_port(), NAMES[0]
    federation = Federation(tmp_path, port, port)
    kit.make_server(tmp_path / "server-kit", f"127.0.0.1:{port}", days=2)
    federation.issue(name)
    write_data(tmp_path, 0, name)
    plan = settings(
        tiny_folder, tmp_path / "all", engine={"threads": 1, "tokens_per_pass": 1}, graph={"name": "complete"}, rounds=ROUNDS,
        training={"local_steps": STEPS}, evaluation={"generate": False, "transfer_clients": 0, "every": ROUNDS},
        privacy={"unit": "example", "noise": 1.0, "clip": 0.5},
    )  # fmt: skip
    plan["data"] = {"source": "sites"}
    (tmp_path / "c.yaml").write_text(json.dumps(plan))
    (tmp_path / "waiting").mkdir()
    (tmp_path / "waiting" / "sitecustomize.py").write_text(WAITING)
    path = os.pathsep.join([str(tmp_path / "waiting"), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        federation.server("server", "c.yaml", "--out", "run")
        federation.site(name, PYTHONPATH=path)
        end = time.monotonic() + PATIENCE
        while not (tmp_path / TRAINS).exists():
            assert time.monotonic() < end, federation.log_tail()
            time.sleep(0.1)
        federation.started["server"].send_signal(signal.SIGKILL)
        federation.started["server"].wait()
        shutil.rmtree(federation.held("server"))  # with SIGKILL nobody else does
        assert counted(federation, name) == 2 * STEPS, "before any of them was done"
        (tmp_path / GO).touch()  # its reply finds nobody
        federation.server("again", "--resume", "run")
        assert federation.started["again"].wait(PATIENCE) == 0, federation.log_tail()
    finally:
        federation.stop(*federation.started)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    account = [record["privacy"][name] for record in records]
    assert [told["steps"] for told in account] == [0, STEPS, 3 * STEPS], "the last round was trained and paid for twice"
    assert [told["epsilon"] for told in account] == sorted({told["epsilon"] for told in account}), "it only rises"
    assert [record["lost"] for record in records[1:]] == [{}, {}]
    assert counted(federation, name) == 3 * STEPS
