"""Records as examples: the layout of each record, and its used and unused fields.

Field names are not case-sensitive. A record of two layouts at once is ambiguous and refused.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mira.core.errors import UserError
from mira.data.fields import RawRecord, answer_field, is_given, names, text_field
from mira.data.turns import conversation, pairs, turns, unused_in_turns
from mira.data.types import Example, Message

Ours = Literal[
    "instruction", "input", "output", "prompt", "completion", "messages", "conversations", "system", "history", "tools"
]
Columns = Mapping[Ours, str]  # our field -> the source's field

_QUESTIONS, _INPUTS, _ANSWERS = (
    ("instruction", "question", "query"),
    ("input", "context"),
    ("output", "response", "answer"),
)
_NEEDED = (*_QUESTIONS, *_ANSWERS, "prompt", "completion")
_TURNS = ("messages", "conversations", "conversation")
_ALSO = {"system_prompt": "system", "functions": "tools"}  # alternative name -> ours
_KNOWN = "instruction + output (input optional), prompt + completion, or messages"

_log = logging.getLogger(__name__)


@dataclass
class Tally:
    """A reader of the records of one source, with counts of their layouts and of unused fields. ``also``: fields with another
    use, such as the client's name. ``columns``: our fields -> the source's; empty: the source has our names."""

    also: Collection[str] = ()
    columns: Columns = field(default_factory=dict)
    layouts: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    def example(self, place: str, record: RawRecord) -> Example:
        example, layout, unused = _read(mapped(record, self.columns, place), place)
        taken = {*self.also, *self.columns.values()}
        rest = {key for key in record if is_given(record[key])} - taken if self.columns else set()
        self.layouts[layout] += 1
        self.unused.update({*unused, *rest} - taken)
        return example

    def examples(self, records: Iterable[tuple[str, RawRecord]]) -> list[Example]:
        return [self.example(place, record) for place, record in records]

    def tell(self) -> None:
        """Log the unused fields, once for the whole source."""
        if self.unused:
            total = self.layouts.total()
            which = ", ".join(f"'{key}' (in {count} of {total} examples)" for key, count in sorted(self.unused.items()))
            _log.warning("unused fields: %s", which)


def to_example(record: RawRecord, place: str) -> Example:
    """The example of a record in one of the known layouts. Raises UserError naming ``place``."""
    return _read(record, place)[0]


def mapped(record: RawRecord, columns: Columns, place: str) -> RawRecord:
    """The record under our field names; ``columns`` maps ours to the source's, empty where they are the same."""
    for ours, theirs in columns.items():
        if theirs not in record:
            raise UserError(
                f"{place}: no column '{theirs}' for '{ours}' (found: {names(record)}); mend the column mapping"
            )
    return {ours: record[theirs] for ours, theirs in columns.items()} if columns else record


def _read(record: RawRecord, place: str) -> tuple[Example, str, list[str]]:
    """The example, the name of its layout, and its unused fields that have a value."""
    given, spelt = _plain(record, place)
    shown = [key for key in _TURNS if key in given][:1]
    pair = _pair(given, place)
    raw = ["prompt", "completion"] if {"prompt", "completion"} <= set(given) else []
    found = [fields for fields in (shown, raw, pair) if fields]
    if len(found) > 1:
        one, other, *_ = (" + ".join(fields) for fields in found)
        raise UserError(f"{place}: has {one} and {other}, but only one can be learned; remove one of the two")
    if not found:
        raise UserError(f"{place}: {_missing(given, record)}")
    read = _messages if shown else _continued if raw else _answered
    example, used = read(given, found[0], place)
    unused = [spelt[key] for key in given if key not in {*found[0], *used}]
    inside = [key for name in found[0] for key in unused_in_turns(given, name)]
    return example, " + ".join(found[0]), [*unused, *dict.fromkeys(inside)]


