"""Launcher of a SuperNode's app for each message, in the place of ``flower-superexec``.

It forks this process, which has loaded all that the app needs; Flower's own command spends 2 to 3 s of a processor on that for
every message."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from contextlib import suppress

from mira.fleet.flower.processes import FLOWER

# Read by the imports below. No proxy: it speaks with its own machine alone. One thread: it forks.
os.environ |= {**FLOWER, "OPENBLAS_NUM_THREADS": "1", "no_proxy": "*"}

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

import mira.fleet.flower.apps  # noqa: F401  the app, loaded once for all forks

_PAUSE = 0.25  # seconds between two looks for a message


def launch_apps(address: str) -> None:
    """Launch an app for each message of the SuperNode at ``address`` on loopback, until this process is ended. While the
    SuperNode is away it waits."""
    client = RuntimeHttpClient.from_server_address(
        address, True, None, [RuntimeVersionHttpInterceptor(component_name="SuperExec")],
        retry_invoker=make_simple_http_retry_invoker(),
    )  # fmt: skip
    request, own = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]), os.getpid()
    while True:
        _reap()
        found = client.AcquireTask(request)
        if found.HasField("task") and found.token and os.fork() == 0:
            _become_app(address, found.token, own)
        time.sleep(_PAUSE)


def _become_app(address: str, token: str, parent: int) -> None:
    """Do the work of ``flwr-clientapp`` in this fork, and end the fork, whatever happens."""
    status = 1
    try:
        run_clientapp(address, token, True, parent_pid=parent, runtime_dependency_install=False)
    except SystemExit as end:  # its normal end
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)  # the parent's files are neither closed nor flushed twice


def _reap() -> None:
    """Wait for forks that ended, since Flower looks for processes by number, and report those that were killed."""
    with suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if (code := os.waitstatus_to_exitcode(ended[1])) < 0:
                print(f"an app (process {ended[0]}) was ended by signal {-code}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="mira.fleet.flower.app_launcher")
    parser.add_argument("--node", required=True, help="address of the SuperNode's Runtime API, on loopback")
    launch_apps(parser.parse_args().node)


if __name__ == "__main__":
    main()
