"""Flower's app on the server, which passes messages between Flower and ``mira server``. It decides nothing.

Flower asks for an app of the sites too. That is empty: a site of MIRA runs no app (``node``)."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from httpx import HTTPError

from mira.fleet.flower import frames
from mira.fleet.flower.contents import NotOurs, content_of, record_of
from mira.fleet.flower.fetch import Fetches

_TYPE = "query"  # Flower's least specific kind of message
_SHARE = 1 << 26  # bytes of replies held at a time, or one reply
_ENDLESS = 64  # unfinished uploads in memory, after which this app ends itself
server_app = ServerApp()  # plain assignments: Flower looks for them in the text of this file
client_app = ClientApp()


@server_app.main()
def relay(grid: Grid, context: Context) -> None:
    """Carry out the requests of ``mira server`` (roster, push, pull) until it closes its socket."""
    _end_with_parent()
    replies = Fetches(lambda id: next(iter(grid.pull_messages([id])), None), fatal=(HTTPError,))
    with frames.connect(os.environ["MIRA_RELAY"]) as server:
        while True:
            try:
                asked = json.loads(frames.receive(server))
            except frames.Closed:
                return
            if asked["do"] == "roster":
                nodes = [[str(node.node_id), node.name] for node in grid.get_nodes()]
                frames.send(server, json.dumps(nodes).encode())
            elif asked["do"] == "push":
                contents = [frames.receive(server) for _ in asked["nodes"]]
                frames.send(server, json.dumps(_push(grid, asked["nodes"], contents, asked["ttl"])).encode())
            else:
                _pull(replies, asked["ids"], asked["keep"], server)
                if replies.in_hand > _ENDLESS:
                    os._exit(1)  # nothing else ends an upload that drips; the next app asks all sites again


def _end_with_parent() -> None:
    """End this process soon after its parent: an app of Flower whose parent was killed hangs on exit, looking for it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _push(grid: Grid, nodes: Sequence[str], contents: Sequence[bytes], ttl: float) -> list[str | None]:
    messages = [
        Message(record_of(content), dst_node_id=int(node), message_type=_TYPE, ttl=ttl)
        for node, content in zip(nodes, contents, strict=True)
    ]
    return list(grid.push_messages(messages))


def _pull(replies: Fetches[Message], ids: Sequence[str], keep: Sequence[str], server: socket.socket) -> None:
    """Send a list of the replies that have come, [id, error or null], then the content of each without an error."""
    found: dict[str, bytes | str] = {}
    for id, came in replies.come(ids, keep):
        found[id] = _opened(came)
        if sum(map(len, found.values())) >= _SHARE:
            break
    told = [[id, given if isinstance(given, str) else None] for id, given in found.items()]
    frames.send(server, json.dumps(told).encode())
    for given in found.values():
        if isinstance(given, bytes):
            frames.send(server, given)


def _opened(message: Message | Exception) -> bytes | str:
    """The content of a site's reply, or the reason for not passing it on: not MIRA's, or too long."""
    if isinstance(message, Exception):
        return f"its reply cannot be read ({type(message).__name__})"
    if message.has_error():
        return _why(message.error)
    try:
        data = content_of(message)
    except NotOurs as error:
        return str(error)
    return data if len(data) <= frames.LIMIT else f"its reply has {len(data)} bytes; at most {frames.LIMIT} are read"


def _why(error: Error) -> str:
    """One line on a failure, without the text of the site's app, which might quote anything."""
    if error.code == ErrorCode.NODE_UNAVAILABLE:
        return frames.GONE
    return f"no answer from the site's worker (Flower's error {error.code})"
