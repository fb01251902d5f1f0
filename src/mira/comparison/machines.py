"""Machines of a comparison's runs: which one computed a run, and whether all are alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mira.comparison.plan import Job
from mira.core.errors import UserError
from mira.core.machine import host, machine
from mira.core.versions import LIBRARIES, version_of
from mira.store.files import WHERE, corrupt, pack_json, read_json, replace

Place = dict[str, Any]  # host, processor, cores, system, device

_ALIKE = ("processor", "system", "device")
_DIFFER = "in the other runs, so that numbers may differ in their last digits"
_OTHERWISE = "allow that with --unlike-machines, or start another comparison with --out"
_KEYS = {"host", "processor", "cores", "system", "device"}


def place_of(device: str) -> Place:
    """The machine of this process. ``device``: model.device of an experiment; the place has "cpu", or the name of the GPU."""
    gpu = device != "cpu" and torch.cuda.is_available()
    return _place(machine()) | {"host": host(), "device": torch.cuda.get_device_name() if gpu else "cpu"}


def note(folder: Path, place: Place) -> None:
    """Add ``place`` to the machines of the run in ``folder``, where it was not the last one."""
    known = noted(folder)
    if known[-1:] != [place]:
        replace(folder / WHERE, pack_json([*known, place]))


def noted(folder: Path) -> list[Place]:
    """The machines in where.json, in order; none where there is no such file. Raises UserError where it is damaged."""
    path = folder / WHERE
    if not path.exists():
        return []
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(place, dict) and place.keys() >= _KEYS for place in found):
        raise corrupt(path, f"it has to be a list of machines, each with {', '.join(sorted(_KEYS))}")
    return found


def places_of(folder: Path, environment: Mapping[str, Any]) -> list[Place]:
    """The machines that the run in ``folder`` was computed on, in order. Runs of older versions recorded the first one, without
    its host and the name of its GPU."""
    cpu = environment["device"] == "cpu"
    return noted(folder) or [_place(environment["machine"]) | {"host": None, "device": "cpu" if cpu else None}]


def libraries() -> dict[str, str]:
    """The versions of the libraries that decide numbers, in this process."""
    return {name: version_of(name) for name in LIBRARIES}


def _place(found: Mapping[str, Any]) -> Place:
    # Without the release of the kernel, which decides no number.
    system = re.sub(r"^([^-]*)-.*?(-with-.*)?$", r"\1\2", found["platform"]).replace("-with-", " ")
    return {"host": None, "processor": found["processor"], "cores": found["cores"], "system": system}


@dataclass
class Same:
    """The environment of the first run, and the data of the first run of each seed; all other runs must have the same.

    ``unlike``: runs may differ in machine, device and libraries.
    """

    unlike: bool = False
    environment: dict[str, Any] = field(default_factory=dict)
    _place: Place = field(default_factory=dict)
    _versions: dict[str, str] = field(default_factory=dict)
    _data: dict[int, Any] = field(default_factory=dict)
    _plugins: dict[tuple[str, str], Any] = field(default_factory=dict)

    def check(self, job: Job, environment: dict[str, Any], places: list[Place]) -> None:
        """Raise UserError where the run of ``job`` differs from the others."""
        self.environment = self.environment or environment
        self._versions = self._versions or environment["versions"]
        keys = ("model", "threads") if self.unlike else ("versions", "model", "threads", "device")
        expected = {key: self.environment[key] for key in keys}
        expected["data"] = self._data.setdefault(job.seed, environment["data"])
        there = dict(environment)
        for section, plugin in environment.get("plugins", {}).items():
            key = f"plug-in {section} {plugin['name']}"
            there[key], expected[key] = plugin, self._plugins.setdefault((section, plugin["name"]), plugin)
        for key, value in expected.items():
            if there[key] != value:
                raise UserError(
                    f"{job.folder}: {key} is {there[key]}, but {value} in the other runs; runs of a comparison need the"
                    " same: restore it and remove this run folder, or start another comparison with --out"
                )
        for place in () if self.unlike else places:
            if difference := self._difference(place):
                raise UserError(
                    f"{job.folder}: its {difference}; remove this run folder to compute it anew, {_OTHERWISE}"
                )

    def difference(self, place: Place, versions: Mapping[str, str]) -> str | None:
        """Words for what makes a run on the machine ``place`` with libraries of ``versions`` unlike the others; None where
        nothing does. Before there is a run, this machine and its libraries are those of the others from now on."""
        if self.unlike:
            return None
        self._versions = self._versions or dict(versions)
        for name, version in versions.items():
            if version != (other := self._versions.get(name, version)):
                return f"{name} is {version}, but {other} {_DIFFER}"
        return self._difference(place)

    def check_here(self, device: str) -> None:
        """Raise UserError where a run in this process would be unlike the others. ``device``: model.device of the runs."""
        if difference := self.difference(place_of(device), libraries()):
            raise UserError(f"this machine: {difference}; go on with this comparison on one like theirs, {_OTHERWISE}")

    def _difference(self, place: Place) -> str | None:
        self._place = self._place or place
        for key in _ALIKE:
            if place[key] != self._place[key] and None not in (place[key], self._place[key]):
                return f"{key} is {place[key]}, but {self._place[key]} {_DIFFER}"
        return None
