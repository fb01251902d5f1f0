"""pydantic's errors as one line: the key, the given value, the allowed values, the nearest fix."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from reprlib import Repr
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mira.core.errors import UserError, did_you_mean

_NO_SECTION = ("model_type", "dataclass_type", "model_attributes_type", "dict_type", "mapping_type")
_short = Repr()
_short.maxstring = _short.maxother = 80

Schema = Mapping[str, Any]  # JSON schema


def explain(error: ValidationError, values: Mapping[str, Any], schema: Schema) -> str:
    """The first fault of ``values``, and the number of other keys with a fault. ``schema``: of all sections, for suggestions."""
    faults: dict[str, list[str]] = {}
    # Unknown keys go first: a misspelt key is often the reason why another one is missing.
    for detail in sorted(error.errors(), key=lambda detail: not _is_unknown_key(detail)):
        subject, text = _fault(detail, values, schema)
        faults.setdefault(subject, []).append(text)
    subject, texts = next(iter(faults.items()))
    line = ": ".join(filter(None, (subject, " or ".join(dict.fromkeys(texts)))))
    return f"{line} (and {len(faults) - 1} more)" if len(faults) > 1 else line


def _fault(detail: ErrorDetails, values: Mapping[str, Any], schema: Schema) -> tuple[str, str]:
    """A fault and its reason: 'training.optimizer='adam'', 'must be 'adamw' or 'sgd'; did you mean 'adamw'?'."""
    path, kind, context = _path(detail, values), detail["type"], detail.get("ctx", {})
    key = ".".join(part if part.isprintable() else repr(part) for part in path)
    given = f"{key}={_short.repr(detail['input'])}"
    if isinstance(context.get("error"), UserError):
        return str(context["error"]), ""
    if _is_unknown_key(detail):
        own = "expected" in context
        hint = did_you_mean(path[-1], _quoted(context["expected"])) if own else _nearest_key(path, values, schema)
        return key, f"unknown key{hint}"
    if kind == "missing":
        about = _section(path, values, schema).get("description", "")
        return key, f"missing; {about.splitlines()[0]}" if about else "missing"
    if kind == "union_tag_not_found":
        tag, allowed = context["discriminator"].strip("'"), _section(path, values, schema)["discriminator"]["mapping"]
        return f"{key}.{tag}", f"missing; must be one of {', '.join(allowed)}"
    if kind == "union_tag_invalid":
        allowed = _quoted(context["expected_tags"])
        tag = context["discriminator"].strip("'")
        return (
            f"{key}.{tag}={_short.repr(context['tag'])}",
            f"must be one of {', '.join(allowed)}{_near(context['tag'], allowed)}",
        )
    if kind == "literal_error":
        return given, f"must be {context['expected']}{_near(detail['input'], _quoted(context['expected']))}"
    if kind in _NO_SECTION:
        return given, "must be a section of keys and values"
    if kind == "value_error":
        return key, str(context["error"])
    text = detail["msg"].replace("Input should", "must").replace("String should", "must").replace("valid tuple", "list")
    return given, text


def _is_unknown_key(detail: ErrorDetails) -> bool:
    """True for an unknown key of a section, or of a mapping with fixed keys."""
    return detail["type"] in ("extra_forbidden", "unexpected_keyword_argument") or detail["loc"][-1:] == ("[key]",)


def _path(detail: ErrorDetails, values: Mapping[str, Any]) -> list[str]:
    """Path of the fault in ``values``: pydantic's location without the names of union members."""
    path: list[str] = []
    here: Any = values
    for part in detail["loc"]:
        if part in _places(here):
            here = here[part]
            path.append(str(part))
        elif detail["type"] == "missing" and part == detail["loc"][-1]:
            path.append(str(part))
    return path


def _places(value: Any) -> Collection[Any]:
    """Valid indices or keys of ``value``."""
    return range(len(value)) if isinstance(value, list | tuple) else value if isinstance(value, Mapping) else ()


def _section(path: list[str], values: Mapping[str, Any], schema: Schema) -> Schema:
    """Schema of the value at ``path``, in the variant that ``values`` choose."""
    node, here = schema, values
    for part in path:
        inner = here.get(part)
        here = inner if isinstance(inner, Mapping) else {}
        node = _resolved(node.get("properties", {}).get(part, {}), here, schema)
    return node


def _resolved(node: Schema, values: Mapping[str, Any], schema: Schema) -> Schema:
    if "discriminator" in node:
        tag, variants = node["discriminator"]["propertyName"], node["discriminator"]["mapping"]
        chosen = values.get(tag, node.get("default", {}).get(tag))
        node = {"$ref": variants[chosen]} if isinstance(chosen, str) and chosen in variants else node
    if "$ref" in node:
        definition: Schema = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        return {**definition, **{key: value for key, value in node.items() if key != "$ref"}}
    return node


def _nearest_key(path: list[str], values: Mapping[str, Any], schema: Schema) -> str:
    """A hint with the same name in another section, else with the nearest name in this one."""
    for section in schema["properties"]:
        if path[-1] in _section([section], values, schema).get("properties", {}):
            return f"; did you mean '{section}.{path[-1]}'?"
    return did_you_mean(path[-1], _section(path[:-1], values, schema).get("properties", {}))


def _near(given: Any, allowed: list[str]) -> str:
    hint = did_you_mean(str(given), allowed)
    return hint if "did you mean" in hint else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)
