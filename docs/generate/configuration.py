"""The configuration reference, from the JSON schema that `mira config schema` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mira import Experiment

Schema = dict[str, Any]


def reference() -> str:
    """Every key of the configuration as Markdown: a section for each key of the top level."""
    schema = Experiment.model_json_schema()
    defs = schema["$defs"]
    plain = {key: field for key, field in schema["properties"].items() if not sections(field, defs)}
    lines = ["## Top level", "", *table("", plain, schema.get("required", []), defs)]
    for key, field in schema["properties"].items():
        if key not in plain:
            lines += section(key, field, defs)
    return "\n".join(lines)


def section(key: str, field: Schema, defs: Schema, level: int = 2) -> Iterator[str]:
    found = sections(field, defs)
    yield from ["", f"{'#' * level} {key}", ""]
    if "description" in field:
        yield from [cell(field["description"]), ""]
    tag = field.get("discriminator", {}).get("propertyName")
    for name, variant in found.items():
        if tag and len(found) > 1:
            chosen = " (default)" if field.get("default", {}).get(tag) == name else ""
            yield from ["", f"{'#' * (level + 1)} `{key}.{tag}: {name}`{chosen}", ""]
        if "description" in variant:
            yield from [cell(variant["description"]), ""]
        fields = {k: v for k, v in variant["properties"].items() if k != tag}
        if fields:
            yield from table(key, fields, variant.get("required", []), defs)
        else:
            yield "No keys of its own."


def sections(field: Schema, defs: Schema) -> dict[str, Schema]:
    """Value of the tag → object schema, of a field that is an object or one of several; else nothing."""
    if "discriminator" in field:
        return {tag: defs[ref.rsplit("/", 1)[1]] for tag, ref in field["discriminator"]["mapping"].items()}
    refs = [part["$ref"] for part in [field, *field.get("anyOf", [])] if "$ref" in part]
    found = {ref.rsplit("/", 1)[1]: defs[ref.rsplit("/", 1)[1]] for ref in refs}
    return {name: schema for name, schema in found.items() if "properties" in schema}


def table(prefix: str, fields: Schema, required: list[str], defs: Schema) -> Iterator[str]:
    yield from ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        name = f"{prefix}.{key}".lstrip(".")
        default = "required" if key in required else code(field.get("default"))
        yield f"| `{name}` | {cell(kind(field, defs))} | {default} | {cell(field.get('description', ''))} |"
        yield from nested(name, sections(field, defs), defs)


def nested(name: str, variants: dict[str, Schema], defs: Schema) -> Iterator[str]:
    """Rows of a section within a section; of several variants each row names its own by the variant's constant."""
    for variant in variants.values():
        constants = {key: field["const"] for key, field in variant["properties"].items() if "const" in field}
        only = ", ".join(f"`{key}: {value}`: " for key, value in constants.items()) if len(variants) > 1 else ""
        for key, field in variant["properties"].items():
            if key not in constants:
                default = "required" if key in variant.get("required", []) else code(field.get("default"))
                text = cell(f"{only}{field.get('description', '')}").removesuffix(": ").removesuffix(":")
                yield f"| `{name}.{key}` | {cell(kind(field, defs))} | {default} | {text} |"


def kind(field: Schema, defs: Schema) -> str:
    """The type of a field in a few words, with its bounds."""
    if "$ref" in field:
        inner = defs[field["$ref"].rsplit("/", 1)[1]]
        return kind(inner, defs) if "properties" not in inner else "section"
    if "const" in field:
        return code(field["const"])
    if "enum" in field:
        return " or ".join(code(value) for value in field["enum"])
    if parts := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(kind(part, defs) for part in parts))
    if field.get("type") == "array":
        return f"list of {kind(field.get('items', {}), defs)}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"map to {kind(values, defs)}" if isinstance(values, dict) else "map"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
    bounds = [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
    limits = [f"{sign} {field[key]:.6g}" for key, sign in bounds if key in field and abs(field[key]) < 2**53]
    return " ".join([names.get(field.get("type", ""), "value"), ", ".join(limits)]).strip()


def code(value: Any) -> str:
    if isinstance(value, dict):
        return ""
    return f"`{json.dumps(value, ensure_ascii=False)}`" if value is not None else "`null`"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
