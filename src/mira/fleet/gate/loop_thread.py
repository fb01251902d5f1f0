"""An event loop in a thread of its own, and the end of a server in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def running_loop(name: str) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a new thread ``name`` until the end of the context."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=name, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def closed(server: asyncio.Server, tasks: set[asyncio.Task[None]]) -> None:
    """Close ``server`` and end the ``tasks`` of its connections, which take themselves out of the set."""
    server.close()
    while tasks:  # a connection that is accepted meanwhile has one more
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # transports end one step after they are closed
