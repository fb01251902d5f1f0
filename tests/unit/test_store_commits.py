"""What is committed to the run folder is what is read from it; and who may create, open and write one.

What comes of crashes and broken files is in test_store_damage.py.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.sample_run_folder import P, commit, create, fingerprint, names, row
from mira.core.errors import UserError
from mira.store import Store, files
from mira.store.files import is_locked
from mira.store.folders import alone_in, in_use

NONE = torch.empty(0, dtype=torch.int64)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with create(tmp_path / "run") as store:
        yield store


def test_what_is_put_in_comes_out(store: Store) -> None:
    assert store.last_round is None
    assert store.best_round is None
    assert store.extra() == {}
    assert len(store.rows()) == 4
    state = torch.arange(7.0)
    store.commit(0, NONE, torch.empty(0, P), {"a": torch.ones(1)}, {2: state}, {"validation_loss": 2.0, "who": "αβ"})
    commit(store, 1, {3: 1.0}, b=torch.zeros(2))
    with Store.open(store.folder, writable=False) as reader:
        for each in (store, reader):
            assert (each.last_round, each.best_round) == (1, 0)
            assert each.rows()[torch.tensor([3, 0, 3])].tolist() == [[1.0] * P, [0.0] * P, [1.0] * P]
            assert each.rows()[NONE].shape == (0, P)
            assert sorted(each.extra()) == ["a", "b"]
            assert sorted(each.extra(as_of=0)) == ["a"]
            assert torch.equal(each.optimizer(2), state)  # type: ignore[arg-type]
            assert each.optimizer(0) is None
            assert each.config() == "seed: 0\n"
            assert each.environment() == {"torch": "2"}
            assert torch.equal(each.graph()["label"], torch.arange(4))
            assert each.metrics() == [{"round": 0, "validation_loss": 2.0, "who": "αβ"}, {"round": 1}]
            assert [
                json.loads(line) for line in (each.folder / "metrics.jsonl").read_text().splitlines()
            ] == each.metrics()


def test_rows_keep_their_bits_and_type(tmp_path: Path) -> None:
    start = torch.rand(P, dtype=torch.float64)
    value = torch.tensor([[math.pi, -0.0, 5e-324]], dtype=torch.float64)
    with Store.create(tmp_path, "", {}, start, 2, {}) as store:
        store.commit(0, torch.tensor([1]), value, {}, None, {})
        read = store.rows()[torch.tensor([0, 1])]
    assert read.dtype == torch.float64
    assert read.view(torch.int64).tolist() == torch.stack([start, value[0]]).view(torch.int64).tolist()


def test_rows_handed_out_are_fresh(store: Store) -> None:
    store.rows()[torch.tensor([0])].fill_(9)
    assert row(store, 0) == 0


def test_rows_without_a_round_follow_the_last_commit(store: Store) -> None:
    rows = store.rows()
    commit(store, 0, {0: 5.0})
    assert rows[torch.tensor([0])][0, 0] == 5


def test_result(store: Store) -> None:
    assert store.result() is None
    store.finish({"clients": [1, 2]})
    assert store.result() == {"clients": [1, 2]}


def test_best_is_the_earliest_lowest_finite_validation_loss(store: Store) -> None:
    best = []
    for round, loss in enumerate([None, "nan", 2.0, 1.0, 1.0, 3.0, 0.5]):
        store.commit(round, NONE, torch.empty(0, P), {}, None, {"validation_loss": loss})
        best.append(store.best_round)
    assert best == [None, None, 2, 3, 3, 3, 6]


def test_only_what_the_last_and_the_best_round_need_is_kept(folder: Path) -> None:
    kept = {"000001.r000001.safetensors", "000001.r000002.safetensors", "000002.r000001.safetensors"}
    assert names(folder / "rows") == kept
    with Store.open(folder) as store:
        assert [row(store, key, 1) for key in (0, 1, 2)] == [0, 1.0, 1.5]
        assert [row(store, key) for key in (0, 1, 2)] == [0, 2.0, 1.5]
        with pytest.raises(UserError, match="round 0 is not kept; last: 2, best: 1"):
            row(store, 1, 0)
        commit(store, 3, {}, 0.5)
        assert names(folder / "rows") == {"000001.r000002.safetensors", "000002.r000001.safetensors"}
        with pytest.raises(UserError, match="round 1 is not kept"):
            row(store, 1, 1)


def test_a_commit_costs_its_cohort_not_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    replace = files.replace
    with create(tmp_path, num_rows=10**9) as store:
        commit(store, 0, dict.fromkeys(range(200), 1.0))
        monkeypatch.setattr(files, "replace", lambda path, data: written.append(len(data)) or replace(path, data))  # type: ignore[func-returns-value]
        monkeypatch.setattr(os, "listdir", lambda _: pytest.fail("a commit lists a folder"))
        commit(store, 1, {7: 2.0, 10**9 - 1: 2.0})
    assert len(written) == 3  # two rows and the record
    assert sum(written) < 1000


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[dict[int, float], float | None, bool, bool]]:
    """Rounds: rows written, validation loss, whether optimiser states and extra come too, whether to reopen after."""
    rows = st.dictionaries(st.integers(0, 3), st.floats(0, 9, width=32), max_size=3)
    loss = st.none() | st.sampled_from([1.0, 2.0, 3.0, 4.0])
    return draw(st.lists(st.tuples(rows, loss, st.booleans(), st.booleans()), min_size=1, max_size=12))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=histories())
def test_any_history_reads_as_a_model_in_memory(history: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    state: dict[str, dict[int, float]] = {"rows": {}, "optim": {}, "extra": {}}
    past: list[dict[str, dict[int, float]]] = []
    losses: list[float] = []
    store = create(folder)
    for round, (rows, loss, more, reopen) in enumerate(history):
        optimizer = {key: torch.full((2,), value) for key, value in rows.items()} if more else None
        index = torch.tensor(list(rows), dtype=torch.int64)
        value = torch.tensor(list(rows.values()))[:, None].expand(-1, P)
        extra = {str(round % 2): torch.tensor(float(round))} if more else {}
        store.commit(round, index, value, extra, optimizer, {"validation_loss": loss})
        state = {
            "rows": state["rows"] | rows,
            "optim": state["optim"] | (rows if more else {}),
            "extra": state["extra"] | {int(name): float(x) for name, x in extra.items()},
        }
        past.append(state)
        losses.append(math.inf if loss is None else loss)
        if reopen:
            store.close()
            store = Store.open(folder)
        best = losses.index(min(losses)) if min(losses) < math.inf else None
        assert (store.last_round, store.best_round) == (round, best)
        for as_of in {None, round, *([] if best is None else [best])}:
            then = past[round if as_of is None else as_of]
            assert [row(store, key, as_of) for key in range(4)] == [then["rows"].get(key, 0.0) for key in range(4)]
            assert {int(name): float(x) for name, x in store.extra(as_of).items()} == then["extra"]
        states = {key: store.optimizer(key) for key in range(4)}
        assert {key: float(x[0]) for key, x in states.items() if x is not None} == state["optim"]
        assert len(names(folder / "rows")) <= 2 * len(state["rows"])
        assert len(names(folder / "optim")) == len(state["optim"])
        assert len(names(folder / "extra")) <= 2
    store.close()


def test_all_is_on_disk_before_the_record_and_nothing_is_removed_before_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, 0, {0: 1.0})
    log: list[str] = []
    fsync, rename, unlink = os.fsync, os.replace, Path.unlink

    def logged_fsync(descriptor: int) -> None:
        log.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(f"rename {target.name}")
        rename(source, target)

    def logged_unlink(path: Path, missing_ok: bool = False) -> None:
        if not path.name.endswith(".tmp"):
            log.append(f"remove {path.name}")
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_rename)
    monkeypatch.setattr(Path, "unlink", logged_unlink)
    commit(store, 1, {0: 2.0})
    assert log == [
        "sync .000000.r000001.safetensors.tmp", "rename 000000.r000001.safetensors", "sync rows",
        "sync .000001.json.tmp", "rename 000001.json", "sync rounds",
        "remove 000000.r000000.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_second_writer_is_refused_and_a_reader_is_not(store: Store) -> None:
    with pytest.raises(UserError, match=f"{store.folder}: another process is writing"):
        Store.open(store.folder)
    code = f"from mira.store import Store; from pathlib import Path; Store.open(Path({str(store.folder)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "another process is writing" in other.stderr
    Store.open(store.folder, writable=False).close()
    store.close()
    Store.open(store.folder).close()


@pytest.mark.parametrize(("place", "take"), [(".lock", Store.open), (".", alone_in)], ids=["run", "comparison"])
def test_a_check_of_the_lock_refuses_no_writer(
    place: str, take: Callable[[Path], AbstractContextManager[Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``is_locked`` and ``in_use`` share the lock for an instant, in which a run may be started."""
    check = os.open(folder / place, os.O_RDONLY)
    fcntl.flock(check, fcntl.LOCK_SH)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: os.close(check))
    with take(folder):
        assert (is_locked if take == Store.open else in_use)(folder)


