"""Super-NaturalInstructions (Wang et al. 2022): each task file of the v2 layout is a client."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError, did_you_mean
from mira.core.pydantic_config import STRICT, UserPath
from mira.core.seeds import generator
from mira.data.fields import text_field
from mira.data.reading import existing, parse_json, read_text
from mira.data.types import Client, Example

MIN_INSTANCES = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, config=STRICT)
class NaturalInstructions:
    """Super-NaturalInstructions: the first definition and the first output of each task; the group is its first category. Tasks
    with fewer than 20 usable instances are left out and logged."""

    path: UserPath
    """The folder of task JSON files, or its parent with a tasks/ folder."""
    clients: Annotated[int, Field(ge=1)] | None = None
    """Number of usable tasks, evenly spaced in the order of their names, so that they span the categories; null: all."""
    tasks: tuple[str, ...] | None = None
    """The tasks to use (file names without .json); null: all in the folder."""
    max_input_chars: Annotated[int, Field(ge=1)] = 1024
    """Instances with an input of this length or longer are left out."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each task's usable instances to draw; the published experiments draw 0.2."""
    source: Literal["natural-instructions"] = "natural-instructions"

    def load(self, seed: int) -> list[Client]:
        every = [client for file in self._files() if (client := self._client(file, seed))]
        wanted = len(every) if self.clients is None else self.clients
        if len(every) < max(wanted, 1):
            raise UserError(
                f"data.clients={self.clients}: '{self.path}' holds {len(every)} usable tasks (at least"
                f" {MIN_INSTANCES} instances with inputs below {self.max_input_chars} characters); ask for fewer"
            )
        return [every[n * len(every) // wanted] for n in range(wanted)]

    def _files(self) -> list[Path]:
        folder = existing(self.path)
        folder = folder / "tasks" if (folder / "tasks").is_dir() else folder
        files = {file.stem: file for file in sorted(folder.glob("[!.]*.json"))}
        if not files:
            raise UserError(f"data.path='{self.path}': no task files (*.json) there; give the folder that holds them")
        for task in self.tasks or ():
            if task not in files:
                raise UserError(f"data.tasks: no task '{task}' in '{folder}'{did_you_mean(task, files)}")
        return [files[task] for task in sorted(set(self.tasks))] if self.tasks else list(files.values())

    def _client(self, file: Path, seed: int) -> Client | None:
        content = parse_json(read_text(file), file)
        definition, category = _first(content, "Definition", file), _first(content, "Categories", file)
        instances = content.get("Instances")
        if not isinstance(instances, list):
            raise UserError(f"{file}: field 'Instances' must be a list of {{id, input, output}}; is this a task file?")
        examples = [_example(instance, definition, f"{file}: Instances[{n}]") for n, instance in enumerate(instances)]
        short = [example for example in examples if len(example.input) < self.max_input_chars]
        if len(short) < MIN_INSTANCES:
            why = f"{len(short)} instances with inputs below {self.max_input_chars} characters, not {MIN_INSTANCES}"
            if self.tasks:
                raise UserError(f"data.tasks: '{file.stem}' has {why}; raise data.max_input_chars or leave it out")
            _log.warning("left out %s: %s", file.stem, why)
            return None
        order = torch.randperm(len(short), generator=generator("natural-instructions", seed, file.stem))
        drawn = tuple(short[int(i)] for i in order[: int(len(short) * self.share + 1e-9)].sort().values)
        return Client(file.stem, drawn, group=category, description=definition)


def _first(record: Any, field: str, place: Path | str) -> str:
    """The first text of a field with a list of texts."""
    if not isinstance(record, dict) or field not in record:
        raise UserError(
            f"{place}: no field '{field}'; needed: Definition, Categories and Instances of {{id, input, output}}"
        )
    values = record[field]
    if not isinstance(values, list) or not values:
        raise UserError(f"{place}: field '{field}' must be a list with at least one text")
    return text_field({field: values[0]}, field, str(place))


def _example(instance: Any, definition: str, place: str) -> Example:
    output = _first(instance, "output", place)
    if not output.strip():
        raise UserError(f"{place}: field 'output' is empty; every instance needs a response: fill it in or remove it")
    return Example(definition, text_field(instance, "input", place), output, place=place)
