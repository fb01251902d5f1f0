"""The data and the model of a run that lie elsewhere now: what they hold decides whether they are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mira.config.experiment import Experiment
from mira.core.errors import UserError
from mira.core.pydantic_config import expanded


def moved(experiment: Experiment, data: Path | None = None, model: str | None = None) -> Experiment:
    """The same experiment, its data read from ``data`` and its base model from ``model`` (a folder or a name) where given."""
    update: dict[str, Any] = {}
    if data is not None:
        source: Any = experiment.data
        if not isinstance(getattr(source, "path", ""), Path | None):
            raise UserError(f"--data {data}: data.source={source.source} reads no file or folder; leave --data out")
        place = expanded(data).absolute()
        if not place.exists():
            raise UserError(f"--data {data}: no such file or folder; give the place where the run's data is now")
        update["data"] = replace(source, path=place)
    if model is not None:
        folder = expanded(Path(model))
        name = str(folder.absolute()) if folder.is_dir() else model
        update["model"] = replace(
            experiment.model, name=name, source="auto" if folder.is_dir() else experiment.model.source
        )
    return experiment.model_copy(update=update)


def check_there(experiment: Experiment, folder: Path, data: bool = True) -> None:
    """Raises UserError where the model of the run in ``folder``, or its ``data``, is not where it was."""
    path, name = getattr(experiment.data, "path", None), experiment.model.name
    if data and isinstance(path, Path) and not path.exists():
        raise UserError(f"{folder}: its data is not at {path} any more; say where it is now with --data PATH")
    if name.startswith("/") and not Path(name).is_dir():
        raise UserError(f"{folder}: its base model is not at {name} any more; say where it is now with --model NAME")
