"""Fields of records as text and as labels; every error names the place, the field and the fix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mira.core.errors import UserError

RawRecord = Mapping[str, Any]  # one record of a data file


def text_field(record: RawRecord, field: str, place: str, needed: str = "") -> str:
    """``record[field]`` as text; numbers and booleans in JSON's spelling. Raises UserError where it is absent, null, of another
    type or not valid UTF-8."""
    if field not in record:
        raise UserError(f"{place}: no field '{field}' (found: {names(record)}); needed: {needed or field}")
    value = record[field]
    if value is None:
        raise UserError(f"{place}: field '{field}' is null; fill it in or remove the example")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{place}: field '{field}' must be text, got {type(value).__name__}; put it in quotes")
    return whole(value, field, place)


def whole(text: str, field: str, place: str) -> str:
    """``text`` unchanged. Raises UserError where it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: field '{field}' holds half a character (unpaired surrogate); remove it") from error
    return text


def answer_field(record: RawRecord, field: str, place: str) -> str:
    """``record[field]`` as text that is not empty."""
    answer = text_field(record, field, place)
    if not answer.strip():
        raise UserError(
            f"{place}: field '{field}' is empty; every example needs a response: fill it in or remove the example"
        )
    return answer


def label_field(record: RawRecord, field: str, place: str) -> str:
    """``record[field]`` as a non-empty label; whole numbers count as text."""
    value = record.get(field)
    label = str(value) if isinstance(value, int) else text_field(record, field, place, f"the label column '{field}'")
    if not label.strip():
        raise UserError(f"{place}: field '{field}' is empty; every example needs a label there")
    return label


def parsed(value: Any, field: str, place: str) -> Any:
    """``value``, parsed as JSON where it is text: tables keep lists in this form."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: field '{field}' is text that is not JSON ({error}); write it as a list") from None


def written(value: Any, field: str, place: str) -> str:
    """``value`` as JSON text, its keys in the given order; "" for an empty value."""
    try:
        return whole(json.dumps(value, ensure_ascii=False), field, place) if value else ""
    except TypeError as error:
        raise UserError(f"{place}: field '{field}' holds no JSON value ({error}); write it as text") from None


def is_given(value: Any) -> bool:
    """True for an optional field with a value: no null, no empty text, no empty list, no NaN."""
    return value is not None and value != "" and value != [] and value == value  # NaN differs from itself


def names(record: RawRecord) -> str:
    return ", ".join(sorted(map(str, record))) or "nothing"
