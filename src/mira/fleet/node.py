"""Flower's SuperNode, as a process that ends when its work does.

Left to itself it may stay, seen as running, and ask for nothing any more: its API for its own apps is a thread that outlives
the main loop, which ends over any answer it does not know, and over two refusals at once; and one whose heartbeat died counts
as offline for good. Whoever started it starts it again.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from contextlib import suppress

from flwr.supernode.cli import flower_supernode


def _of_a_thread(failure: threading.ExceptHookArgs) -> None:
    """A SuperNode does not look after its threads, and does nothing useful without one."""
    threading.__excepthook__(failure)
    _leave(1)


def _leave(status: int) -> None:
    """Whatever threads are left."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def main() -> None:
    """What ``flower-supernode`` does, with its arguments."""
    threading.excepthook = _of_a_thread
    status = 1  # also where it just returns: it should not
    try:
        flower_supernode()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


if __name__ == "__main__":
    main()
