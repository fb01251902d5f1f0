"""Connections that are counted before their first byte, and only then speak TLS.

asyncio's own TLS server reports a connection after its handshake; silent connections would be in no limit.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
from collections.abc import Callable

_FILES = 10240  # macOS gives no process more
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Raw(asyncio.Protocol):
    """Hands a new connection to ``come`` before anything of it is read."""

    def __init__(self, come: Callable[[asyncio.Transport], object]) -> None:
        self.come = come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        self.come(transport)


async def secured(transport: asyncio.Transport, tls: ssl.SSLContext, handshake: float, limit: int) -> Stream:
    """The server's side of TLS over a connection from ``Raw``. ``handshake``: seconds that it may take. ``limit``: bytes to read
    ahead, as in asyncio.StreamReader. Raises OSError where the peer does not speak this TLS."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit, loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    inner = await loop.start_tls(
        transport, protocol, tls, server_side=True, ssl_handshake_timeout=handshake, ssl_shutdown_timeout=1.0
    )
    if inner is None:
        raise ConnectionAbortedError("closed during the handshake")
    protocol.connection_made(inner)
    return reader, asyncio.StreamWriter(inner, protocol, reader, loop)


def allow_files() -> int:
    """Raise this process's limit of open files as far as its user may, and return it."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        return wanted
    return _FILES if now == resource.RLIM_INFINITY else now
