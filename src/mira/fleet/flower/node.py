"""A site's node: Flower's fleet API on one side, the site's worker on the other, in one process without a port of its own.

It does what Flower's SuperNode does (``flower-supernode``), over the same connection of Flower, in fewer steps: it fetches no
code, starts no app for a message, and asks nobody every half second. It ends when its connection or its heartbeat dies, and its
supervisor starts it again; a node without a heartbeat counts as offline for good.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

from mira.fleet.flower.processes import FLOWER

os.environ |= FLOWER  # read by the imports below

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supernode.fleet_http_connection import http_request_response

from mira.core.escape import visible
from mira.fleet.flower import frames
from mira.fleet.flower.contents import NotOurs, content_of, record_of
from mira.fleet.identity.signatures import key_pair

Ask = Callable[[bytes], bytes]
_WORKER = 60.0  # seconds until a worker that died is back: its supervisor waits 30 at most
_PAUSE = 3.0  # seconds between two questions for messages where none was held, as in a SuperNode
_GOODBYE = 6.0  # seconds to sign off
_UNANSWERED = "the site's worker did not answer"  # Flower sends it to the server, so it names no path


def take_part(
    address: str, authority: Path, key: Path, ask: Ask, tries: int | None = None, pause: float = _PAUSE
) -> None:
    """Answer the server's messages by ``ask``, until the connection fails. ``address``: HOST:PORT of the gate; ``authority``: the
    CA of its certificate; ``key``: the site's; ``tries``: attempts to connect, None for any number. Raises SystemExit where the
    server refuses the key, ValueError for one that is no ECDSA key."""
    keys = key_pair(key.read_bytes())
    with http_request_response(address, False, str(authority), keys, tries) as line:
        node, receive, send, _, _, pull, push, confirm = line
        say(f"SuperNode ID: {node}")
        while True:
            asked = time.monotonic()
            received = receive()
            if received is None:
                time.sleep(max(0.0, asked + pause - time.monotonic()))  # none where the gate held the question
                continue
            bare, tree = received
            run, id = bare.metadata.run_id, bare.metadata.message_id
            try:
                message = _fetched(id, tree, partial(pull, run))
                confirm(run, id)
                _push(_reply(message, ask), send, partial(push, run))
            except Exception as error:  # its run may have ended, or the network was away: the next message may pass
                say(visible(f"message {id[:12]} was not answered: {type(error).__name__}: {error}"))


def _fetched(id: str, tree: ObjectTree, pull: Callable[[str], bytes]) -> Message:
    """The message ``id``. Raises ValueError where a part of it is not what its number, a hash, says, or where it is too long."""
    held = 0

    def checked(part: str) -> bytes:
        nonlocal held
        content = pull(part)
        held += len(content)
        if get_object_id(content) != part:
            raise ValueError("a part of a message is not the one that was announced")
        if held > frames.LIMIT:
            raise ValueError(f"a message of more than {frames.LIMIT} bytes")
        return content

    contents = pull_objects([part.object_id for part in iterate_object_tree(tree)], checked)
    message = inflate_object_from_contents(id, contents)
    if not isinstance(message, Message):
        raise NotOurs
    message.metadata.__dict__["_message_id"] = id  # it is not in its own text
    return message


def _reply(message: Message, ask: Ask) -> Message:
    """The worker's answer to ``message``, or the news that there is none."""
    try:
        return Message(record_of(ask(content_of(message))), reply_to=message)
    except Exception as error:
        say("".join(traceback.format_exception(error)))  # the cause stays in the site's log
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _UNANSWERED), reply_to=message)


def _push(
    reply: Message,
    send: Callable[[Message, ObjectTree, float], tuple[set[str], str]],
    push: Callable[[str, str, bytes], None],
) -> None:
    """Push ``reply``: what it consists of, then the parts that the SuperLink lacks. Tells how many of these it refused."""
    with no_object_id_recompute():  # each part is hashed once
        reply.metadata.__dict__["_message_id"] = reply.object_id
        wanted, session = send(reply, get_object_tree(reply), 0.0)
        refused: list[str] = []

        def part(id: str, content: bytes) -> None:
            try:
                push(session, id, content)
            except ObjectPushError:  # also of a part that it has: Flower repeats a request whose answer was lost
                refused.append(id)

        push_objects(get_all_nested_objects(reply), part, object_ids_to_push=wanted)
    if refused:
        say(f"the server has, or no longer takes, {len(refused)} of {len(wanted)} parts of an answer")


def ask_worker(path: Path, request: bytes) -> bytes:
    """The answer of the worker that listens at ``path``. Raises Closed when there is none."""
    with frames.connect(path, patience=_WORKER) as worker:
        frames.send(worker, request)
        return frames.receive(worker)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    """Sign off, which the connection does on its way out; and end in any case, since a gate may hold what is asked last."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    _end_at_last()
    raise SystemExit(1)


def _end_at_last() -> None:
    at_last = threading.Timer(_GOODBYE, _leave, (1,))
    at_last.daemon = True
    at_last.start()


def _of_a_thread(failure: threading.ExceptHookArgs) -> None:
    """End the process when one of its threads dies, since it is useless without its heartbeat. It signs off where it can:
    otherwise it counts as online for up to a minute, and is not admitted again meanwhile."""
    threading.__excepthook__(failure)
    _end_at_last()  # the main loop waits for this thread, which cannot wait for it in turn
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(status: int) -> None:
    """End the process with ``status``, whatever threads are left."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # its reader is gone
            stream.flush()
    os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(prog="mira.fleet.flower.node")
    parser.add_argument("--superlink", required=True, help="HOST:PORT of the gate")
    parser.add_argument("--root-certificates", required=True, type=Path, help="the CA of its certificate")
    parser.add_argument("--key", required=True, type=Path, help="the site's private key")
    parser.add_argument("--worker", required=True, type=Path, help="the socket of the site's worker")
    parser.add_argument("--max-retries", type=int, help="attempts to connect; default: any number")
    given = parser.parse_args()
    threading.excepthook = _of_a_thread
    signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)
    try:
        take_part(
            given.superlink, given.root_certificates, given.key, partial(ask_worker, given.worker), given.max_retries
        )
    except SystemExit as end:
        if isinstance(end.code, str):
            say(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(1)  # also where the loop returns: a node is never done


if __name__ == "__main__":
    main()
