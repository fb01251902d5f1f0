"""Flower's SuperNode, as a process that exits when its main loop or its heartbeat dies.

Flower itself keeps the process alive: the thread of its app API outlives the main loop, which ends on any unknown answer and on
two refusals at once. A SuperNode without a heartbeat counts as offline for good. The supervisor starts the process again.
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
    """End the process when one of its threads dies, since it is useless without it. It signs off where it can: otherwise it
    counts as online for up to a minute, and is not admitted again meanwhile."""
    threading.__excepthook__(failure)
    at_last = threading.Timer(
        _GOODBYE, _leave, (1,)
    )  # a timer: the main loop waits for this thread, which cannot wait for it in turn
    at_last.daemon = True
    at_last.start()
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(status: int) -> None:
    """End the process with ``status``, whatever threads are left."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # its reader is gone
            stream.flush()
    os._exit(status)


def main() -> None:
    """Run ``flower-supernode`` with its own arguments."""
    threading.excepthook = _of_a_thread
    status = 1  # also where it returns, which it should not
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
