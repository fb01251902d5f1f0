"""The state of a federation of two sites, a online and b not, as a monitor sees it."""

from __future__ import annotations

from datetime import UTC, datetime

from mira.fleet.identity.expiry import Ends
from mira.fleet.monitor.watch import Federation

END = datetime(2030, 1, 1, tzinfo=UTC)
FEDERATION = Federation(
    names=lambda: {"a", "b"}, online=lambda: {"a"}, seen=lambda: {"a": 1000.0, "gone": 5.0}, trouble=lambda: None,
    superlink=lambda: None, ends=lambda: Ends(END, END, {"b": END}),
)  # fmt: skip