def _plain(record: RawRecord, place: str) -> tuple[dict[str, object], dict[str, str]]:
    """The values of the record by field name in lower case, and the original spelling of each name."""
    given: dict[str, object] = {}
    spelt: dict[str, str] = {}
    for key, value in record.items():
        name = str(key).strip().lower()
        if name in spelt:
            raise UserError(f"{place}: has '{spelt[name]}' and '{key}'; remove one of the two")
        spelt[name] = key
        if is_given(value):
            given[name] = value
    for theirs, ours in _ALSO.items():
        if ours not in given and theirs in given:
            given[ours], spelt[ours] = given.pop(theirs), spelt[theirs]
    for name in (*_QUESTIONS, "prompt"):  # an empty question counts where there is no other: the input may have it all
        if name in spelt and record[spelt[name]] == "" and not {*_QUESTIONS, "prompt"} & set(given):
            given[name] = ""
    return given, spelt


def _pair(given: RawRecord, place: str) -> list[str]:
    """The fields of a question, its input and its answer; empty where question or answer is missing."""
    questions = [key for key in _QUESTIONS if key in given]
    inputs, answers = ([key for key in keys if key in given] for keys in (_INPUTS, _ANSWERS))
    if not questions and "prompt" in given and "completion" not in given:
        questions = ["prompt"]
    if not (questions and answers):
        return []
    for several, what in ((questions, "questions"), (inputs, "inputs"), (answers, "answers")):
        if len(several) > 1:
            raise UserError(f"{place}: has two {what}, '{several[0]}' and '{several[1]}'; remove one of the two")
    return [*questions, *inputs, *answers]


def _messages(given: RawRecord, fields: list[str], place: str) -> tuple[Example, list[str]]:
    return conversation(turns(given, fields[0], place), given, fields[0], place), ["system", "tools"]


def _continued(given: RawRecord, fields: list[str], place: str) -> tuple[Example, list[str]]:
    """A prompt to be continued without a template; a conversation where prompt or completion is a list of messages."""
    if not any(isinstance(given[key], list) for key in fields):
        prompt, completion = text_field(given, "prompt", place), answer_field(given, "completion", place)
        return Example(prompt, "", completion, raw=True, place=place), []
    asked, said = (
        turns(given, key, place, learned=key == "completion")
        if isinstance(given[key], list)
        else [Message("user" if key == "prompt" else "assistant", text_field(given, key, place))]
        for key in fields
    )
    return conversation([*asked, *said], given, "completion", place), ["system", "tools"]


def _answered(given: RawRecord, fields: list[str], place: str) -> tuple[Example, list[str]]:
    """A question and its answer; a conversation where there are a system message, tools or earlier turns."""
    question, answer = text_field(given, fields[0], place), answer_field(given, fields[-1], place)
    about = text_field(given, fields[1], place) if len(fields) == 3 else ""
    if not any(key in given for key in ("system", "history", "tools")):
        return Example(question, about, answer, place=place), []
    asked = Message("user", f"{question}\n\n{about}" if about else question)
    messages = [*pairs(given.get("history", []), place), asked, Message("assistant", answer)]
    return conversation(messages, given, "history", place), ["system", "history", "tools"]


def _missing(given: RawRecord, record: RawRecord) -> str:
    """A message with the missing field of a record and the fix."""
    if "text" in given and not {*_NEEDED} & set(given):
        return "field 'text' is free text without question and answer; give its beginning as 'prompt', the rest as 'completion'"
    if {"chosen", "rejected"} <= set(given):
        return "holds preferences; to learn the chosen answers set data.columns={prompt: prompt, completion: chosen}"
    for key, value in given.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            return f"the examples seem to be the list in field '{key}'; write that list alone into the file"
    for key in record:
        name = str(key).strip().lower()
        if name in _TURNS and record[key] is not None:
            return f"field '{key}' must be a list of turns, and has none; fill it in or remove the example"
        if name in _NEEDED and name not in given:
            return f"field '{key}' is {'empty' if record[key] == '' else 'null'}; fill it in or remove the example"
    asks = next((key for key in (*_QUESTIONS, "prompt") if key in given), None)
    answers = next((key for key in (*_ANSWERS, "completion") if key in given), None)
    lacks = {"prompt": "completion", "completion": "prompt"}.get(
        asks or answers or "", "output" if asks else "instruction"
    )
    return f"no field '{lacks}' (found: {names(record)}); needed: {_KNOWN}"
