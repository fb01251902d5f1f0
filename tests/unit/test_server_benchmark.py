"""The server's benchmark runs the real loop, method and store: here for few clients, so that it does not fall behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.server import Server

from mira.core.graph import Groups
from mira.methods.mira import Mira

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", [Mira(strength=0.5), Mira(strength=0.5, neighbours="all")])
def test_rounds_are_played_on_disk_and_gone_on_with(method: Mira, tmp_path: Path) -> None:
    graph = Groups(torch.arange(200) % 20)
    server = Server.create(tmp_path / "run", method, graph, torch.arange(5))
    server.play()
    server.store.close()
    server = Server.resume(tmp_path / "run", method)
    server.play()
    assert server.state.round == 2
    records = server.store.metrics()
    assert [len(record.get("cohort", ())) for record in records] == [0, 100, 100]
    trained = [int(name.split()[1]) for name in records[-1]["cohort"]]
    assert bool(server.store.rows()[torch.tensor(trained)].any(dim=1).all()), "every row of the cohort has moved"
    server.store.close()
