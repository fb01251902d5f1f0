"""Flower as a transport: what the app on the server is told to push and pull, and who it says is online."""

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

_POLL = 0.5  # seconds between two questions for replies
_GLANCE = 0.1  # or between two looks at what passed
_ALL = 10.0  # seconds until those are asked for too of which nobody saw an answer
_SHARE = 1 << 26  # bytes of rows that Flower's app holds at a time, or one row
_STEP = 120.0  # seconds in which the app on the server does one thing; longer, and it is taken for dead
_ACCEPT = 2.0  # seconds between two looks after an app that does not come
_DEATHS = 20  # of the app over one question, which are survived
_LOOK = 1.0  # seconds between two looks for sites that are to come back


@dataclass
class FlowerTransport:
    """``listener``: the socket that Flower's app on the server connects to. ``names``: the sites admitted now, whoever else is
    online, by the names of their nodes. ``revive`` is called while the app is not there, and brings it back, ``dropped`` when it
    goes, ``pushed`` when requests lie ready for the sites; ``answered``: the numbers of messages whose answers have come whole,
    where somebody sees them pass, so that not every message is asked for every time; ``allow`` is told of each site that is about
    to be asked how many bytes its answer may have; ``say`` hears who comes and goes; ``grace``: seconds in which sites that were
    online before it went are there again."""

    listener: socket.socket
    names: Callable[[], Mapping[str, str]]
    revive: Callable[[], None] = lambda: None
    dropped: Callable[[], None] = lambda: None
    pushed: Callable[[], object] = lambda: None
    answered: Callable[[], set[str]] | None = None
    allow: Callable[[Mapping[str, int]], object] = lambda most: None
    say: Callable[[str], None] = lambda line: None
    patience: float = 300.0
    grace: float = 60.0
    _app: socket.socket | None = None
    _nodes: dict[str, str] = field(default_factory=dict)
    _late: set[str] = field(default_factory=set)  # messages nobody waits for any more
    _missed: set[str] = field(default_factory=set)  # online when the app went away, and not seen since
    _back: float = 0.0  # until when they may come
    _asked: float = 0.0  # when all messages were asked for last

    def roster(self, until: float = inf) -> set[str]:
        """A SuperLink that was started anew knows nobody at first: waits for those who were there, until ``until`` at most."""
        here = self._look()
        while self._missed - here and time.monotonic() < min(self._back, until):
            time.sleep(_LOOK)
            here = self._look()
        self._missed.clear()
        return here

    def _look(self) -> set[str]:
        nodes = json.loads(self._do({"do": "roster"})[0])
        names = self.names()
        before, self._nodes = self._nodes.keys(), {names[called]: node for node, called in nodes if called in names}
        if self._nodes.keys() != before:
            here = ", ".join(sorted(self._nodes)) or "nobody"
            self.say(f"online: {here} ({len(self._nodes)} of {len(names)})")
        return set(self._nodes)

    def exchange(
        self, requests: Mapping[str, bytes], deadline: float, minimum: int, on_reply: OnReply = any_bytes,
        most: Mapping[str, int] | None = None,
    ) -> dict[str, Reply]:  # fmt: skip
        """Where Flower's app dies on the way the requests are sent again: a site that trained already trains the same once
        more, to the same row. The time until the app and its sites are there again does not count, up to another ``deadline``."""
        until = time.monotonic() + deadline
        last = until + deadline
        replies: dict[str, Reply] = {}
        waiting: dict[str, str] = {}
        pushed: set[str] = set()
        good = 0
        while len(replies) < len(requests) and time.monotonic() < until:
            try:
                if not waiting:
                    self.allow({name: size for name, size in (most or {}).items() if name not in replies})
                    waiting = self._push({n: r for n, r in requests.items() if n not in replies}, until, replies)
                    pushed |= set(waiting.values())
                came = self._pull(waiting)
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
                time.sleep(_POLL if self.answered is None else _GLANCE)
        self._late |= waiting.keys()
        for name in requests.keys() - replies.keys():
            late = "it was not waited for" if time.monotonic() < until else f"no reply within {deadline:g} s"
            replies[name] = NoReply(late, busy=name in pushed)
            on_reply(name, replies[name])
        return {
            name: reply if isinstance(reply, bytes) else replace(reply, sent=name in pushed)
            for name, reply in replies.items()
        }

    def _push(self, requests: Mapping[str, bytes], until: float, replies: dict[str, Reply]) -> dict[str, str]:
        """Names by message."""
        self.roster(until)  # a node that came back has another number
        here = [name for name in requests if name in self._nodes]
        replies |= {name: NoReply("it went offline") for name in requests if name not in self._nodes}
        if not here:
            return {}
        ids = []
        for share in _shares({name: len(requests[name]) for name in here}):
            ttl = max(until - time.monotonic(), 1.0)
            asked = {"do": "push", "nodes": [self._nodes[name] for name in share], "ttl": ttl}
            ids += json.loads(self._do(asked, [requests[name] for name in share])[0])
            self.pushed()
        refused = {name for name, id in zip(here, ids, strict=True) if id is None}
        replies |= {name: NoReply("Flower did not take the message") for name in refused}
        return {id: name for name, id in zip(here, ids, strict=True) if id is not None}

    def _due(self, waiting: Mapping[str, str]) -> list[str]:
        """The messages to ask for. Now and then all of them: Flower has answers of its own, as to what nobody fetched in time;
        and what comes too late is fetched too, or Flower would keep it to the end of the run."""
        if self.answered is None or time.monotonic() > self._asked + _ALL:
            self._asked = time.monotonic()
            return [*waiting, *self._late]
        answered = self.answered()
        return [id for id in waiting if id in answered]

    def _pull(self, waiting: Mapping[str, str]) -> dict[str, Reply]:
        if not waiting or not (ids := self._due(waiting)):
            return {}
        app = self._connected()
        try:
            frames.send(app, json.dumps({"do": "pull", "ids": ids, "keep": [*waiting, *self._late]}).encode())
            told = json.loads(frames.receive(app))
            found: dict[str, Reply] = {}
            for id, why in told:
                reply = frames.receive(app) if why is None else NoReply(why)
                self._late.discard(id)
                if id in waiting:  # else late, a duplicate, or an answer to nobody's question
                    found[waiting[id]] = reply
            return found
        except (frames.Closed, frames.TooLong, TimeoutError) as error:
            raise self._dropped(error) from None

    def _do(self, asked: Mapping[str, object], contents: list[bytes] | None = None) -> list[bytes]:
        """What the app answers; asked again where it dies over it. Raises UserError where it does so time and again."""
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
        """The app, waited for where it is not there. Raises UserError when it does not come within ``patience`` seconds, those
        apart in which it was being revived: to register a hundred sites takes minutes."""
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
            self._late.clear()  # they were messages of its run
            self._missed |= self._nodes.keys()
            self.dropped()
        log.warning("Flower's app on the server went away (%s); starting it again", error)
        return frames.Closed(str(error))

    def close(self) -> None:
        if self._app is not None:
            self._app.close()
        self.listener.close()


def _shares(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Keys in lists of at most ``_SHARE`` bytes, or of a single one."""
    share: list[str] = []
    for key, size in sizes.items():
        if share and sum(sizes[k] for k in share) + size > _SHARE:
            yield share
            share = []
        share.append(key)
    if share:
        yield share
