"""The public functions of MIRA: run, resume, open_run, compare, register. They take names or objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mira import config as configuration
from mira.comparison import compare as run_comparison
from mira.comparison import load as load_comparison
from mira.config import Experiment
from mira.config.sections import SECTIONS
from mira.core.errors import UserError
from mira.core.pydantic_config import expanded
from mira.core.registry import fields_of
from mira.core.types import Change, Method, ServerState, Setting, Trained, Work
from mira.results.run_folder import Run
from mira.runner import run as runner
from mira.runner.callbacks import Callback, Callbacks, EarlyStopping
from mira.runner.objects import Client, Example, Objects

__all__ = [
    "Callback", "Change", "Client", "EarlyStopping", "Example", "Experiment", "Method", "Run", "ServerState", "Setting",
    "Trained", "UserError", "Work", "compare", "open_run", "register", "resume", "run",
]  # fmt: skip

Config = Experiment | Mapping[str, Any] | Path | str
Data = Sequence[Client] | Mapping[str, Iterable[Any]]
Loaded = tuple[Any, Any]


def run(
    config: Config, out: Path | str | None = None, callbacks: Sequence[Callback] = (), *, method: Any = None,
    graph: Any = None, adapter: Any = None, model: Loaded | None = None, data: Data | None = None,
) -> Run:  # fmt: skip
    """Run an experiment in the new folder ``out`` (default runs/NAME-TIME) and return it finished.

    ``config``: an ``Experiment``, a mapping of its sections, or a YAML file. The objects below take precedence over it.
    ``method``, ``graph``, ``adapter``: instances of MIRA's classes or of your own. ``model``: a pair of a ``transformers`` model
    and its tokenizer; both stay unchanged. ``data``: a list of ``Client``, or a dict of client names to examples (a list of
    dicts, or a ``datasets.Dataset``). ``callbacks``: receive every record and may stop the run. Raises UserError.
    """
    Callbacks(callbacks)  # wrong ones are refused before the model is read
    chosen = {"method": method, "graph": graph, "adapter": adapter}
    objects = Objects.of(model, data, _name(config))
    experiment = _experiment(config, chosen, objects)
    result = runner.run(experiment, out, callbacks, objects.open_to_run)
    return Run(Path(result["run"]), objects=objects, callbacks=callbacks)


def resume(
    folder: Path | str, callbacks: Sequence[Callback] = (), *, model: Loaded | str | None = None,
    data: Data | Path | str | None = None, engine: Mapping[str, Any] | None = None,
) -> Run:  # fmt: skip
    """Resume the run in ``folder`` after its last committed round, and return it finished.

    The result is bit-identical to that of an uninterrupted run. ``model``, ``data``: the objects that the run was started with,
    or the new place of either if it was moved. ``engine``: other ``devices``, ``workers`` or ``ray`` (docs/devices.md), with
    which the numbers are the same up to rounding. Raises UserError.
    """
    found = open_run(folder, model=model, data=data)
    result = runner.resume(found.folder, callbacks, found.objects.open_to_run, found.data, found.model, engine)
    return Run(Path(result["run"]), found.data, found.model, found.objects, callbacks)


def open_run(
    folder: Path | str, callbacks: Sequence[Callback] = (), *, model: Loaded | str | None = None,
    data: Data | Path | str | None = None,
) -> Run:  # fmt: skip
    """Open the run in ``folder``, finished or under way. The folder is read on first use.

    ``model``, ``data``: the objects that the run was started with, or the new place of either if it was moved.
    """
    Callbacks(callbacks)
    place = Path(data) if isinstance(data, Path | str) else None
    name = model if isinstance(model, str) else None
    objects = Objects.of(None if isinstance(model, str) else model, None if isinstance(data, Path | str) else data)
    return Run(expanded(Path(folder)), place, name, objects, callbacks)


def compare(
    config: Path | str, out: Path | str | None = None, results: Path | str | None = None, overrides: Sequence[str] = (),
    *, workers: int | Literal["auto"] = 1, unlike_machines: bool = False, ray: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the comparison of a YAML file in the folder ``out`` (default runs/NAME), and return the content of its compare.json
    (docs/commands/compare.md). Finished runs are not repeated; runs that failed are listed under ``failed``.

    ``results``: a second folder for the tables. ``workers``: runs at a time; 1: in this process; more: in processes of their own,
    which do not know the classes of ``mira.register``; "auto": what cores and memory allow. ``unlike_machines``: allow runs of
    unlike processors, devices or libraries. ``ray``: run on a Ray cluster instead: "auto", that of this machine, started if none
    runs; or HOST:PORT. Raises UserError."""
    plan = load_comparison(Path(config), overrides)
    place = Path("runs") / plan.name if out is None else expanded(Path(out))
    return run_comparison(
        plan, place, f"mira.compare({str(config)!r})", None if results is None else Path(results), workers=workers,
        unlike=unlike_machines, ray=ray,
    )  # fmt: skip


def register(
    *, method: type | None = None, graph: type | None = None, source: type | None = None, adapter: type | None = None
) -> None:
    """Register classes of your own under their names, for every configuration in this process. A package registers its classes
    as entry points of mira.methods, mira.graphs, mira.sources and mira.adapters (docs/plugins.md). Raises UserError for an
    incomplete class, and for an instance."""
    given = {"method": method, "graph": graph, "data": source, "adapter": adapter}
    if all(cls is None for cls in given.values()):
        raise UserError("mira.register: nothing is given; give a class as method=, graph=, source= or adapter=")
    for section, cls in given.items():
        if cls is not None:
            SECTIONS[section].add(cls)


def _name(given: Config) -> str | None:
    """The base model's name in a mapping; adapters refer to it."""
    section = given.get("model") if isinstance(given, Mapping) else None
    return section.get("name") if isinstance(section, Mapping) else None


def _experiment(given: Config, chosen: Mapping[str, Any], objects: Objects) -> Experiment:
    """Build the experiment with the given objects in it. Raises UserError."""
    if isinstance(given, Path | str):
        values: dict[str, Any] = dict(configuration.read(Path(given)))
    elif isinstance(given, Experiment):
        values = {name: getattr(given, name) for name in type(given).model_fields}
        # By its fields: a notebook cell that was run again has registered the class anew.
        values |= {section: fields_of(values[section]) for section in SECTIONS}
    else:
        values = dict(given)
    for section, instance in chosen.items():
        if instance is not None:
            values[section] = SECTIONS[section].adopt(instance)
    if (base := objects.base) is not None:
        dtype = str(base.model.dtype).removeprefix("torch.")
        values["model"] = {"name": base.name, "dtype": dtype, "quantization": base.quantization}
    if objects.clients is not None:
        values["data"] = {"source": "memory"}
    return configuration.parse(values)
