"""A process between sites and their server, as networks have: a TCP balancer, which passes bytes on, or an HTTP proxy, which
opens tunnels (CONNECT) for who knows its password.

    python -m helpers.tunnel --to HOST:PORT          python -m helpers.tunnel --credentials USER:PASSWORD

It prints its port, then a line for each connection: where it leads, or the status that it was refused with.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Tunnel:
    port: int
    log: Path

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()[1:]


@contextmanager
def tunnel(folder: Path, *arguments: object) -> Iterator[Tunnel]:
    """The process, until the end of the block. Its output is in a file in ``folder``."""
    log = folder / f"tunnel-{time.monotonic_ns()}.log"
    around = os.environ | {"PYTHONPATH": str(_TESTS), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.tunnel", *map(str, arguments)], stdout=out, stderr=out, env=around
        )
    try:
        while not (said := log.read_text().splitlines()):
            assert process.poll() is None
            time.sleep(0.02)
        yield Tunnel(int(said[0]), log)
    finally:
        process.terminate()
        process.wait()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _serve(port: int, to: str | None, credentials: str | None) -> None:
    wanted = b"proxy-authorization: basic " + b64encode((credentials or "").encode()).lower()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = to
        try:
            if target is None:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
                if method != "CONNECT":
                    return await refuse(writer, "405 Method Not Allowed")
                if credentials and wanted not in [line.lower() for line in head.split(b"\r\n")]:
                    return await refuse(writer, "407 Proxy Authentication Required")
            host, _, number = target.rpartition(":")
            back, on = await asyncio.open_connection(host, int(number))
            print(target)
            if to is None:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await asyncio.gather(_pump(reader, on), _pump(back, writer))
        except OSError:
            await refuse(writer, "502 Bad Gateway")
        except asyncio.IncompleteReadError:
            writer.close()

    async def refuse(writer: asyncio.StreamWriter, status: str) -> None:
        print(status[:3])
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nproxy-authenticate: Basic\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1])
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--to")
    parser.add_argument("--credentials")
    asyncio.run(_serve(**vars(parser.parse_args())))
