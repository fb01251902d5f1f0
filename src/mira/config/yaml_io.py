"""Reading and writing of YAML with the scalars of YAML 1.2: ``on`` and ``no`` are text, ``1e-4`` is a number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mira.core.errors import UserError

_TAG = "tag:yaml.org,2002:"
_DIGITS = list("-+.0123456789")
_SCALARS = (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9_]{0,18})"), _DIGITS),
    ("float", re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"), _DIGITS),
    ("float", re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), _DIGITS),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
)


class _Loader(yaml.SafeLoader):
    """Loader that refuses duplicate keys and keys other than text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("bool", "int", "float", "null", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != _TAG + "str":
                raise yaml.MarkedYAMLError(problem="a key must be text; put it in quotes", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text if YAML 1.1 or 1.2 would read it as another type."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML loses some line breaks of Unicode in any other style.
        return self.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)

for _name, _pattern, _first in _SCALARS:
    _whole = re.compile(f"^(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _whole, _first)


def read(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Raises UserError that names the file, and the line if known."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    return mapping(text, str(path))


def mapping(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text; an empty text is an empty mapping. Raises UserError that begins with ``where``."""
    values = value(text, where)
    if not isinstance(values, dict | None):
        raise UserError(f"{where}: must be a mapping such as 'rounds: 3', got a {type(values).__name__}")
    return values or {}


def value(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError that begins with ``where``."""
    try:
        return yaml.load(text, _Loader)  # derived from the safe loader
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML ({problem or ' '.join(str(error).split())})") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML (nested too deeply)") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{where}: not valid YAML (a value that does not fit its tag: {error})") from None


def write(values: dict[str, Any]) -> str:
    """``values`` as YAML, in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as JSON."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(f"{prefix}{key}.", value)
        else:
            yield prefix + key, json.dumps(value, ensure_ascii=False)
