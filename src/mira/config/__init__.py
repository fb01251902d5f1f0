"""The experiment: typed, documented fields <-> YAML. Unknown keys are errors; ``a.b=value`` overrides a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mira.config.experiment import Experiment, refresh
from mira.config.moved import check_there, moved
from mira.config.overrides import override
from mira.config.sections import SECTIONS
from mira.config.yaml_io import flat, mapping, read, write
from mira.core.pydantic_config import expanded
from mira.core.registry import plugins as registered
from mira.core.types import uses_graph
from mira.data.sources.sites import Sites
from mira.methods.heterogeneous_ranks import check_names

__all__ = [
    "Experiment",
    "absolute",
    "check_ranks",
    "check_there",
    "clients_are_remote",
    "dated",
    "differences",
    "dump",
    "load",
    "mixes_along_graph",
    "moved",
    "override",
    "parse",
    "parse_text",
    "plugins",
    "read",
    "recorded",
    "schema",
]  # fmt: skip


def load(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """``Experiment.from_yaml``."""
    return Experiment.from_yaml(path, overrides)


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
    named = {section: getattr(getattr(experiment, section), registry.tag, "") for section, registry in SECTIONS.items()}
    return registered((SECTIONS[section], name) for section, name in named.items())  # "": a site's own data


def check_ranks(experiment: Experiment, names: Sequence[str]) -> None:
    """Raises UserError where clients.rank names someone who is none of the clients ``names``."""
    check_names(experiment.clients.rank, names)


def mixes_along_graph(method: str) -> bool:
    """Whether the method called ``method`` has a graph; False where it is not installed."""
    return uses_graph(SECTIONS["method"].get(method))


def clients_are_remote(experiment: Experiment) -> bool:
    """Whether its clients are sites on machines of their own, with their data."""
    return isinstance(experiment.data, Sites)


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
