"""Graphs known before training: all pairs of clients, or the pairs within each group."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.graph import Embed, Graph, Groups
from mira.core.pydantic_config import STRICT


@dataclass(frozen=True, config=STRICT)
class Complete:
    """a_kl = 1 between all clients."""

    name: Literal["complete"] = "complete"

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed | None = None) -> Graph:
        return Groups(torch.zeros(len(names), dtype=torch.int64))


@dataclass(frozen=True, config=STRICT)
class GroupsGraph:
    """a_kl = 1 between clients of the same group (task family, category), 0 across."""

    name: Literal["groups"] = "groups"

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed | None = None) -> Graph:
        missing = [name for name, group in zip(names, groups, strict=True) if not group]
        if missing:
            raise UserError(
                f"graph.name=groups: {len(missing)} of {len(names)} clients have no group (first: '{missing[0]}'); "
                "give the data a group, or use graph.name=complete"
            )
        number = {group: n for n, group in enumerate(sorted(set(groups)))}
        return Groups(torch.tensor([number[group] for group in groups]))
