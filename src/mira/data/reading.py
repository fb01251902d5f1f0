"""Data files as records: JSON in any layout, CSV and parquet, plain or gzipped, one file or a folder of files.

The format is recognised by the content, CSV by the ending alone. Every error is one line that names file, line and fix.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mira.core.errors import UserError
from mira.data.fields import RawRecord

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_GZIP = ".gz"
_SHOWN = 10  # files named in one line

_log = logging.getLogger(__name__)


def existing(path: Path, key: str = "data.path") -> Path:
    """``path`` unchanged. Raises UserError where it does not exist."""
    if not path.exists():
        raise UserError(
            f"{key}='{path}': no such file or folder; give a path that exists (relative paths start at {Path.cwd()})"
        )
    return path


def client_files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The data files in and below ``folder`` by client (the file's path in the folder, without the ending), and all other files.

    Hidden files without a data ending are ignored. Raises UserError where two files have the same client.
    """
    files: dict[str, Path] = {}
    rest = []
    for path in _below(folder):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        bare = _without_ending(inside)
        if bare is None or hidden or path.is_dir():
            rest += [path] if bare is not None or not hidden else []
        elif bare in files:
            raise UserError(f"{folder}: '{files[bare].name}' and '{path.name}' are both client '{bare}'; rename one")
        else:
            files[bare] = path
    return files, rest


def client_name(file: Path) -> str:
    """The client of a file: its name without the ending."""
    return _without_ending(Path(file.name)) or file.stem


def tell_left_out(folder: Path, paths: Sequence[Path]) -> None:
    """Log in one line the files of ``folder`` that are not read."""
    if paths:
        names = ", ".join(str(path.relative_to(folder)) for path in paths[:_SHOWN])
        more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
        _log.warning("%s: not read: %s%s (data files end with %s)", folder, names, more, ", ".join(ENDINGS))


def read_records(path: Path) -> Iterator[tuple[str, RawRecord]]:
    """(place "file:line", record) for every record of one file."""
    raw = read_bytes(path)
    if raw.startswith(b"PAR1") or _ending(path) == ".parquet":
        return _parquet(raw, path)
    text, ending = decoded(raw, path), _ending(path)
    return _table(text, path, ending) if ending in (".csv", ".tsv") else _records(text, path)


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed where it is gzipped."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or truncated gzip ({error}); write or copy the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check that it is a file you may read") from error


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text, without a byte-order mark. Raises UserError with the line of the first invalid byte."""
    return decoded(read_bytes(path), path)


def decoded(raw: bytes, path: Path) -> str:
    """``raw``, the content of ``path``, as text. Raises UserError with the cause where it is not text."""
    if raw.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in raw[:4] and raw[:4].strip(b"\0")):
        raise UserError(f"{path}: is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8") from error
    if (at := text.find("\0")) >= 0:
        place = f"{path}:{text.count(chr(10), 0, at) + 1}"
        raise UserError(
            f"{place}: holds {text.count(chr(0))} zero bytes, as after a crash or a full disk; write the file again, or"
            " remove them: tr -d '\\000' < OLD > NEW"
        )
    return text


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value of ``text``, which begins at ``line`` of ``path``; NaN becomes null. Raises UserError for malformed JSON and
    for a repeated key."""
    start = _skip(text, 0)
    value, end = _value(text, start, path, line)
    if _skip(text, end) < len(text):
        raise UserError(f"{path}:{line}: malformed JSON (more text after its end); mend or remove it")
    return value


def _records(text: str, path: Path) -> Iterator[tuple[str, RawRecord]]:
    """Records of a JSON array, of one object per line, or of objects that span several lines each."""
    start = _skip(text, 0)
    if text.startswith("[", start):
        found = _array(text, start, path)
    else:
        found = _one_after_the_other(text, path) if _is_spread(text[start:]) else _lines(text, path)
    for line, record in found:
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"{path}:{line}: a line must hold one JSON object, got {kind}; write one example a line")
        yield f"{path}:{line}", record


def _is_spread(text: str) -> bool:
    """True where the first object spans several lines. A malformed single line is followed by another object."""
    first, _, rest = text.partition("\n")
    if rest.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return bool(rest.strip())
    return False


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): U+2028 and similar may be unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # concatenated files keep the byte-order mark of each
        if line.strip():
            yield number, parse_json(line, path, number)


