"""The offset of the base on its way to the sites: each row of it travels once to each site."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mira.fleet.messages.packet import OFFSET, fingerprint
from mira.fleet.server.requests import Request


@dataclass
class OffsetOfSites:
    """The offset ``rows`` [n,P] of the run's base; None for a method that leaves the base as it is. ``known``: the number of
    its first rows that each site has, as its last reply to them shows."""

    rows: Tensor | None = None
    known: dict[str, int] = field(default_factory=dict)
    _sha256: str = ""

    def change(self, rows: Tensor | None) -> None:
        """Take the offset of another state. Sites keep the rows that both have at their beginning, if one continues the other."""
        before, self.rows = self.rows, rows
        if rows is None or rows is before:
            return
        if before is not None:
            both = min(len(rows), len(before))
            both = both if torch.equal(rows[:both], before[:both]) else 0
            self.known = {name: min(number, both) for name, number in self.known.items()}
        self._sha256 = fingerprint(rows)

    def added_to(self, request: Request, name: str) -> Request:
        """``request`` to the site ``name`` with the rows that it lacks. It is exact in every ``server.wire``."""
        if self.rows is None:
            return request
        first = min(self.known.get(name, 0), len(self.rows))
        tensors = {OFFSET: self.rows[first:]} if first < len(self.rows) else {}
        told = {"first": first, "sha256": self._sha256}
        return replace(request, values=request.values | {OFFSET: told}, tensors=request.tensors | tensors)

    def note(self, name: str, answered: bool) -> None:
        """Note whether a site has answered a request with the offset. One that has not is sent all of it again."""
        if self.rows is not None:
            self.known[name] = len(self.rows) if answered else 0
