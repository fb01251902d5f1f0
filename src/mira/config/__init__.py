"""The experiment: typed, documented fields <-> YAML. Unknown keys are errors; ``a.b=value`` overrides a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mira.config.experiment import SECTIONS, Experiment, refresh
from mira.config.moved import check_there, moved
from mira.config.overrides import override
from mira.config.yaml_io import flat, mapping, read, write
from mira.core.pydantic_config import expanded
from mira.registry import plugins as registered

__all__ = [
    "Experiment", "absolute", "check_there", "dated", "differences", "dump", "load", "moved", "override", "parse", "parse_text",
    "plugins", "read", "recorded", "schema",
]  # fmt: skip


def load(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a YAML file. ``overrides``: dotted keys with YAML values, e.g. ``training.lr=3e-4``.

    An override that changes the variant of a section (``method.name=fedit``) drops what the file says of the former
    variant and the new one does not have. Raises UserError, one line that names the file and line or the key.
    """
    return parse(override(read(Path(path)), overrides))


def parse(values: Mapping[str, Any]) -> Experiment:
    """The experiment of a mapping as YAML gives it. Raises UserError."""
    return Experiment(**values)


def parse_text(text: str, where: str = "config.yaml") -> Experiment:
    """The experiment of a YAML text, such as ``dump`` gives. Raises UserError."""
    return parse(mapping(text, where))


def recorded(text: str, environment: Mapping[str, Any], where: Path | str) -> Experiment:
    """The experiment of the run folder ``where``, from its configuration and its environment. Raises UserError where a plug-in
    that the run was made with is not installed or registered."""
    for section, origin in environment.get("plugins", {}).items():
        SECTIONS[section].check_recorded(origin["name"], origin, str(where))
    return parse_text(text)


def plugins(experiment: Experiment) -> dict[str, dict[str, str]]:
    """The classes of an experiment that come from outside, by section: name, place, package and version."""
    chosen = [(registry, getattr(getattr(experiment, section), registry.tag)) for section, registry in SECTIONS.items()]
    return registered(chosen)


def dump(experiment: Experiment) -> str:
    """YAML with every field, defaults included: ``load`` gives the same experiment back."""
    values = experiment.model_dump(mode="json")
    for section, registry in SECTIONS.items():
        values[section] = {registry.tag: values[section].pop(registry.tag), **values[section]}
    return write(values)


def absolute(experiment: Experiment) -> Experiment:
    """The same experiment with absolute paths and a chat template's text, so that its run folder can be used from anywhere."""
    update: dict[str, Any] = {"prompt": experiment.prompt.read()}
    for section in ("data", "graph"):
        value: Any = getattr(experiment, section)
        paths = {f.name: p.absolute() for f in fields(value) if isinstance(p := getattr(value, f.name), Path)}
        update[section] = replace(value, **paths)
    start = getattr(experiment.adapter, "start", None)
    if start is not None and (folder := expanded(Path(start))).is_dir():
        update["adapter"] = replace(experiment.adapter, start=str(folder.absolute()))
    if (folder := expanded(Path(experiment.model.name))).is_dir():
        update["model"] = replace(experiment.model, name=str(folder.absolute()))
    return experiment.model_copy(update=update)


def dated(experiment: Experiment, day: str | None) -> Experiment:
    """``experiment`` with ``day`` in its prompts, unless it names one."""
    day = experiment.prompt.date or day
    return experiment.model_copy(update={"prompt": replace(experiment.prompt, date=day)})


def schema() -> dict[str, Any]:
    """JSON schema, for editors."""
    refresh()
    return Experiment.model_json_schema()


def differences(here: Experiment, there: Experiment) -> list[str]:
    """One line for each field that differs: 'training.lr: 0.001 here, 0.002 there'."""
    a, b = (dict(flat("", each.model_dump(mode="json"))) for each in (here, there))
    keys = [*a, *(key for key in b if key not in a)]
    return [
        f"{key}: {a.get(key, 'absent')} here, {b.get(key, 'absent')} there" for key in keys if a.get(key) != b.get(key)
    ]
