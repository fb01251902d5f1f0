"""Flower as a transport: Flower's app on the server pushes requests, pulls replies, and lists the sites online."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf

from mira.core.errors import UserError
from mira.fleet.flower import frames
from mira.fleet.messages.transport import NoReply, OnReply, Reply, any_bytes

log = logging.getLogger(__name__)

_POLL = 0.5  # seconds between two pulls
_GLANCE = 0.5  # seconds between two looks at the answers that passed the gate, where none is whole before
_ALL = 10.0  # seconds between two pulls of all messages, also those without an answer seen
_SHARE = 1 << 26  # bytes of rows that Flower's app holds at a time, or one row
_STEP = 120.0  # seconds of one step of the app, after which it counts as dead
_ACCEPT = 2.0  # seconds between two attempts to revive an app that does not come
_DEATHS = 20  # deaths of the app over one request that are survived
_LOOK = 1.0  # seconds between two looks for sites that should come back
_MOVE = 10.0  # seconds between two looks for sites whose key was replaced during an exchange


@dataclass
class FlowerTransport:
    """The transport over Flower.

    ``listener``: the socket that Flower's app on the server connects to. ``names``: the sites admitted now, by the names of their
    nodes. ``revive``: called while the app is away, to bring it back. ``dropped``: called when it goes away. ``pushed``: called
    with the sites for which requests lie ready. ``answered``: the numbers of the messages whose answers have passed the gate, so
    that only these are pulled; None without a gate. ``wait``: returns once there are others than those that it is given, or after
    so many seconds. ``allow``: called with the bytes that the answer of each site may have, before it is asked. ``say``: called
    with a line when sites come and go. ``patience``: seconds that an app may take to come. ``grace``: seconds in which the sites
    return after the app did.
    """

    listener: socket.socket
    names: Callable[[], Mapping[str, str]]
    revive: Callable[[], None] = lambda: None
    dropped: Callable[[], None] = lambda: None
    pushed: Callable[[list[str]], object] = lambda sites: None
    answered: Callable[[], set[str]] | None = None
    wait: Callable[[set[str], float], object] = lambda known, patience: time.sleep(patience)
    allow: Callable[[Mapping[str, int]], object] = lambda most: None
    say: Callable[[str], None] = lambda line: None
    patience: float = 300.0
    grace: float = 60.0
    _app: socket.socket | None = None
    _nodes: dict[str, str] = field(default_factory=dict)
    _late: set[str] = field(default_factory=set)  # messages that no round waits for any more
    _missed: set[str] = field(default_factory=set)  # sites online when the app went away, and not seen since
    _back: float = 0.0  # end of the grace for these sites
    _asked: float = 0.0  # time of the last pull of all messages
    _whole: set[str] = field(default_factory=set)  # the messages whose answers had passed the gate at the last look
    _looked: float = 0.0  # time of the last look at the sites online
    _keys: dict[str, str] = field(default_factory=dict)  # the names of the nodes of the sites online
    _sent: dict[str, str] = field(default_factory=dict)  # the name of the node that a site's last request went to

    def roster(self, until: float = inf) -> set[str]:
        """The sites online. A SuperLink that was started anew knows no sites at first: this waits for those that were online
        before, until ``until`` at most."""
        here = self._look()
        while self._missed - here and time.monotonic() < min(self._back, until):
            time.sleep(_LOOK)
            here = self._look()
        self._missed.clear()
        return here

    @property
    def online(self) -> set[str]:
        """The sites online at the last look, or before the app went away; for any thread."""
        return set(self._nodes)

    @property
    def away(self) -> bool:
        """True while Flower's app, which was here, is not."""
        return self._app is None and bool(self._keys)

    def _look(self) -> set[str]:
        nodes = json.loads(self._do({"do": "roster"})[0])
        names = self.names()
        self._looked = time.monotonic()
        before, self._nodes = self._nodes.keys(), {names[called]: node for node, called in nodes if called in names}
        self._keys = {names[called]: called for _, called in nodes if called in names}
        if self._nodes.keys() != before:
            here = ", ".join(sorted(self._nodes)) or "nobody"
            self.say(f"online: {here} ({len(self._nodes)} of {len(set(names.values()))})")
        return set(self._nodes)

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, on_reply: OnReply = any_bytes,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, Reply]:  # fmt: skip
        """As ``Transport.exchange``. Where Flower's app dies meanwhile the requests are sent again: a site that has trained
        already does so once more, with the same result unless it adds noise (privacy), which costs again. So is the request of
        a site that came back with a new key. The time until app and sites are back does not count, up to another
        ``deadline``."""
        until = time.monotonic() + deadline
        last = until + deadline
        replies: dict[str, Reply] = _too_long(requests)
        for name, reply in replies.items():
            on_reply(name, reply)
        waiting: dict[str, str] = {}
        pushed: set[str] = set()
        good = 0
        while len(replies) < len(requests) and time.monotonic() < until:
            try:
                if not waiting:
                    self.allow({name: size for name, size in (most or {}).items() if name not in replies})
                    waiting = self._push({n: r for n, r in requests.items() if n not in replies}, until, replies)
                    pushed |= set(waiting.values())
                elif moved := self._moved(waiting):
                    self._late |= {id for id, name in waiting.items() if name in moved}
                    waiting = {id: name for id, name in waiting.items() if name not in moved}
                    self.allow({name: size for name, size in (most or {}).items() if name in moved})
                    waiting |= self._push({name: requests[name] for name in moved}, until, replies)
                came = {name: reply for name, reply in self._pull(waiting).items() if not self._left(name, reply)}
            except frames.Closed:
                waiting, gone = {}, time.monotonic()
                self.roster(last)
                until = min(until + time.monotonic() - gone, last)
                continue
            replies |= came
            good += sum(on_reply(name, reply) for name, reply in came.items())
            waiting = {id: name for id, name in waiting.items() if name not in replies}
            if good >= minimum:
                break
            if waiting and not came:
                self._rest()
        self._late |= waiting.keys()
        for name in requests.keys() - replies.keys():
            late = "it was not waited for" if time.monotonic() < until else f"no reply within {deadline:g} s"
            replies[name] = NoReply(late, busy=name in pushed, kind="late")
            on_reply(name, replies[name])
        return {
            name: reply if isinstance(reply, bytes) else replace(reply, sent=name in pushed)
            for name, reply in replies.items()
        }

    def _push(self, requests: Mapping[str, bytes], until: float, replies: dict[str, Reply]) -> dict[str, str]:
        """Push requests to the sites online. Returns their names by message; failures are put into ``replies``."""
        self.roster(until)  # a node that came back has a new number
        here = [name for name in requests if name in self._nodes]
        self._sent |= {name: self._keys[name] for name in here}
        replies |= {name: NoReply("it went offline", kind="offline") for name in requests if name not in self._nodes}
        if not here:
            return {}
        ids = []
        for share in _shares({name: len(requests[name]) for name in here}):
            ttl = max(until - time.monotonic(), 1.0)
            asked = {"do": "push", "nodes": [self._nodes[name] for name in share], "ttl": ttl}
            ids += json.loads(self._do(asked, [requests[name] for name in share])[0])
            self.pushed(share)
        refused = {name for name, id in zip(here, ids, strict=True) if id is None}
        replies |= {name: NoReply("Flower did not take the message") for name in refused}
        return {id: name for name, id in zip(here, ids, strict=True) if id is not None}

    def _moved(self, waiting: Mapping[str, str]) -> set[str]:
        """The sites that are waited for and have another node by now: it has another key. Raises Closed where the app died."""
        if time.monotonic() < self._looked + _MOVE:
            return set()
        app = self._app
        self._look()
        if self._app is not app:
            raise frames.Closed("Flower's app was started again")
        return {name for name in waiting.values() if self._keys.get(name, self._sent[name]) != self._sent[name]}

    def _left(self, name: str, reply: Reply) -> bool:
        """True for a reply that says only that a node is gone whose key another one of the site replaces."""
        if not isinstance(reply, NoReply) or reply.reason != frames.GONE:
            return False
        last = {site: called for called, site in self.names().items()}  # of two keys the later one
        return last.get(name, self._sent[name]) != self._sent[name]

    def _due(self, waiting: Mapping[str, str]) -> list[str]:
        """The messages to pull: those with an answer, and all of them now and then. Flower has answers of its own, for messages
        that were not fetched in time; and it keeps late answers until they are fetched."""
        if self.answered is None or time.monotonic() > self._asked + _ALL:
            self._asked = time.monotonic()
            return [*waiting, *self._late]
        self._whole = self.answered()
        return [id for id in waiting if id in self._whole]

    def _rest(self) -> None:
        """Wait for another answer that passes the gate, or a while where there is no gate."""
        if self.answered is None:
            time.sleep(_POLL)
        else:
            self.wait(self._whole, _GLANCE)

    def _pull(self, waiting: Mapping[str, str]) -> dict[str, Reply]:
        if not waiting or not (ids := self._due(waiting)):
            return {}
        app = self._connected()
        try:
            frames.send(app, json.dumps({"do": "pull", "ids": ids, "keep": [*waiting, *self._late]}).encode())
            told = json.loads(frames.receive(app))
            found: dict[str, Reply] = {}
            for id, why in told:
                reply = frames.receive(app) if why is None else _absent(why)
                self._late.discard(id)
                if id in waiting:  # else late, a duplicate, or unknown
                    found[waiting[id]] = reply
            return found
        except (frames.Closed, frames.TooLong, TimeoutError) as error:
            raise self._dropped(error) from None

    def _do(self, asked: Mapping[str, object], contents: list[bytes] | None = None) -> list[bytes]:
        """The app's answer to a request, which is repeated where the app dies over it. Raises UserError after many deaths."""
        deaths = 0
        while True:
            app = self._connected()
            try:
                for frame in (json.dumps(asked).encode(), *(contents or ())):
                    frames.send(app, frame)
                return [frames.receive(app)]
            except (frames.Closed, frames.TooLong, TimeoutError) as error:
                if contents is not None:
                    raise self._dropped(error) from None
                self._dropped(error)
                deaths += 1
                if deaths > _DEATHS:
                    raise UserError(
                        f"server: Flower's app has died {deaths} times over the same question ({error}); --verbose shows what"
                        " is run"
                    ) from None

    def _connected(self) -> socket.socket:
        """The connection to the app. Raises UserError when none comes within ``patience`` seconds, without the time spent on
        reviving it: the registration of a hundred sites takes minutes."""
        waited = 0.0
        while self._app is None:
            self.revive()
            self.listener.settimeout(_ACCEPT)
            try:
                self._app, _ = self.listener.accept()
                self._app.settimeout(_STEP)
                self._back = time.monotonic() + self.grace
            except TimeoutError:
                waited += _ACCEPT
                if waited > self.patience:
                    raise UserError(
                        f"server: Flower's app did not start within {self.patience:g} s; --verbose shows what is run, and"
                        " why it did not"
                    ) from None
        return self._app

    def _dropped(self, error: Exception) -> frames.Closed:
        if self._app is not None:
            self._app.close()
            self._app = None
            self._late.clear()  # messages of that app's run
            self._missed |= self._nodes.keys()
            self.dropped()
        log.warning("Flower's app on the server went away (%s); starting it again", error)
        return frames.Closed(str(error))

    def close(self) -> None:
        if self._app is not None:
            self._app.close()
        self.listener.close()


def _absent(why: str) -> NoReply:
    return NoReply(why, kind="offline" if why == frames.GONE else "failed")


def _too_long(requests: Mapping[str, bytes]) -> dict[str, Reply]:
    """The reason for not sending a request, for each that is longer than a frame: Flower's app would end over it."""
    return {
        name: NoReply(
            f"the request to it has {len(request)} bytes; at most {frames.LIMIT} are sent; start a run with fewer"
            " adapter.targets, or with a method that does not change the base"
        )
        for name, request in requests.items()
        if len(request) > frames.LIMIT
    }


def _shares(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The keys in lists of at most ``_SHARE`` bytes, or of a single key."""
    share: list[str] = []
    for key, size in sizes.items():
        if share and sum(sizes[k] for k in share) + size > _SHARE:
            yield share
            share = []
        share.append(key)
    if share:
        yield share