def _one_after_the_other(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    line, before, at = 1, 0, _skip(text, 0)
    while at < len(text):
        line, before = line + text.count("\n", before, at), at
        value, end = _value(text, at, path, 1)
        yield line, value
        at = _skip(text, end)


def _array(text: str, start: int, path: Path) -> Iterator[tuple[int, Any]]:
    line, before, at = 1, 0, _skip(text, start + 1)
    closed = text.startswith("]", at)
    while not closed:
        line, before = line + text.count("\n", before, at), at
        value, end = _value(text, at, path, 1)
        yield line, value
        at = _skip(text, end)
        closed = text.startswith("]", at)
        if not closed and not text.startswith(",", at):
            number = text.count("\n", 0, at) + 1
            raise UserError(f"{path}:{number}: malformed JSON (the array needs ',' or ']' here); mend or remove it")
        at = at if closed else _skip(text, at + 1)
    if (at := _skip(text, at + 1)) < len(text):
        number = text.count("\n", 0, at) + 1
        raise UserError(f"{path}:{number}: text after the end of the JSON array; give one array, or one object a line")


def _value(text: str, at: int, path: Path, line: int) -> tuple[Any, int]:
    """The JSON value at ``at`` of ``text``, which begins at ``line``, and the value's end."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise UserError(f"{place}: malformed JSON ({error.msg} at column {error.colno}); mend or remove it") from error
    except _Twice as error:
        place = f"{path}:{line + text.count(chr(10), 0, at)}"
        raise UserError(f"{place}: key '{error}' is given twice; remove one of the two") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        place = f"{path}:{line + text.count(chr(10), 0, at)}"
        raise UserError(f"{place}: malformed JSON ({error}); mend or remove it") from error


class _Twice(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return found


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def _skip(text: str, at: int) -> int:
    """The first position from ``at`` on that is not JSON white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _table(text: str, path: Path, ending: str) -> Iterator[tuple[str, RawRecord]]:
    """Records of CSV with a header line. The separator is the most frequent of ',', ';' and tab in the header."""
    head = text.lstrip().partition("\n")[0]
    comma = "\t" if ending == ".tsv" else max(",;\t", key=head.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=comma)
    names: list[str] = []
    line = 0
    try:
        for fields in rows:
            place, line = f"{path}:{line + 1}", rows.line_num
            if not any(fields):
                continue
            if not names:
                names = fields
                if twice := next((name for name in names if names.count(name) > 1), None):
                    raise UserError(f"{place}: two columns are named '{twice}'; rename one")
            elif len(fields) != len(names):
                raise UserError(
                    f"{place}: has {len(fields)} fields, the header {len(names)}; put fields that hold {comma!r} in quotes"
                )
            else:
                yield place, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{line + 1}: malformed CSV ({error}); mend or remove it") from None


def _parquet(raw: bytes, path: Path) -> Iterator[tuple[str, RawRecord]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install 'mira-fl[datasets]'") from None
    try:
        rows = parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: malformed parquet ({' '.join(str(error).split())}); write or copy it again") from None
    return ((f"{path}:{number}", _given(row)) for number, row in enumerate(rows, start=1))


def _given(value: Any) -> Any:
    """``value`` without nulls: a table has them where another row has a value."""
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _ending(path: Path) -> str:
    """The ending of a data file in lower case: '.csv' for 'A.CSV.gz'; "" for other files."""
    name = path.name.lower().removesuffix(_GZIP)
    return next((ending for ending in ENDINGS if name.endswith(ending) and name != ending), "")


def _without_ending(inside: Path) -> str | None:
    """'sub/a' for 'sub/a.jsonl.gz'; None for other than data files."""
    ending, whole = _ending(inside), inside.as_posix()
    bare = whole[: -len(_GZIP)] if whole.lower().endswith(_GZIP) else whole
    return bare[: -len(ending)] if ending else None


def _below(folder: Path) -> Iterator[Path]:
    """Files in and below ``folder`` in the order of their names, and links to folders, which are not followed."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        here = Path(place)
        yield from (here / name for name in sorted([*files, *(n for n in folders if (here / n).is_symlink())]))
