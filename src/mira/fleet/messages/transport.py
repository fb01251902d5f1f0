"""The interface of a transport, which carries packets between the server and its sites, and a transport for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

RejectionKind = Literal[
    "oversized", "malformed", "foreign", "stale", "failed", "shape", "dtype", "not finite", "counts", "norm"
]
"""The kinds of replies that came and are not used. "failed": the site itself says so."""
LossKind = Literal["offline", "late"] | RejectionKind
"""The kinds of replies that are missing."""


@dataclass(frozen=True)
class NoReply:
    """A missing reply and its ``reason`` (one line for people). ``sent``: the request may have reached the site; ``busy``: the
    site may still be at work on it; ``kind``: the reason for programs."""

    reason: str
    sent: bool = True
    busy: bool = False
    kind: LossKind = "failed"


Reply = bytes | NoReply
OnReply = Callable[[str, Reply], bool]
"""Called with each site's reply as it comes. Returns whether it counts among those that a round waits for."""


def any_bytes(name: str, reply: Reply) -> bool:
    """Count every reply that came."""
    return isinstance(reply, bytes)


class Transport(Protocol):
    """Carries requests to named sites and brings back the replies that come in time. It keeps nothing and repeats nothing."""

    def roster(self) -> set[str]:
        """The names of the sites online, proven by the transport's own means."""
        ...

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, on_reply: OnReply = any_bytes,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, Reply]:  # fmt: skip
        """The reply of each site asked, or the reason why there is none. Ends when all have answered, after ``deadline``
        seconds, or once ``minimum`` replies are in that ``on_reply`` counts. ``most``: the bytes that each reply may have, so
        that a transport can refuse a longer one before it holds it."""
        ...


@dataclass(frozen=True)
class InProcessTransport:
    """Sites in this process, asked one after the other, for tests and trials."""

    sites: Mapping[str, Callable[[bytes], bytes]]

    def roster(self) -> set[str]:
        return set(self.sites)

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, on_reply: OnReply = any_bytes,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, Reply]:  # fmt: skip
        replies: dict[str, Reply] = {}
        good = 0
        for name, request in requests.items():
            if good >= minimum:
                replies[name] = NoReply("it was not waited for", sent=False, kind="late")
                on_reply(name, replies[name])
                continue
            try:
                reply: Reply = self.sites[name](request)
            except Exception as error:  # whatever a site dies of, the others go on
                reply = NoReply(f"the site failed ({type(error).__name__}: {error})")
            good += on_reply(name, reply)
            replies[name] = reply
        return replies