def test_a_reader_left_behind_says_so(folder: Path) -> None:
    with Store.open(folder) as writer, Store.open(folder, writable=False) as reader:
        commit(writer, 3, {1: 3.0, 2: 3.0}, 0.1)
        with pytest.raises(UserError, match="the run went on while it was read; try again"):
            row(reader, 1)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty; continue its run with --resume, or choose another --out"):
        create(tmp_path)
    assert names(tmp_path) == {"thesis.tex"}


def test_an_existing_run_is_not_created_again(folder: Path) -> None:
    before = fingerprint(folder)
    with pytest.raises(UserError, match="--resume"):
        create(folder)
    assert fingerprint(folder) == before


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        create(tmp_path / "run")


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run here"):
        Store.open(tmp_path / "absent")
    (tmp_path / ".lock").touch()
    with pytest.raises(UserError, match="its creation was interrupted"):
        Store.open(tmp_path)


def test_bugs_of_the_caller_are_seen_before_anything_is_written(folder: Path) -> None:
    before = fingerprint(folder)
    one = torch.zeros(1, P)
    with Store.open(folder) as store:
        for wrong in (
            (7, torch.tensor([0]), one),
            (3, torch.tensor([4]), one),
            (3, torch.tensor([0, 0]), torch.zeros(2, P)),
            (3, torch.tensor([0]), one.double()),
            (3, torch.tensor([0]), torch.zeros(1, P + 1)),
        ):
            with pytest.raises(AssertionError):
                store.commit(*wrong, {}, None, {})
        with pytest.raises(ValueError, match="JSON"):
            store.commit(3, torch.tensor([0]), one, {}, None, {"loss": math.nan})
        with pytest.raises(IndexError):
            row(store, 4)
    with Store.open(folder, writable=False) as reader, pytest.raises(AssertionError):
        reader.commit(3, torch.tensor([0]), one, {}, None, {})
    assert fingerprint(folder) == before
