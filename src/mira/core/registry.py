"""Registries of the classes that a section of a configuration names.

A class is MIRA's own, an entry point of an installed package, or added by ``mira.register``. Methods, graphs, data sources and
adapters share this one shape.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    """The origin of a class from outside MIRA. ``place``: "module:Class". ``package``, ``version``: the installed distribution;
    both are "" for a class added by ``mira.register``."""

    place: str
    package: str = ""
    version: str = ""


class Registry(Mapping[str, type]):
    """The classes of one ``section`` of a configuration, by the value of their field ``tag``.

    ``group``: entry-point group of plug-ins. ``needs``: required functions of a class. ``default``: name used when the
    configuration gives none. ``own``: MIRA's own classes.
    """

    def __init__(
        self, section: str, tag: str, group: str, needs: Sequence[str], default: str | None, own: Mapping[str, type]
    ) -> None:
        self.section, self.tag, self.group, self.needs, self.default = section, tag, group, tuple(needs), default
        self.changes = 0
        """Number of classes added so far. A schema built from fewer is out of date."""
        self._own = dict(own)
        self._added: dict[str, type] = {}
        self._plugins: dict[str, Plugin] = {}
        self._broken: dict[str, str] = {}
        self._found = False

    def __getitem__(self, name: str) -> type:
        self._find()
        return self._own[name] if name in self._own else self._added[name]

    def __iter__(self) -> Iterator[str]:
        self._find()
        return iter((*self._own, *self._added))

    def __len__(self) -> int:
        self._find()
        return len(self._own) + len(self._added)

    def add(self, cls: type) -> None:
        """Register ``cls`` under its name in this process, in place of an earlier class of that name. Raises UserError for an
        incomplete class, and for a name of MIRA's own."""
        if not isinstance(cls, type):
            raise UserError(
                f"mira.register({_keyword(self.section)}=...): takes a class, not an instance of"
                f" {type(cls).__name__}; give the class itself"
            )
        self._find()
        self._add(cls, Plugin(f"{cls.__module__}:{cls.__qualname__}"))

    def adopt(self, instance: Any) -> dict[str, Any]:
        """Register the class of ``instance`` unless it is registered already, and return the instance as a section of a
        configuration: its fields by name, which are still to be validated. Raises UserError as ``add`` does."""
        if isinstance(instance, type):
            raise UserError(f"{self.section}: give an instance, {instance.__name__}(), not the class")
        kind = type(instance)
        if isinstance(instance, str | Mapping | Path):
            raise UserError(
                f"{self.section}: {self.section}= takes an instance of a class, not {kind.__name__}; put a name or a section into"
                f" the configuration, as {self.section}.{self.tag}"
            )
        if kind.__module__.split(".")[0] in ("peft", "torch", "numpy", "builtins") and kind is not object:
            hint = (
                "; of PEFT's settings, make a kind of adapter (docs/adapters.md)"
                if kind.__module__[:4] == "peft"
                else ""
            )
            raise UserError(
                f"{self.section}: {self.section}= takes an instance of one of MIRA's classes or of your own dataclass, not"
                f" {kind.__module__.split('.')[0]}'s {kind.__name__}{hint}"
            )
        if self.get(str(getattr(instance, self.tag, ""))) is not type(instance):
            self.add(type(instance))
        return fields_of(instance)

    def plugin(self, name: str) -> Plugin | None:
        """The origin of the class called ``name``; None for MIRA's own."""
        self._find()
        return self._plugins.get(name)

    def fault(self, name: object) -> str | None:
        """The reason why the installed plug-in ``name`` cannot be used; None if there is none."""
        self._find()
        return None if name in self._own else self._broken.get(str(name))

    def check_recorded(self, name: str, recorded: Mapping[str, str], where: str) -> None:
        """Raise UserError if the class ``name`` of a run came from a plug-in that is missing now. ``recorded``: its ``Plugin`` as
        the run recorded it. ``where``: the run folder."""
        if name in self:
            return
        package, version = recorded.get("package", ""), recorded.get("version", "")
        text = f"{where}: its {self.section}.{self.tag}={name} is {recorded.get('place', 'a class from outside')}"
        if (fault := self.fault(name)) is not None:
            raise UserError(f"{text}; {fault}")
        if package:
            raise UserError(
                f"{text} of {package} {version}, which is not installed; pip install '{package}=={version}'"
            )
        raise UserError(
            f"{text}, which is not registered; call mira.register({_keyword(self.section)}=...) with it first"
        )

    def _add(self, cls: type, origin: Plugin) -> None:
        name = self._name(cls)
        missing = [need for need in self.needs if not callable(getattr(cls, need, None))]
        if missing:
            raise UserError(
                f"{origin.place}: a {self.section} needs the functions {', '.join(self.needs)}; lacks {missing[0]}"
            )
        if name in self._own:
            raise UserError(f"{origin.place}: {self.section}.{self.tag}={name} is MIRA's own; give yours another name")
        if "__pydantic_config__" not in vars(cls):
            cls.__pydantic_config__ = STRICT  # type: ignore[attr-defined]  # a plain dataclass: unknown keys are errors
        _check_fields(cls, origin.place)
        self._added[name], self._plugins[name] = cls, origin
        self._broken.pop(name, None)
        self.changes += 1

    def _name(self, cls: type) -> str:
        place = f"{cls.__module__}:{cls.__qualname__}"
        if not is_dataclass(cls):
            raise UserError(
                f"{place}: must be a dataclass (its fields are keys of the section); add @dataclass(frozen=True)"
            )
        name = {field.name: field.default for field in fields(cls)}.get(self.tag)
        if not isinstance(name, str):
            raise UserError(
                f"{place}: needs a field {self.tag} whose default is its name, as in {self.tag}: str = 'mine'"
            )
        return name

    def _find(self) -> None:
        """Load the plug-ins of installed packages once. A broken one is reported, and refused when a configuration names it."""
        if self._found:
            return
        self._found = True
        for point in sorted(entry_points(group=self.group), key=lambda point: (point.name, _package(point))):
            origin = Plugin(point.value, _package(point), point.dist.version if point.dist else "")
            try:
                self._load(point, origin)
            except (Exception, SystemExit) as error:  # any error of foreign code: the other plug-ins must still load
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                text = str(error) if isinstance(error, UserError) else reason
                self._broken[point.name] = f"the plug-in {point.name} of {origin.package} cannot be used: {text}"
                log.warning("%s.%s: %s", self.section, self.tag, self._broken[point.name])

    def _load(self, point: EntryPoint, origin: Plugin) -> None:
        if (other := self._plugins.get(point.name)) is not None:
            raise UserError(f"{other.package} offers that name too; uninstall one of the two")
        cls = point.load()
        if not isinstance(cls, type):
            raise UserError(f"{point.value} is not a class")
        if self._name(cls) != point.name:
            raise UserError(f"the name of its class is {self._name(cls)}; give the entry point the same name")
        self._add(cls, origin)


def fields_of(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass that its constructor takes, by name."""
    return {field.name: getattr(instance, field.name) for field in fields(instance) if field.init}


def _check_fields(cls: type, place: str) -> None:
    """Raise UserError where a field of ``cls`` is of a type that a configuration cannot give."""
    try:
        TypeAdapter(cls)
    except (PydanticSchemaGenerationError, PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise UserError(
            f"{place}: has a field that a configuration cannot give ({str(error).splitlines()[0]}); use numbers, text, lists,"
            " dicts or dataclasses of them"
        ) from None


def plugins(chosen: Iterable[tuple[Registry, str]]) -> dict[str, dict[str, str]]:
    """The plug-ins among the ``chosen`` classes, for the environment of a run: section → name, place, package, version."""
    found = {registry.section: (name, registry.plugin(name)) for registry, name in chosen}
    return {section: {"name": name} | asdict(plugin) for section, (name, plugin) in found.items() if plugin is not None}


def _keyword(section: str) -> str:
    """The argument of ``mira.register`` for a class of ``section``."""
    return "source" if section == "data" else section


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else ""
