"""A comparison that is continued on a machine of another kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from helpers.sample_config import mira, settings, write_clients
from mira.comparison import machines


def test_a_machine_of_another_kind_begins_no_run_of_a_comparison(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = settings(tiny_folder, write_clients(tmp_path / "data.jsonl"), rounds=1, evaluation={"generate": False})
    values = {"experiment": experiment, "seeds": [0], "entries": {"Local": {"method.name": "local"}, "MIRA": {}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = ("compare", tmp_path / "c.yaml", "--out", tmp_path / "o", "--workers", "1")
    assert mira(*command).status == 0
    missing = next(tmp_path.glob("o/runs/mira/*"))
    shutil.rmtree(missing)
    known = machines.machine()
    with monkeypatch.context() as patched:
        patched.setattr(machines, "machine", lambda: known | {"processor": "Odd"})
        refused = mira(*command).error
        assert refused.startswith(f"this machine: processor is Odd, but {known['processor']} in the other runs")
        assert not missing.exists()
    again = mira(*command)
    assert again.status == 0, again.err
    assert missing.exists()
