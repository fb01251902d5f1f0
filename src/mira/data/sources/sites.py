"""Clients on machines of their own: the server knows their names and their counts of training examples."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError, did_you_mean
from mira.core.pydantic_config import STRICT
from mira.data.types import Client, Source

Count = Annotated[int, Field(strict=True, ge=1)]


@dataclass(frozen=True, config=STRICT)
class Sites:
    """Clients on machines of their own (mira server). ``examples`` is filled in when a run begins."""

    groups: dict[str, str] = Field(default_factory=dict)
    """Groups of sites, for graph.name=groups, given by the server's operator; sites are not asked."""
    descriptions: dict[str, str] = Field(default_factory=dict)
    """Task descriptions of sites, for graphs by similarity of descriptions."""
    expected: list[str] = Field(default_factory=list)
    """Sites that may join later, with or without a kit yet. Each has a place in the run from the start; the run does not wait for
    it, and it takes part from the round after it joins."""
    examples: dict[str, Count] = Field(default_factory=dict)
    """Training examples of each site, as counted by the site when it joined."""
    source: Literal["sites"] = "sites"

    def load(self, seed: int) -> list[Client]:
        if not self.examples:
            raise UserError("data.source=sites: the data is at the sites; run it with 'mira server'")
        known = dict.fromkeys(self.expected, 0) | self.examples
        for given in (*self.groups, *self.descriptions):
            if given not in known:
                raise UserError(f"data: no site is named '{given}'{did_you_mean(given, known)}")
        return [
            Client(name, group=self.groups.get(name, ""), description=self.descriptions.get(name, ""), elsewhere=count)
            for name, count in sorted(known.items())
        ]


@plain_dataclass(frozen=True)
class Own:
    """The data of one site: the client of ``inner`` with the site's ``name``; without such a client all clients as one."""

    inner: Source
    name: str
    source: str = "site"  # in no registry: no configuration names it

    def load(self, seed: int) -> list[Client]:
        found = self.inner.load(seed)
        mine = [client for client in found if client.name == self.name] or found
        if not mine:
            return []
        told = {client.description for client in mine}
        examples = tuple(example for client in mine for example in client.examples)
        return [Client(self.name, examples, description=told.pop() if len(told) == 1 else "")]
