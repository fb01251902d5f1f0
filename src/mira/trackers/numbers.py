"""The numbers that trackers show, computed from a run's records by plain functions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic_core import to_jsonable_python

from mira.core.checks import FIELDS

CLIENTS = 100  # with more clients only means are shown: a curve for each would be slow and unreadable

_OF_DATA = ("data", "prompt")  # sections whose texts are columns, tasks and instructions

Record = Mapping[str, Any]
Labels = Mapping[str, str]  # client name → label of its curves

# Section and key of a client's number in a record → the group of its curve.
_OF_CLIENTS = (
    (("clients", "test_loss"), "test"),
    (("clients", "validation_loss"), "validation"),
    (("answers", "exact_match"), "exact_match"),
    (("answers", "rouge_l"), "ROUGE-L"),
)


def by_name(names: Sequence[str]) -> Labels:
    return {name: name for name in names} if len(names) <= CLIENTS else {}


def by_number(names: Sequence[str]) -> Labels:
    """Labels that reveal nothing: a client's name can be a value of the data, its number is its place in result.json."""
    width = len(str(len(names) - 1))
    return {name: f"client {k:0{width}}" for k, name in enumerate(names)} if len(names) <= CLIENTS else {}


def of_round(record: Record, labels: Labels) -> dict[str, float]:
    """All numbers of a round under their names in metrics.jsonl, the mean training loss, and 'train/CLIENT',
    'validation/CLIENT', 'test/CLIENT' for each client in ``labels``, with those of the method, such as 'strength/CLIENT'. Numbers
    that were not measured are absent."""
    numbers = _plain(record, without=("round",))
    numbers |= _plain(record.get("answers", {})) | _plain(record.get("transfer", {}))
    numbers |= {"lost": float(len(record["lost"]))} if "lost" in record else {}
    trained = {name: loss for name, loss in record.get("train_loss", {}).items() if loss is not None}
    if trained:
        numbers["train_loss"] = sum(trained.values()) / len(trained)
    numbers |= {f"train/{labels[name]}": loss for name, loss in trained.items() if name in labels}
    for key, values in record.items():
        if isinstance(values, Mapping) and key not in FIELDS:  # a method's numbers of single clients
            numbers |= {f"{key}/{labels[name]}": float(value) for name, value in values.items() if name in labels}
    for (section, key), group in _OF_CLIENTS:
        scores = record.get(section, {})
        for name, values in (scores if section == "clients" else scores.get("clients", {})).items():
            if name in labels and values.get(key) is not None:
                numbers[f"{group}/{labels[name]}"] = values[key]
    return numbers


def of_result(result: Record) -> dict[str, float]:
    """The headline numbers: 'final/...' of the last round, 'best/...' of the validation-best one."""
    last = _plain(result, without=("seed", "rounds"))
    best = _plain(result["best"])
    return {f"final/{key}": value for key, value in last.items()} | {f"best/{key}": v for key, v in best.items()}


def hyper_parameters(sections: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The ``sections`` of an experiment under dotted keys. Left out: mappings, whose keys are words of the user's own, such as
    names of clients; the texts of the sections data and prompt, except choices from a fixed list; null values; the section
    tracking. Other paths give their last part."""
    told = (_leaves(name, section, name not in _OF_DATA) for name, section in sections.items() if name != "tracking")
    return dict(chain.from_iterable(told))


def _leaves(name: str, value: Any, texts: bool) -> Iterator[tuple[str, bool | int | float | str]]:
    """The values in ``value``, which is called ``name``. ``texts``: texts are among them, not only choices."""
    if is_dataclass(value):
        known = getattr(value, "__pydantic_fields__", {})
        for each in fields(value):
            choice = each.name in known and get_origin(known[each.name].annotation) is Literal
            yield from _leaves(f"{name}.{each.name}", getattr(value, each.name), texts or choice)
    elif isinstance(value, bool | int | float):
        yield name, value
    elif texts and (plain := to_jsonable_python(value)) is not None and not isinstance(plain, dict):
        text = plain if isinstance(plain, str) else json.dumps(plain)
        yield name, Path(text).name if Path(text).is_absolute() else text


def _plain(values: Record, without: Sequence[str] = ()) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in without
    }
