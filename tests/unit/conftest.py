"""What two files of unit tests each start from; the rest is in tests/conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.sample_config import write_clients, write_config
from helpers.sample_run_folder import commit, create


@pytest.fixture
def file(tiny_folder: Path, tmp_path: Path) -> Path:
    """The configuration of a small run, with data of its own."""
    return write_config(tmp_path / "config.yaml", tiny_folder, write_clients(tmp_path / "data.jsonl"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed run of three rounds: row 1 written in rounds 1 and 2, best round 1."""
    with create(tmp_path / "run") as store:
        commit(store, 0, {}, 3.0)
        commit(store, 1, {1: 1.0, 2: 1.5}, 1.0, c=torch.ones(2))
        commit(store, 2, {1: 2.0}, 2.0)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's kit and that of its site a. Read only: tests share it."""
    from mira.fleet.identity import kit

    base = tmp_path_factory.mktemp("kits")
    kit.make_server(base / "server", "127.0.0.1:9443", days=2)
    kit.make_site(base / "server", "a", base / "a")
    return base
