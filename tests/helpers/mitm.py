"""A listener between sites and their gate, who has the server's key: it keeps all that the sites send, and finds text in it."""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from array import array
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

from mira.fleet.gate.connection import hang_up
from mira.fleet.gate.loop_thread import closed, running_loop
from mira.fleet.gate.proxy import Address, server_tls, upstream_tls

_PACKED = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08")  # how zlib and gzip begin
_MOST = 1 << 24  # bytes unpacked of one place


@contextmanager
def wiretap(listen: Address, certificate: Path, key: Path, gate: Address, authority: Path) -> Iterator[list[bytearray]]:
    """What each connection to ``listen`` sent so far, TLS taken off; it is passed on to ``gate``, and the answers come back."""
    heard: list[bytearray] = []
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(kept := bytearray())
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        async with AsyncExitStack() as ends:
            ends.push_async_callback(hang_up, writer)
            with suppress(OSError):  # no gate, or somebody hung up: so do we
                back, on = await asyncio.open_connection(*gate, ssl=upstream_tls(authority))
                ends.push_async_callback(hang_up, on)
                up, down = _pump(reader, on, kept.extend), _pump(back, writer, lambda data: None)
                await asyncio.gather(up, down, return_exceptions=True)

    async def serve() -> asyncio.Server:
        return await asyncio.start_server(connected, *listen, ssl=server_tls(certificate, key))

    with running_loop("wiretap") as loop:
        server = asyncio.run_coroutine_threadsafe(serve(), loop).result()
        try:
            yield heard
        finally:
            asyncio.run_coroutine_threadsafe(closed(server, tasks), loop).result()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: Callable[[bytes], None]) -> None:
    """Until one end closes; then the other is closed too."""
    try:
        while data := await reader.read(1 << 16):
            keep(data)
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def traces(heard: bytes, text: str, vocabulary: Mapping[str, int]) -> list[str]:
    """The encodings in which ``text`` occurs in ``heard``, or in what is packed in it."""
    looks = encodings(text, vocabulary)
    places = {"": heard} | {
        f" packed at {found.start()}": _unpacked(heard[found.start() :]) for found in _PACKED.finditer(heard)
    }
    return [name + where for where, data in places.items() for name, look in looks.items() if look in data]


def encodings(text: str, vocabulary: Mapping[str, int]) -> dict[str, bytes]:
    """``text`` as it may be written; ``vocabulary``: the token of each of its characters."""
    plain, tokens = text.encode(), [vocabulary[character] for character in text]
    return {
        "utf-8": plain, "utf-16": text.encode("utf-16-le"), "utf-16 big endian": text.encode("utf-16-be"),
        "JSON": json.dumps(text)[1:-1].encode(), "hexadecimal": plain.hex().encode(), "HEXADECIMAL": plain.hex().upper().encode(),
        **{f"base64 from {n}": _base64(plain, n) for n in range(3)}, "backwards": plain[::-1],
        **{f"tokens of {array(kind).itemsize} bytes": array(kind, tokens).tobytes() for kind in "BHiq"},
        "tokens in JSON": json.dumps(tokens)[1:-1].encode(),
    }  # fmt: skip


def _base64(data: bytes, skipped: int) -> bytes:
    """What is the same of it wherever it begins: ``skipped`` bytes after a multiple of three."""
    whole = b64encode(bytes(skipped) + data)
    return whole[-(-8 * skipped // 6) : 8 * (skipped + len(data)) // 6]


def _unpacked(data: bytes) -> bytes:
    """As far as it can be unpacked."""
    one, whole = zlib.decompressobj(wbits=47), b""
    with suppress(zlib.error):
        for place in range(0, min(len(data), _MOST), 1 << 10):
            whole += one.decompress(data[place : place + (1 << 10)], _MOST - len(whole))
            if one.eof or len(whole) >= _MOST:
                break
    return whole


def secrets_in(heard: Sequence[bytes | bytearray], planted: Sequence[str], vocabulary: Mapping[str, int]) -> list[str]:
    """Which of the ``planted`` texts left, and how."""
    return [f"{text}: {how}" for data in heard for text in planted for how in traces(bytes(data), text, vocabulary)]
