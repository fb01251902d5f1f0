"""Sections of a configuration with a choice of classes: adapter, data, method, graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from mira.adapters import ADAPTERS
from mira.core.registry import Registry
from mira.core.types import Method
from mira.data import SOURCES
from mira.data.types import Source
from mira.graphs import GRAPHS
from mira.methods import METHODS

SECTIONS = {registry.section: registry for registry in (ADAPTERS, SOURCES, METHODS, GRAPHS)}
"""The registries of these sections, by section. A field of the section names the class."""


@dataclass(frozen=True)
class OneOf:
    """Schema of a section: one of the classes in its registry at the time the schema is built."""

    registry: Registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {name: handler.generate_schema(cls) for name, cls in self.registry.items()}
        return core_schema.tagged_union_schema(choices, discriminator=self.registry.tag)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Restrict the tag of each class to its name, so that an editor can tell the classes apart."""
        schema, tag = handler(core), self.registry.tag
        for name, place in schema["discriminator"]["mapping"].items():
            handler.resolve_ref_schema({"$ref": place})["properties"][tag]["const"] = name
        return schema


AdapterSection = Annotated[Any, OneOf(ADAPTERS)]
DataSection = Annotated[Source, OneOf(SOURCES)]
MethodSection = Annotated[Method, OneOf(METHODS)]
GraphSection = Annotated[Any, OneOf(GRAPHS)]
