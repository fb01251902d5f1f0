"""Flower's SuperNode, as a process that ends when its work does.

Left to itself it may stay, seen as running, and ask for nothing any more: its API for its own apps is a thread that outlives
the main loop, which ends over any answer it does not know, and over two refusals at once; and one whose heartbeat died counts
as offline for good. Whoever started it starts it again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from contextlib import suppress

from flwr.supernode.cli import flower_supernode

_GOODBYE = 6.0  # seconds; Flower itself gives up after 5


def _of_a_thread(failure: threading.ExceptHookArgs) -> None:
    """A SuperNode does not look after its threads, and does nothing useful without one. It says goodbye where it can: who leaves
    without counts as online for up to a minute, and is not let in again."""
    threading.__excepthook__(failure)
    at_last = threading.Timer(
        _GOODBYE, _leave, (1,)
    )  # the main loop waits for this thread, so this one cannot wait for it
    at_last.daemon = True
    at_last.start()
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(status: int) -> None:
    """Whatever threads are left."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def main() -> None:
    """What ``flower-supernode`` does, with its arguments."""
    threading.excepthook = _of_a_thread
    status = 1  # also where it just returns: it should not
    try:
        flower_supernode()
    except SystemExit as end:
        if not isinstance(end.code, int) and end.code is not None:
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


if __name__ == "__main__":
    main()
