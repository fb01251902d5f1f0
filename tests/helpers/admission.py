"""The admission of a site's request as an operator does it who agrees to whatever is shown."""

from __future__ import annotations

from pathlib import Path

from mira.fleet.identity import admit


def admit_request(server: Path, asked: Path, reply: Path, days: int = 90) -> None:
    """Admit the request in the file ``asked``, and write ``reply``."""
    request = admit.read_request(asked)
    admit.admit(server, request, admit.change_by(server, request), days, reply)
