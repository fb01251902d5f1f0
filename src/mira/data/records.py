"""Reading hostile files: every fault ends in one line that names the file, the line, the field and the fix."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mira.core.errors import UserError
from mira.data.types import Example, Message

Record = Mapping[str, Any]
Ours = Literal["instruction", "input", "output", "prompt", "completion", "messages"]
Columns = Mapping[Ours, str]  # our field -> theirs
_ROLES = ("system", "user", "assistant")
_KNOWN = "instruction + output (input optional), prompt + completion, or messages"


def existing(path: Path, key: str = "data.path") -> Path:
    """``path`` itself. Raises UserError when there is nothing."""
    if not path.exists():
        raise UserError(
            f"{key}='{path}': no such file or folder; give a path that exists (relative paths start at {Path.cwd()})"
        )
    return path


def read_text(path: Path) -> str:
    """The whole file as UTF-8, without a byte-order mark. Raises UserError naming the line of the first bad byte."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check that it is a file you may read") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8") from error


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """``text``, which begins at ``line`` of ``path``, as JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise UserError(f"{place}: malformed JSON ({error.msg} at column {error.colno}); mend or remove it") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        raise UserError(f"{path}:{line}: malformed JSON ({error}); mend or remove it") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    """(place "file:line", object) for every line that is not blank."""
    # Not splitlines(): U+2028 and its kin may stand unescaped inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            record = parse_json(line, path, number)
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise UserError(
                    f"{path}:{number}: a line must hold one JSON object, got {kind}; write one example a line"
                )
            yield f"{path}:{number}", record


def text_field(record: Record, field: str, place: str, needed: str = "") -> str:
    """``record[field]`` as text. Raises UserError when it is absent, of another type or cannot be written as UTF-8."""
    if field not in record:
        raise UserError(f"{place}: no field '{field}' (found: {_names(record)}); needed: {needed or field}")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{place}: field '{field}' must be text, got {type(value).__name__}; put it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: field '{field}' holds half a character (unpaired surrogate); remove it") from error
    return value


def label_field(record: Record, field: str, place: str) -> str:
    """``record[field]`` as a non-empty label; whole numbers count as text."""
    value = record.get(field)
    label = str(value) if isinstance(value, int) else text_field(record, field, place, f"the label column '{field}'")
    if not label.strip():
        raise UserError(f"{place}: field '{field}' is empty; every example needs a label there")
    return label


def _answer(record: Record, field: str, place: str) -> str:
    answer = text_field(record, field, place, _KNOWN)
    if not answer.strip():
        raise UserError(
            f"{place}: field '{field}' is empty; every example needs a response: fill it in or remove the example"
        )
    return answer


def _messages(record: Record, place: str) -> Example:
    turns = record["messages"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{place}: field 'messages' must be a list of {{role, content}} objects")
    messages = []
    for number, turn in enumerate(turns):
        where = f"{place}: messages[{number}]"
        role = text_field(turn, "role", where)
        if role not in _ROLES:
            raise UserError(f"{where}: role '{role}' is unknown; allowed: {', '.join(_ROLES)}")
        read = _answer if role == "assistant" else text_field
        messages.append(Message(role, read(turn, "content", where)))
    if messages[0].role == "assistant" or messages[-1].role != "assistant":
        raise UserError(f"{place}: 'messages' must start with a system or user turn and end with an assistant turn")
    return Example("", "", messages[-1].content, tuple(messages))


def to_example(record: Record, place: str) -> Example:
    """An example from whichever of the three known layouts the record has. Raises UserError naming ``place``."""
    if "messages" in record:
        return _messages(record, place)
    if "prompt" in record or "completion" in record:
        return Example(text_field(record, "prompt", place, _KNOWN), "", _answer(record, "completion", place))
    given = text_field(record, "input", place) if record.get("input") is not None else ""
    return Example(text_field(record, "instruction", place, _KNOWN), given, _answer(record, "output", place))


def mapped(record: Record, columns: Columns, place: str) -> Record:
    """The record under our field names: ``columns`` maps each of ours to theirs, none means they are ours already."""
    for ours, theirs in columns.items():
        if theirs not in record:
            raise UserError(
                f"{place}: no column '{theirs}' for '{ours}' (found: {_names(record)}); mend the column mapping"
            )
    return {ours: record[theirs] for ours, theirs in columns.items()} if columns else record


def _names(record: Record) -> str:
    return ", ".join(sorted(map(str, record))) or "nothing"
