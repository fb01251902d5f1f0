"""New places of a run's data and model. Their content, not their place, must be the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mira.config.experiment import Experiment
from mira.core.errors import UserError
from mira.core.pydantic_config import expanded


def moved(experiment: Experiment, data: Path | None = None, model: str | None = None) -> Experiment:
    """The same experiment, with its data at ``data`` and its base model at ``model`` (a folder or a name), where given."""
    update: dict[str, Any] = {}
    if data is not None:
        source: Any = experiment.data
        if not isinstance(getattr(source, "path", ""), Path | None):
            raise UserError(f"--data {data}: data.source={source.source} reads no file or folder; leave --data out")
        place = expanded(data).absolute()
        if not place.exists():
            raise UserError(f"--data {data}: no such file or folder; give the new place of the run's data")
        update["data"] = replace(source, path=place)
    if model is not None:
        folder = expanded(Path(model))
        name = str(folder.absolute()) if folder.is_dir() else model
        update["model"] = replace(
            experiment.model, name=name, source="auto" if folder.is_dir() else experiment.model.source
        )
    return experiment.model_copy(update=update)


def check_there(experiment: Experiment, folder: Path, data: bool = True, model: bool = True) -> None:
    """Raise UserError if the model of the run in ``folder`` is no longer in its place, or, with ``data``, its data."""
    path, name = getattr(experiment.data, "path", None), experiment.model.name
    if data and isinstance(path, Path) and not path.exists():
        raise UserError(f"{folder}: its data is no longer at {path}; give the new place with --data PATH")
    if model and name.startswith("/") and not Path(name).is_dir():
        raise UserError(f"{folder}: its base model is no longer at {name}; give the new place with --model NAME")
