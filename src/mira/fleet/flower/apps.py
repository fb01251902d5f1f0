"""Both ends of Flower, thin: the app on the server hands messages between Flower and ``mira server``, the app at a site
between Flower and the site's worker. All that decides is elsewhere. Imports neither torch nor the rest of mira: there is
a process for every message."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from httpx import HTTPError

from mira.fleet.flower import frames
from mira.fleet.flower.fetch import Fetches

_TYPE = "query"  # Flower's least specific kind of message
_RECORD = "mira"
_SHARE = 1 << 26  # bytes of replies that are held at a time, or one reply
_ENDLESS = 64  # uploads in hand, each with what came of it, after which this app ends itself
_WORKER = 60.0  # seconds in which a worker that died is there again: its supervisor waits 30 at most
server_app = ServerApp()  # Flower looks for assignments as plain as these
client_app = ClientApp()


class Unanswered(Exception):
    """Flower sends the text of what a site's app raises to the server: this one, which names no path."""


@client_app.query()
def answer(message: Message, context: Context) -> Message:
    """What the site's worker answers. Raises Unanswered when it does not come, or dies meanwhile: Flower tells the server."""
    _end_with_parent()
    try:
        with frames.connect(str(context.node_config["worker"]), patience=_WORKER) as worker:
            frames.send(worker, _bytes(message))
            reply = frames.receive(worker)
    except Exception as error:
        raise Unanswered("the site's worker did not answer") from error  # the cause stays in the site's log
    return Message(_content(reply), reply_to=message)


@server_app.main()
def relay(grid: Grid, context: Context) -> None:
    """Does what ``mira server`` says on its socket until it hangs up: roster, push, pull."""
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
                    os._exit(1)  # nothing else ends an upload that drips; it is started anew, and asks all again


def _end_with_parent() -> None:
    """Flower tells its apps when its own process was killed, and they hang on their way out, looking for it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _push(grid: Grid, nodes: Sequence[str], contents: Sequence[bytes], ttl: float) -> list[str | None]:
    messages = [
        Message(_content(content), dst_node_id=int(node), message_type=_TYPE, ttl=ttl)
        for node, content in zip(nodes, contents, strict=True)
    ]
    return list(grid.push_messages(messages))


def _pull(replies: Fetches[Message], ids: Sequence[str], keep: Sequence[str], server: socket.socket) -> None:
    """A list of what has come, [id, error or null], and then the content of each without an error."""
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
    """What a site answered, or why it is not passed on: the server reads nothing that is not ours, or without end."""
    if isinstance(message, Exception):
        return f"its reply cannot be read ({type(message).__name__})"
    if message.has_error():
        return _why(message.error)
    try:
        data = _bytes(message)
    except ValueError as error:
        return str(error)
    return data if len(data) <= frames.LIMIT else f"its reply has {len(data)} bytes; at most {frames.LIMIT} are read"


def _why(error: Error) -> str:
    """Without what the app at the site says: it might quote anything."""
    return f"no answer from the site's worker (Flower's error {error.code})"


def _content(data: bytes) -> RecordDict:
    return RecordDict({_RECORD: ArrayRecord({"0": Array("uint8", (len(data),), "bytes", data)})})


def _bytes(message: Message) -> bytes:
    """Raises ValueError where it is not what ``_content`` makes."""
    record = message.content.get(_RECORD)
    array = record.get("0") if isinstance(record, ArrayRecord) else None
    if array is None:
        raise ValueError("its message is none of mira's")
    return array.data
