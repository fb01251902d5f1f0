"""A mirror of a run folder: equal to its source after every round, valid at every instant, and closed to hostile parcels."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.store_kill_program import COHORTS, LOSSES, P, content, create, numbers
from mira.core.errors import UserError
from mira.store import Store, files, mirror
from mira.store.mirror import File, Mirror, Parcel

KEYS = st.sets(st.integers(0, 3))
ROUNDS = st.lists(st.tuples(KEYS, KEYS, st.booleans(), st.one_of(st.none(), st.floats(0, 9))), max_size=6)


def commit(store: Store, number: int, rows: set[int], optim: set[int], extra: bool, loss: float | None) -> None:
    index = torch.tensor(sorted(rows), dtype=torch.int64)
    value = numbers(P * len(index), number).view(-1, P)
    states = {client: numbers(3, number, client) for client in optim}
    step = {"step": numbers(2, number)} if extra or not number else {}
    store.commit(number, index, value, step, states, {"validation_loss": loss})


def everything(folder: Path) -> dict[str, Any]:
    with Store.open(folder, writable=False) as store:
        return content(store)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(source: Path, target: Path) -> None:
    for parcel in mirror.whole(source):
        mirror.restore(target, parcel)


def refused(copy: Mirror, parcel: Parcel) -> str:
    with pytest.raises(UserError) as caught:
        copy.apply(parcel)
    return str(caught.value)


@settings(max_examples=25)
@given(ROUNDS, st.integers(0, 6))
def test_a_mirror_equals_its_source_after_every_round(rounds: list[Any], moved: int) -> None:
    """After ``moved`` rounds the run goes on in a copy of the mirror, as on another machine."""
    with TemporaryDirectory() as name:
        source, copy = Path(name, "source"), Mirror(Path(name, "copy"))
        store = create(source)
        copy.apply(mirror.created(source))
        for number, (rows, optim, extra, loss) in enumerate(rounds):
            if number == moved:
                store.close()
                source = Path(name, "elsewhere")
                copied(Path(name, "copy"), source)
                store = Store.open(source)
                assert content(store) == everything(Path(name, "copy"))
            commit(store, number, rows, optim, extra, loss)
            copy.apply(mirror.committed(source, number))
            assert content(store) == everything(Path(name, "copy"))
        store.close()
        copy.close()
        assert files_of(source) == files_of(Path(name, "copy")), "obsolete versions are gone, too"


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Parcel], list[Any], Any]:
    """All parcels of a run, its content after each of its rounds, and of the finished run."""
    folder = tmp_path_factory.mktemp("source")
    with create(folder) as store:
        parcels: list[Parcel] = [mirror.created(folder)]
        contents = [content(store)]
        for number, loss in enumerate(LOSSES):
            commit(store, number, set(COHORTS[number]), {number}, True, loss)
            parcels.append(mirror.committed(folder, number))
            contents.append(content(store))
        store.finish({"rounds": 3})
    (folder / "tokens").mkdir()
    (folder / "tokens" / "private").write_text("a")
    (folder / "adapters" / "x").mkdir(parents=True)
    (folder / "adapters" / "x" / "a.bin").write_text("b")
    (folder / "where.json").write_text("[]")
    (folder / "test.json").write_text("{}")
    known = {"where.json": files.digest(b"[]")}
    parcels += mirror.others(folder, known, at_end=True)
    return parcels, contents, files_of(folder)


def test_all_but_the_tokens_comes_back(sent: tuple[list[Parcel], list[Any], Any], tmp_path: Path) -> None:
    copy = Mirror(tmp_path)
    for parcel in sent[0]:
        copy.apply(parcel)
    copy.close()
    known_already = {"where.json", "tokens/private"}
    assert files_of(tmp_path) == {name: data for name, data in sent[2].items() if name not in known_already}


def test_a_copy_with_a_result_lacks_nothing_that_the_run_wrote(
    sent: tuple[list[Parcel], list[Any], Any], tmp_path: Path
) -> None:
    """So no copy is taken for finished whose sender died on the way."""
    copy = Mirror(tmp_path)
    for parcel in sent[0]:
        copy.apply(parcel)
        if parcel[-1].name == "result.json":
            break
    copy.close()
    assert {"adapters/x/a.bin", "test.json"} <= files_of(tmp_path).keys()


def test_a_machine_that_goes_on_needs_no_end_products(
    sent: tuple[list[Parcel], list[Any], Any], tmp_path: Path
) -> None:
    for name, data in sent[2].items():
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    copied(tmp_path / "a", tmp_path / "b")
    assert set(files_of(tmp_path / "a")) - set(files_of(tmp_path / "b")) == {
        "tokens/private", "adapters/x/a.bin", "metrics.jsonl", ".lock",
    }  # fmt: skip


def test_a_mirror_killed_at_any_instant_is_at_a_committed_state(
    sent: tuple[list[Parcel], list[Any], Any], tmp_path: Path
) -> None:
    parcels, contents, _ = sent
    instant, seen = 0, set()
    while killed_at(instant, tmp_path / str(instant), parcels):
        folder = tmp_path / str(instant)
        done = 0
        if Store.exists(folder):
            found = everything(folder)
            assert found in contents
            done = 1 + len(found["metrics"])
        seen.add(done)
        copy = Mirror(folder)
        for parcel in parcels[done:]:
            copy.apply(parcel)
        copy.close()
        assert everything(folder) == contents[-1]
        instant += 1
    assert seen == set(range(len(contents) + 1))


def killed_at(instant: int, folder: Path, parcels: list[Parcel]) -> bool:
    """Applies the parcels in a child that dies at its ``instant``-th point; False when it came to its end first."""
    child = os.fork()
    if child == 0:
        countdown = iter(range(instant, -1, -1))
        files._point = lambda _: os.kill(os.getpid(), signal.SIGKILL) if next(countdown) == 0 else None
        copy = Mirror(folder)
        for parcel in parcels:
            copy.apply(parcel)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def named(name: str, data: bytes = b"x") -> File:
    return File(name, data, files.digest(data))


@pytest.fixture
def begun(sent: tuple[list[Parcel], list[Any], Any], tmp_path: Path) -> Iterator[Mirror]:
    """A mirror after round 0, that must not change."""
    copy = Mirror(tmp_path / "run")
    for parcel in sent[0][:2]:
        copy.apply(parcel)
    before = files_of(tmp_path)
    yield copy
    assert files_of(tmp_path) == before
    copy.close()


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/out",
        "a/../../out",
        "a//b",
        "./a",
        "",
        ".",
        "a\0b",
        "a\nb",
        "a\udc80b",
        "link/out",
        "adapters/../../../out",
    ],
)
def test_no_name_leads_out_of_the_folder(name: str, begun: Mirror, tmp_path: Path) -> None:
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    assert "no name of a file in a run folder" in refused(begun, [named(name)])
    (tmp_path / "run" / "link").unlink()


@pytest.mark.parametrize(
    "name",
    [
        "store.txt/../store.json",
        "config.yaml",
        "rounds/x",
        "rows/000000.r000000.safetensors",
        "tokens/a",
        "metrics.jsonl",
        ".lock",
        ".metrics.jsonl.tmp",
    ],
)
def test_no_parcel_changes_the_state_of_a_run(name: str, begun: Mirror) -> None:
    assert "a worker sent" in refused(begun, [named(name)])


def test_a_parcel_that_is_damaged_or_out_of_order_is_refused(
    begun: Mirror, sent: tuple[list[Parcel], list[Any], Any]
) -> None:
    run, _, first, second, *_ = sent[0]
    assert "there is a run here already" in refused(begun, run)
    assert "round 1 follows" in refused(begun, second)
    assert "arrived damaged" in refused(begun, [replace(first[0], data=b"other"), *first[1:]])
    assert "others than it names" in refused(begun, first[1:])
    assert "others than it names" in refused(begun, [first[0], *first])
    assert "others than it names" in refused(begun, [named(first[0].name), *first[1:]])
    assert "no version of round 1" in refused(begun, [named("rows/000000.r000002.safetensors"), *first])
    assert "no version of round 1" in refused(begun, [named("where.json"), *first])
    value = json.loads(first[-1].data)
    value["rows"]["3"] = value["rows"].pop("0")
    assert "does not match its checksum" in refused(
        begun, [*first[:-1], named(first[-1].name, json.dumps(value).encode())]
    )


@pytest.mark.parametrize(
    ("kind", "key", "data", "why"),
    [
        ("rows", 9, None, "the run has 4 of this kind"),
        ("extra", 1, None, "the run has 1 of this kind"),
        ("rows", 0, b"junk", "corrupt checkpoint"),
        ("optim", 0, b"junk", "corrupt checkpoint"),
        ("rows", 0, files.pack_tensors({"row": torch.zeros(P + 1)}), f"expected torch.float32 ({P},)"),
        ("rows", 0, files.pack_tensors({"a": torch.zeros(P), "b": torch.zeros(P)}), "2 tensors instead of one"),
    ],
)
def test_a_version_that_fits_no_row_is_refused(
    kind: str, key: int, data: bytes | None, why: str, begun: Mirror, sent: tuple[list[Parcel], list[Any], Any]
) -> None:
    first = sent[0][2]
    version = next(file.data for file in first if file.name.startswith(kind)) if data is None else data
    record = json.loads(first[-1].data) | {
        "rows": {},
        "optim": {},
        "extra": {},
        kind: {str(key): files.digest(version)},
    }
    del record["check"]
    parcel = [named(f"{kind}/{key:06d}.r000001.safetensors", version), named(first[-1].name, files.seal(record))]
    assert why in refused(begun, parcel)


def test_a_parcel_without_a_file_or_a_result_without_a_round_is_refused(
    begun: Mirror, sent: tuple[list[Parcel], list[Any], Any], tmp_path: Path
) -> None:
    assert "without a file" in refused(begun, [])
    with TemporaryDirectory() as name:
        copy = Mirror(Path(name, "run"))
        copy.apply(sent[0][0])
        assert "no round is committed" in refused(copy, [named("result.json")])
        copy.close()


def test_a_round_of_no_run_is_refused(sent: tuple[list[Parcel], list[Any], Any], tmp_path: Path) -> None:
    copy = Mirror(tmp_path / "none")
    assert "round 0 follows" in refused(copy, sent[0][1])
    assert "no file beside a run's state" in refused(copy, sent[0][-1])
    run = sent[0][0]
    assert "others than it names" in refused(copy, [named("config.yaml"), *run[1:]])
    assert not (tmp_path / "none").exists()
