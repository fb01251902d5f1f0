"""Folders exported from a run: adapters for PEFT, merged models, and adapters as GGUF files."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mira.core.errors import UserError
from mira.core.loop import Record
from mira.core.offset import offset_of
from mira.core.types import ServerState
from mira.model.whole import save_whole
from mira.serving import card, gguf
from mira.serving.bases import base_name
from mira.serving.card import Origin
from mira.setup.session import Session


def export_adapters(
    session: Session, folder: Path, state: ServerState, clients: Sequence[int], metrics: Sequence[Record] = ()
) -> list[Path]:
    """Write the adapter that each client deploys in ``state`` to a folder of its own in ``folder``; it is PEFT's where PEFT has
    the kind. ``metrics``: the records of the rounds, for the card. Returns the folders."""
    places, offset, last = list[Path](), offset_of(state), torch.empty(0)
    for k in clients:
        client, row = session.federation.clients[k], deployed(session, state, k)
        # With an offset adapters are large, and one and the same where clients deploy one row.
        equal = places[-1] if offset is not None and torch.equal(last, row) else None
        places.append(folder / client.slug)
        export_row(session, places[-1], row, card.origin(client, state.round, metrics), offset, equal)
        last = row
    return places


def deployed(session: Session, state: ServerState, client: int) -> Tensor:
    """The row [P] that ``client`` deploys in ``state``."""
    return session.method.deployed(state, torch.tensor([client]))[0]


def export_row(
    session: Session, folder: Path, row: Tensor, origin: Origin, offset: Tensor | None = None, equal: Path | None = None
) -> None:
    """Write the adapter of ``row`` [P] on the base with ``offset`` [n,P], with the other files that a server needs. ``equal``: a
    folder with the same adapter, whose weights are linked."""

    told = replace(origin, offset_ranks=0 if offset is None else len(offset) * session.layout.rank)

    def write(place: Path) -> None:
        if equal is None:
            session.save(place, row, offset, base_name(session))
        else:
            others = shutil.ignore_patterns(card.CARD, "*.jinja")  # those of the client, written below
            shutil.copytree(equal, place, copy_function=_linked, ignore=others)
        card.write(place, session, told)

    replace_folder(folder, write)


def _linked(source: str, target: str) -> None:
    """Copy a file; one of weights is linked where the file system can."""
    if source.endswith(".safetensors"):
        with suppress(OSError):
            return os.link(source, target)
    shutil.copy2(source, target)


def export_merged(session: Session, folder: Path, row: Tensor, origin: Origin) -> None:
    """Write the whole model with the adapter of ``row`` [P] merged into its weights. The base is restored afterwards."""

    def write(place: Path) -> None:
        with session.adapter.merged(row) as model:
            save_whole(session.base, model, place)
        card.write(place, session, origin, "merged")

    replace_folder(folder, write)


def export_gguf(session: Session, folder: Path, adapter: Path, origin: Origin) -> None:
    """Convert the PEFT folder ``adapter`` into a folder with a GGUF file of its name."""

    def write(place: Path) -> None:
        place.mkdir()
        gguf.write(adapter, session.base.model.config, place / f"{adapter.name}.gguf", origin.client.name)
        card.write(place, session, origin, "gguf")

    replace_folder(folder, write)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make ``folder`` with ``write``, in the place of a former one. Raises UserError when it cannot be written.

    Writers beside each other take turns: the end of a run and an export may want the same folder.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(exist_ok=True)
        turn = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)
            _remove(temporary)  # of a process that was killed
            try:
                write(temporary)
                _remove(folder)
                temporary.rename(folder)
            finally:
                _remove(temporary)
        finally:
            os.close(turn)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        why = " ".join(str(error).split())
        raise UserError(
            f"{folder}: cannot be written ({why}); fix that, then continue with --resume or export again"
        ) from None


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.exists():
        shutil.rmtree(folder)  # refuses a link
