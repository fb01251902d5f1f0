"""Super-NaturalInstructions (Wang et al. 2022): clients from the task files of the v2 layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT, Count, UserPath
from mira.core.seeds import generator
from mira.data.fields import text_field
from mira.data.reading import existing, parse_json, read_text
from mira.data.tasks import Mixture, exclude, mixed, named, questions_of, shared, spaced
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
    """Number of clients, which decides the number of tasks: they are chosen as with tasks; null: as many as the tasks give."""
    tasks: Count | tuple[str, ...] | None = None
    """The tasks to use (file names without .json), or a number of usable tasks, evenly spaced in the order of their names, so
    that they span the categories; null: all in the folder."""
    clients_per_task: Count = 1
    """Clients that share the instances of a task equally; none has an input of another. With more than one the group is the task,
    not the category."""
    mixture: Mixture | None = None
    """Clients that each draw from a few tasks, in place of clients for each task."""
    max_input_chars: Annotated[int, Field(ge=1)] = 1024
    """Instances with an input of this length or longer are left out."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each task's usable instances to draw; the published experiments draw 0.2."""
    source: Literal["natural-instructions"] = "natural-instructions"

    def __post_init__(self) -> None:
        exclude(self.clients_per_task, self.mixture)
        if self.clients is None:
            return
        if self.mixture is not None:
            raise UserError(
                f"data.clients={self.clients}: a mixture has its own; set data.mixture.clients, remove this one"
            )
        if isinstance(self.tasks, int):
            raise UserError(f"data.clients={self.clients}: data.tasks={self.tasks} decides it; remove one of the two")
        if self.clients % self.clients_per_task:
            raise UserError(
                f"data.clients={self.clients}: must be a multiple of data.clients_per_task={self.clients_per_task}"
            )

    def load(self, seed: int) -> list[Client]:
        tasks = self._chosen([client for file in self._files() if (client := self._client(file, seed))])
        if self.mixture is None:
            return shared(tasks, self.clients_per_task, seed, "lower data.clients_per_task")
        pools = {task.name: questions_of(task.examples) for task in tasks}
        return mixed(pools, self.mixture, None, seed, "data.mixture")

    def _chosen(self, every: Sequence[Client]) -> list[Client]:
        """The wanted number of the usable tasks, evenly spaced. Raises UserError where there are fewer."""
        key, wanted = "tasks", self.tasks if isinstance(self.tasks, int) else None
        if self.clients is not None:
            key, wanted = "clients", self.clients // self.clients_per_task
        if len(every) < (wanted or 1):
            raise UserError(
                f"data.{key}={getattr(self, key)}: '{self.path}' holds {len(every)} usable tasks (at least"
                f" {MIN_INSTANCES} instances with inputs below {self.max_input_chars} characters), and {wanted or 1} are"
                " needed; ask for fewer"
            )
        return spaced(every, wanted)

    def _files(self) -> list[Path]:
        folder = existing(self.path)
        folder = folder / "tasks" if (folder / "tasks").is_dir() else folder
        files = {file.stem: file for file in sorted(folder.glob("[!.]*.json"))}
        if not files:
            raise UserError(f"data.path='{self.path}': no task files (*.json) there; give the folder that holds them")
        return (
            named(files, self.tasks, f" in '{folder}'")
            if isinstance(self.tasks, tuple) and self.tasks
            else list(files.values())
        )

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
            if isinstance(self.tasks, tuple) and self.tasks:
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
