"""The rules of the gate: the fleet API as a SuperNode speaks it, within limits, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from ipaddress import ip_network

import h11

from mira.fleet.gate.connection import HttpRefusal

BEGIN = b"/v1/fleet/activate-node"
QUESTIONS = b"/v1/fleet/pull-messages"
ANSWERS = b"/v1/fleet/push-messages"
PIECES = b"/v1/fleet/push-object"
_FLEET = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
SENT_ON = ("content-type", "accept", "accept-encoding", "user-agent")  # and flwr-*, which Flower's protocol is made of
UNKNOWN = 412  # what a SuperLink answers a key that is not registered with it, or whose node is online already
HEAD_BYTES = 1 << 14


@dataclass(frozen=True)
class Limits:
    """The limits of a peer. Times in seconds."""

    body: int = 17 << 20  # bytes of a piece of an answer; sites send an array in pieces of 16 MiB
    answer: int = 1 << 20  # bytes of an answer's announcement: its sender, its question and its pieces
    question: int = 64 << 10  # bytes of any other request
    connections: int = 1024
    connections_per_host: int = 256
    head: float = 20.0  # for a TLS handshake, and for a request's head from the end of the last one
    stall: float = 60.0  # until the next piece of a body, either way, and until an answer
    hold: float = 20.0  # for which a request waits for messages, or for the SuperLink; a SuperNode gives up after 30


def check(request: h11.Request, limits: Limits) -> dict[str, str]:
    """A request's headers, each once. Raises HttpRefusal unless it is a POST to the fleet API within its limit."""
    most = {ANSWERS: limits.answer, PIECES: limits.body}.get(request.target, limits.question)
    if not _FLEET.fullmatch(request.target):  # no dots, no percent, no query, no host: nothing to interpret differently
        raise HttpRefusal(404, f"no such path: {request.target[:80]!r}")
    if request.method != b"POST":
        raise HttpRefusal(405, f"method {request.method[:20]!r}")
    headers: dict[str, str] = {}
    for name, value in request.headers:
        key = name.decode("ascii")
        if key in headers:
            raise HttpRefusal(400, f"header {key} twice")
        headers[key] = value.decode("latin-1")
    if "transfer-encoding" in headers or "upgrade" in headers:
        raise HttpRefusal(400, "transfer-encoding or upgrade")
    if "content-length" not in headers:
        raise HttpRefusal(411, "no content-length")
    if int(headers["content-length"]) > most:
        raise HttpRefusal(413, f"a body of {headers['content-length']} bytes; at most {most}")
    return headers


def host_of(address: str) -> str:
    """The host of ``address``; with IPv6 its network of 64 bits, since a host has all addresses in it."""
    try:
        return str(ip_network(f"{address.partition('%')[0]}/64", strict=False)) if ":" in address else address
    except ValueError:
        return address


def stranger(target: bytes) -> HttpRefusal:
    """The refusal of a key that is not admitted. A SuperNode that starts prints the text of a 412, a SuperLink's own answer to an
    unknown key, and fails; a running one ends at a 401 only. ``mira client`` asks first (``flower.preflight``)."""
    if target not in (b"/v1/fleet/register-node", BEGIN):
        return HttpRefusal(401, "not a site of this federation")
    text = "The server does not admit this node key: it is revoked, expired or of another federation, or the clock is wrong."
    return HttpRefusal(UNKNOWN, "not a site of this federation", json.dumps({"code": 2004, "detail": text}).encode())
