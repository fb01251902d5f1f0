"""Overrides by dotted keys: ``training.lr=3e-4``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mira.config.sections import SECTIONS
from mira.config.yaml_io import value as yaml_value
from mira.core.errors import UserError

Path = tuple[str, ...]


def override(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``values`` with all overrides applied in order. Raises UserError for text other than key=value."""
    result = copy.deepcopy(dict(values))
    given: set[Path] = set()
    for text in overrides:
        path, value = _split(text)
        if len(path) == 2:
            _forget_former_variant(result, *path, str(value), keep=given)
        _assign(result, path, value, text)
        given |= {path, *((*path, key) for key in value)} if isinstance(value, dict) else {path}
    return result


def _split(text: str) -> tuple[Path, Any]:
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"override '{text}': must be key=value, for example training.lr=0.001")
    return path, yaml_value(value, f"override '{text}'")


def _forget_former_variant(values: dict[str, Any], section: str, key: str, new: str, keep: set[Path]) -> None:
    """If ``section.key`` chooses a variant, remove the fields that only the former variant has. Fields in ``keep`` stay: an
    override gave them, so that an unknown one is the user's mistake and must be reported."""
    registry = SECTIONS.get(section)
    former = values.get(section) or {}
    if registry is None or key != registry.tag or not isinstance(former, dict):
        return
    old = str(former.get(key, registry.default))
    if old in registry and new in registry:
        lost = _names(registry[old]) - _names(registry[new])
        values[section] = {name: x for name, x in former.items() if name not in lost or (section, name) in keep}


def _names(variant: type) -> set[str]:
    return {field.name for field in fields(variant)}


def _assign(values: dict[str, Any], path: Path, value: Any, text: str) -> None:
    for depth, part in enumerate(path[:-1], 1):
        inner = values.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"override '{text}': {'.'.join(path[:depth])} is a value, not a section")
        values[part] = inner if inner is not None else {}
        values = values[part]
    values[path[-1]] = value
