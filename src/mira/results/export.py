"""Export of a run's adapters as PEFT folders, merged models, files for llama.cpp, or repositories of the model hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mira.core.loop import Record
from mira.core.offset import offset_of
from mira.core.types import ServerState
from mira.runner.summary import ADAPTERS
from mira.serving import lines, push
from mira.serving.card import Use, card, origin
from mira.serving.folders import deployed, export_adapters, export_gguf, export_merged
from mira.serving.lines import Format
from mira.serving.push import Hub
from mira.setup.session import Session

__all__ = ["Hub", "Order", "check", "export"]


@dataclass(frozen=True)
class Order:
    """Settings of an export. ``clients``: their numbers. ``merge``: write whole models. ``format``: the target server. ``hub``:
    the repositories to push to; None: no push. ``suffix``: suffix of the folder's name, "" for the last round."""

    clients: Sequence[int]
    merge: bool
    format: Format
    hub: Hub | None
    suffix: str

    @property
    def use(self) -> Use:
        return "merged" if self.merge else "gguf" if self.format == "gguf" else "peft"

    @property
    def folder(self) -> str:
        """Name of the folder in the run folder. The folder of a finished run's adapters keeps those of its last round."""
        return f"{ADAPTERS if self.use == 'peft' else self.use}{self.suffix}"


def check(order: Order, session: Session) -> None:
    """Raise UserError if the server cannot serve these adapters, or the names of the repositories are not valid."""
    lines.check(order.format, session, order.merge)
    if order.hub:
        push.base(order.hub, session)
        order.hub.check([session.federation.clients[k].slug for k in order.clients])


def export(order: Order, session: Session, run: Path, state: ServerState, metrics: Sequence[Record]) -> Iterator[str]:
    """Write the adapters below the folder ``run``. Yields lines: folders, commands, repositories. Raises UserError."""
    rank = _rank(session, state)
    if not order.merge:
        lines.check_rank(order.format, rank)
    more = rank - session.layout.rank
    origins = [
        replace(origin(session.federation.clients[k], state.round, metrics), offset_ranks=more) for k in order.clients
    ]
    places = [run / order.folder / each.client.slug for each in origins]
    if order.merge:
        for k, place, each in zip(order.clients, places, origins, strict=True):
            with session.on_base_of(state):
                export_merged(session, place, deployed(session, state, k), each)
            yield lines.merged(order.format, place)
    else:
        adapters = export_adapters(session, run / f"{ADAPTERS}{order.suffix}", state, order.clients, metrics)
        lines.check_folder(order.format, adapters[0])
        for adapter, place, each in zip(adapters, places, origins, strict=True):
            if order.use == "gguf":
                export_gguf(session, place, adapter, each)
        yield from map(str, places)
        yield from lines.served(order.format, session, places, rank)
    if order.hub:
        base = push.base(order.hub, session)
        for place, each in zip(places, origins, strict=True):
            told = card(place, session, each, order.use, base, order.hub.repository(place.name))
            yield push.push(order.hub, place, told, base)


def _rank(session: Session, state: ServerState) -> int:
    """The rank of the adapters, which hold the offset of the base beside their own ranks."""
    offset = offset_of(state)
    return session.layout.rank * (1 if offset is None else 1 + len(offset))
