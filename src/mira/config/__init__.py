"""Configuration of an experiment, read from YAML and written to it. Unknown keys are errors; ``a.b=value`` overrides a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mira.config import placement
from mira.config.experiment import Experiment, refresh
from mira.config.moved import check_there, moved
from mira.config.overrides import override
from mira.config.placement import Placement
from mira.config.sections import SECTIONS
from mira.config.strength import strength_told, with_strength
from mira.config.yaml_io import flat, mapping, read, write
from mira.core.errors import UserError
from mira.core.pydantic_config import expanded
from mira.core.registry import plugins as registered
from mira.core.types import uses_graph
from mira.data.sources.sites import Sites
from mira.methods.heterogeneous_ranks import check_names

__all__ = [
    "Experiment",
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
    "placed",
    "placement_in",
    "placement_of",
    "placement_told",
    "plugins",
    "read",
    "recorded",
    "resolved",
    "schema",
    "strength_told",
]  # fmt: skip


def load(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment; the same as ``Experiment.from_yaml``."""
    return Experiment.from_yaml(path, overrides)


def parse(values: Mapping[str, Any]) -> Experiment:
    """Build an experiment from a mapping of sections. Raises UserError."""
    return Experiment(**values)


def parse_text(text: str, where: str = "config.yaml") -> Experiment:
    """Build an experiment from a YAML text, such as that of ``dump``. Raises UserError."""
    return parse(mapping(text, where))


def recorded(text: str, environment: Mapping[str, Any], where: Path | str) -> Experiment:
    """The experiment of the run folder ``where``, from its configuration and its environment. Raises UserError if a plug-in of
    the run is neither installed nor registered."""
    for section, origin in environment.get("plugins", {}).items():
        SECTIONS[section].check_recorded(origin["name"], origin, str(where))
    return with_strength(parse_text(text))


def plugins(experiment: Experiment) -> dict[str, dict[str, str]]:
    """The plug-ins of an experiment, by section: name, place, package and version."""
    named = {section: getattr(getattr(experiment, section), registry.tag, "") for section, registry in SECTIONS.items()}
    return registered((SECTIONS[section], name) for section, name in named.items())  # "": a site's own data


def check_ranks(experiment: Experiment, names: Sequence[str]) -> None:
    """Raise UserError if clients.rank names a client outside ``names``."""
    check_names(experiment.clients.rank, names)


def mixes_along_graph(method: str) -> bool:
    """True if the method called ``method`` uses a graph; False if it is not installed."""
    return uses_graph(SECTIONS["method"].get(method))


def clients_are_remote(experiment: Experiment) -> bool:
    """True if the clients are sites on other machines, which keep their data."""
    return isinstance(experiment.data, Sites)


def dump(experiment: Experiment) -> str:
    """YAML of every field, defaults included; ``load`` restores the same experiment."""
    values = experiment.model_dump(mode="json")
    for section, registry in SECTIONS.items():
        values[section] = {registry.tag: values[section].pop(registry.tag), **values[section]}
    return write(values)


def resolved(experiment: Experiment) -> Experiment:
    """``experiment`` as its run folder holds it: with absolute paths and the text of its chat template, so that the folder works
    from any directory, and with the strength of its method."""
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
    return with_strength(experiment.model_copy(update=update))


def placed(experiment: Experiment, given: Placement) -> Experiment:
    """``experiment`` on other devices or workers. ``given``: some of the fields devices, workers and ray of the section engine.
    Raises UserError."""
    values = mapping(dump(experiment), "engine")
    values["engine"] |= placement.completed(given)
    return experiment.model_copy(update={"engine": parse(values).engine})


def placement_of(experiment: Experiment) -> dict[str, Any]:
    """The devices and workers of an experiment, as for ``placed``."""
    return {name: getattr(experiment.engine, name) for name in placement.FIELDS}


def placement_told(experiment: Experiment) -> str:
    """The devices or workers of an experiment, in words."""
    return placement.told(**placement_of(experiment))


def placement_in(overrides: Sequence[str]) -> dict[str, Any]:
    """The fields for ``placed`` in overrides such as "engine.workers=2". Raises UserError for another key."""
    allowed = [f"engine.{name}" for name in placement.FIELDS]
    for text in overrides:
        if text.partition("=")[0].strip() not in allowed:
            raise UserError(
                f"--set {text}: a run resumes with its own settings, {', '.join(allowed)} excepted; drop it, or start a new run"
            )
    engine = override({}, overrides).get("engine") or {}
    return dict(engine)


def dated(experiment: Experiment, day: str | None) -> Experiment:
    """``experiment`` with ``day`` as the date of its prompts, unless it sets one."""
    day = experiment.prompt.date or day
    return experiment.model_copy(update={"prompt": replace(experiment.prompt, date=day)})


def schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    refresh()
    return Experiment.model_json_schema()


_OVER_MACHINES = ("server.deadline", "server.minimum", "server.max_norm", "server.wire")


def differences(here: Experiment, there: Experiment) -> list[str]:
    """One line for each differing field: 'training.lr: 0.001 here, 0.002 there'. Those of rounds over machines have no effect on
    runs that are compared with a configuration."""
    a, b = (dict(flat("", each.model_dump(mode="json"))) for each in (here, there))
    keys = [key for key in (*a, *(key for key in b if key not in a)) if key not in _OVER_MACHINES]
    return [
        f"{key}: {a.get(key, 'absent')} here, {b.get(key, 'absent')} there" for key in keys if a.get(key) != b.get(key)
    ]
