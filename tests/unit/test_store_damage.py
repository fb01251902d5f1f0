"""The run folder after a kill at every instant, on disks that fail, and with files that are broken, foreign or missing.

What is read where all goes well is in test_store_commits.py.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from helpers import store_kill_program as scenario
from helpers.sample_run_folder import P, commit, create, fingerprint, names, row
from mira.core.errors import UserError
from mira.store import Store, files


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 0, 1, 2, …: number n holds the scenario's run, killed at its n-th instant; "whole" was never killed."""
    base = tmp_path_factory.mktemp("crashes")
    path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-m", scenario.__name__, str(base)], check=True, timeout=300, env=path)
    return base


@pytest.mark.slow
def test_a_run_killed_at_any_instant_goes_on_bit_for_bit(crashes: Path) -> None:
    whole = fingerprint(crashes / "whole")
    prefixes = json.loads((crashes / "prefixes.json").read_text())
    killed = sorted((path for path in crashes.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    assert len(killed) > 100
    seen = set()
    for folder in killed:
        created = (folder / "store.json").exists()
        if created:
            with Store.open(folder, writable=False) as store:
                seen.add(store.last_round)
                assert scenario.content(store) == prefixes[str(store.last_round)], folder
        with Store.open(folder) if created else scenario.create(folder) as store:
            seen.add(store.last_round)
            assert scenario.content(store) == prefixes[str(store.last_round)], folder
            assert not [path for path in folder.rglob("*.tmp") if created], folder
            scenario.proceed(store)
        assert fingerprint(folder) == whole, folder
    assert seen == {None, 0, 1, 2, 3}


def test_a_run_that_lost_its_manifest_is_not_taken_for_an_interrupted_creation(folder: Path) -> None:
    (folder / "store.json").unlink()
    with pytest.raises(UserError, match="not empty"):
        create(folder)


@pytest.mark.parametrize("fail_at", range(6))  # row, row, folder of rows, extra … record, folder of records
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_the_former_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, code: int
) -> None:
    before = fingerprint(folder)
    calls = iter(range(100))
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if next(calls) == fail_at:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    with Store.open(folder) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with pytest.raises(UserError, match=f"cannot be written .{os.strerror(code)}.*--resume"):
                commit(store, 3, {1: 3.0, 3: 3.0}, 0.1, c=torch.zeros(2))
        assert fingerprint(folder) == before
        assert (store.last_round, store.best_round) == (2, 1)
        commit(store, 3, {1: 3.0, 3: 3.0}, 0.1)
        assert row(store, 3) == 3


def test_a_full_disk_at_creation_leaves_a_folder_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="free some space, then start again; no run was created"):
            create(tmp_path / "run")
    create(tmp_path / "run").close()


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"7" + path.read_bytes()[-8:]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "config.yaml", "environment.json", "graph.safetensors", "start.safetensors", "rounds/000001.json",
        "rows/000001.r000001.safetensors", "rows/000001.r000002.safetensors", "extra/000000.r000001.safetensors",
    ],
)  # fmt: skip
@pytest.mark.parametrize("writable", [True, False])
def test_a_damaged_file_is_named_and_nothing_is_overwritten(
    folder: Path, name: str, damage: str, writable: bool
) -> None:
    if name == "config.yaml" and damage == "flipped":
        (folder / name).write_text("seed: 1\n")
    else:
        DAMAGE[damage](folder / name)
    before = fingerprint(folder)
    with pytest.raises(UserError, match=f"{folder / name}: corrupt checkpoint .*; restore it or start a new run"):
        read_all(folder, writable)
    assert fingerprint(folder) == before


def read_all(folder: Path, writable: bool) -> None:
    with Store.open(folder, writable) as store:
        assert store.config()
        assert store.environment()
        assert store.graph()
        everything = torch.arange(store.num_rows)
        for as_of in (1, 2):
            assert len(store.rows(as_of)[everything])
            assert store.extra(as_of)


def test_a_damaged_manifest_is_named(folder: Path) -> None:
    text = (folder / "store.json").read_text()
    (folder / "store.json").write_text(text.replace('"num_rows": 4', '"num_rows": 5'))
    with pytest.raises(UserError, match=r"store\.json: corrupt checkpoint"):
        Store.open(folder)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"validation_loss": NaN}', "\udc80", '{"round": 1}'])
def test_a_hostile_record_is_an_error_for_the_user(folder: Path, text: str) -> None:
    (folder / "rounds/000001.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"rounds/000001\.json: corrupt checkpoint"):
        Store.open(folder)


def test_a_well_sealed_record_of_the_wrong_form_is_refused(folder: Path) -> None:
    (folder / "rounds/000001.json").write_bytes(files.seal({"round": 1, "metrics": {}, "rows": {"-1": "x"}}))
    with pytest.raises(UserError, match=r"rounds/000001\.json: corrupt checkpoint \(rows\.-1"):
        Store.open(folder)


def test_a_row_of_another_size_is_refused(folder: Path) -> None:
    path = folder / "rows/000001.r000002.safetensors"
    data = safetensors.torch.save({"row": torch.zeros(P + 1)})
    path.write_bytes(data)
    record = files.read_sealed(folder / "rounds/000002.json")
    record["rows"]["1"] = files.digest(data)
    (folder / "rounds/000002.json").write_bytes(files.seal(record))
    with Store.open(folder) as store, pytest.raises(UserError, match=r"r000002\.safetensors: corrupt .*\(4,\)"):
        row(store, 1)


def test_a_folder_replaced_by_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (folder / "optim").rmdir()
    (folder / "optim").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="optim: corrupt checkpoint"):
        Store.open(folder)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    with Store.open(folder) as store:
        (folder / "rows/.000003.r000003.safetensors.tmp").symlink_to(victim)
        commit(store, 3, {3: 3.0})
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("shape", [[0, 2**40, 2**40], [3]], ids=["more-than-torch-can-hold", "not-of-its-size"])
def test_a_tensor_file_whose_head_is_broken_is_said_to_be_corrupt(tmp_path: Path, shape: list[int]) -> None:
    head = json.dumps({"x": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "broken").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(UserError, match="broken: corrupt checkpoint"):
        files.read_tensors(tmp_path / "broken")


def test_foreign_files_in_the_run_folder_stay(folder: Path) -> None:
    (folder / "rows/notes.txt").write_text("mine")
    (folder / "rows/000009.r000009.safetensors").write_text("of an uncommitted round")
    Store.open(folder).close()
    assert "notes.txt" in names(folder / "rows")
    assert "000009.r000009.safetensors" not in names(folder / "rows")


def test_metrics_for_people_are_rebuilt_when_they_differ(folder: Path) -> None:
    whole = (folder / "metrics.jsonl").read_bytes()
    for broken in (whole[:-5], b"", whole + b"{"):
        (folder / "metrics.jsonl").write_bytes(broken)
        Store.open(folder).close()
        assert (folder / "metrics.jsonl").read_bytes() == whole
