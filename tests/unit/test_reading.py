"""Files as people have them: what is recognised, what is named as left out, and what a damaged one says."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mira.core.errors import UserError
from mira.data.federation import SplitSizes, make_federation
from mira.data.reading import client_files, parse_json, read_records
from mira.data.sources.jsonl import Jsonl
from mira.fleet.site.source import source_of

ROWS = [{"instruction": f"Say {n}.", "output": f"{n} – {'é' * n}"} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    arrow = pytest.importorskip("pyarrow", reason="the extra 'datasets' is not installed")
    from pyarrow import parquet

    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def table(comma: str, quoted: bool = True) -> str:
    mark = '"' if quoted else ""
    return "".join(
        comma.join(f"{mark}{cell}{mark}" for cell in row) + "\r\n" for row in [ROWS[0], *(r.values() for r in ROWS)]
    )


LAYOUTS: dict[str, Callable[[], str | bytes]] = {
    "a.jsonl": lambda: LINES,
    "a.ndjson": lambda: LINES,
    "a.json": lambda: LINES,
    "b.json": lambda: json.dumps(ROWS),
    "c.json": lambda: json.dumps(ROWS, indent=2),
    "d.json": lambda: "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "e.JSONL": lambda: "\ufeff" + LINES.replace("\n", "\r\n"),
    "f.jsonl.gz": lambda: gzip.compress(LINES.encode(), mtime=0),
    "g.Json.GZ": lambda: gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    "h.csv": lambda: table(","),
    "i.csv": lambda: table(";", quoted=False),
    "j.tsv": lambda: table("\t"),
    "k.CSV.gz": lambda: gzip.compress(table(",").encode(), mtime=0),
    "l.parquet": lambda: parquet(ROWS),
}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_records_from_any_layout(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, LAYOUTS[name]())
    found = list(read_records(path))
    assert [record for _, record in found] == ROWS
    assert all(place.startswith(f"{path}:") for place, _ in found)


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    cases = {
        "a.jsonl": ("\n" + LINES, [2, 3, 4]),
        "b.json": (json.dumps(ROWS, indent=1), [2, 6, 10]),
        "c.json": ("\n\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 6, 11]),
        "d.csv": ('instruction,output\n"two\nlines",x\ny,z\n', [2, 4]),
    }
    for name, (text, lines) in cases.items():
        path = write(tmp_path / name, text)
        assert [place for place, _ in read_records(path)] == [f"{path}:{line}" for line in lines]


def test_a_folder_gives_a_client_a_file_and_names_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("h1.jsonl", "h2.json", "h3.JSONL", "h4.jsonl.gz", "h5.ndjson", "sub/h6.jsonl", "a.b.jsonl"):
        write(tmp_path / name, gzip.compress(LINES.encode(), mtime=0) if name.endswith("gz") else LINES)
    for name in ("README.md", "sub/notes.txt", ".hidden.jsonl", ".DS_Store", "old.jsonl.bak", ".jsonl"):
        write(tmp_path / name, LINES)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "sub")
    with caplog.at_level(logging.WARNING):
        clients = Jsonl(tmp_path).load(0)
    assert [client.name for client in clients] == ["a.b", "h1", "h2", "h3", "h4", "h5", "sub/h6"]
    (told,) = caplog.messages
    assert told.startswith(
        f"{tmp_path}: not read: .hidden.jsonl, README.md, elsewhere, old.jsonl.bak, sub/notes.txt (data"
    )
    names = [client.slug for client in make_federation(Jsonl(tmp_path), SplitSizes(1, 1, 1), 0).clients]
    assert all("/" not in name for name in names)


def test_two_files_of_one_client_are_refused(tmp_path: Path) -> None:
    for name in ("h1.jsonl", "h1.csv"):
        write(tmp_path / name, LINES)
    with pytest.raises(UserError, match=r"'h1\.csv' and 'h1\.jsonl' are both client 'h1'; rename one"):
        client_files(tmp_path)


def test_our_fields_may_have_other_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.csv", "frage,antwort,nr\nWer?,Anna,1\n")
    with caplog.at_level(logging.WARNING):
        (client,) = Jsonl(tmp_path, columns={"instruction": "frage", "output": "antwort"}).load(0)
    assert [(e.instruction, e.output) for e in client.examples] == [("Wer?", "Anna")]
    assert caplog.messages == ["unused fields: 'nr' (in 1 of 1 examples)"]
    with pytest.raises(UserError, match="no column 'ask' for 'instruction'"):
        Jsonl(tmp_path, columns={"instruction": "ask", "output": "antwort"}).load(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES.encode("utf-16"), r"a\.jsonl: is UTF-16, not UTF-8; convert it: iconv"),
        ("a.jsonl", LINES.encode("utf-16-le"), r"a\.jsonl: is UTF-16"),
        ("a.csv", table(",").encode("utf-16"), r"a\.csv: is UTF-16"),
        ("a.jsonl", LINES.encode() + bytes(64), r"a\.jsonl:4: holds 64 zero bytes, as after a crash"),
        ("a.jsonl", bytes(64), r"a\.jsonl:1: holds 64 zero bytes"),
        ("a.jsonl", LINES.encode("latin-1", "replace"), r"a\.jsonl:2: not UTF-8 \(byte 0xe9\); save"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], r"a\.jsonl\.gz: damaged or truncated gzip"),
        ("a.csv", b"PK\x03\x04" + bytes(50), r"a\.csv: is a zip archive or an Excel workbook"),
        ("a.json", json.dumps(ROWS, indent=1)[:-3], r"a\.json:13: malformed JSON"),
        ("a.json", json.dumps(ROWS) + "\n{}", r"a\.json:2: text after the end of the JSON array"),
        ("a.json", '[{"a": 1} {"a": 2}]', r"a\.json:1: malformed JSON \(the array needs ',' or '\]'"),
        ("a.json", '[{"a": 1},\n{"a": 2, "a": 3}]', r"a\.json:2: key 'a' is given twice"),
        ("a.json", "[1]", r"a\.json:1: a line must hold one JSON object, got int"),
        ("a.jsonl", '{"a": 1\n{"a": 2}', r"a\.jsonl:1: malformed JSON"),
        ("a.json", '{\n "a": 1,\n "b" 2\n}', r"a\.json:3: malformed JSON .*column 6"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv:2: has 3 fields, the header 2; put fields that hold ',' in quotes"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: two columns are named 'a'"),
        ("a.parquet", b"PAR1 no more", r"a\.parquet: malformed parquet"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_true_line(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="the extra 'datasets' is not installed")
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(write(tmp_path / name, content)))
    assert "\n" not in str(caught.value)


def test_parquet_without_the_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"reading parquet needs pyarrow; pip install 'mira-fl\[datasets\]'"):
        read_records(write(tmp_path / "a.parquet", b"PAR1"))


def test_a_parquet_row_lacks_what_other_rows_have(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}], "id": 1},
        {"messages": [{"role": "user", "content": "a"}], "id": None},
    ]
    (_, first), (_, second) = read_records(write(tmp_path / "a.parquet", parquet(rows)))
    assert first == rows[0]
    assert second == {"messages": [{"role": "user", "content": "a"}]}


def test_joined_files_keep_a_byte_order_mark_each(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"\ufeff{LINES}\ufeff{LINES}")
    assert [record for _, record in read_records(path)] == [*ROWS, *ROWS]


def test_a_preference_set_is_learned_as_the_refusal_says(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    with pytest.raises(UserError, match="holds preferences"):
        Jsonl(tmp_path).load(0)
    (client,) = Jsonl(tmp_path, columns={"prompt": "prompt", "completion": "chosen"}).load(0)
    assert [(e.instruction, e.output) for e in client.examples] == [("p", "a")]


def test_one_file_of_a_site_is_one_client(tmp_path: Path) -> None:
    (client,) = source_of(write(tmp_path / "north.jsonl.gz", gzip.compress(LINES.encode(), mtime=0))).load(0)
    assert (client.name, len(client.examples)) == ("north", 3)


def test_nan_counts_as_null() -> None:
    assert parse_json('{"a": NaN}', Path("a")) == {"a": None}
