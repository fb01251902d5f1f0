"""Starts the app of a site's SuperNode for each message, as ``flower-superexec`` does, by a fork of this process: it has loaded
what Flower's own command takes 2 to 3 s of a processor to load for every message."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from contextlib import suppress

from mira.fleet.flower.processes import FLOWER

# Read when what follows is imported. It speaks with its own machine alone, so with no proxy; and it forks, so it has one thread.
os.environ |= {**FLOWER, "OPENBLAS_NUM_THREADS": "1", "no_proxy": "*"}

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

import mira.fleet.flower.apps  # noqa: F401  the app, which each fork finds loaded

_PAUSE = 0.25  # seconds between two looks for a message


def serve(address: str) -> None:
    """Ask the SuperNode on loopback at ``address`` for messages, and wait where it is away, until this process is ended."""
    client = RuntimeHttpClient.from_server_address(
        address, True, None, [RuntimeVersionHttpInterceptor(component_name="SuperExec")],
        retry_invoker=make_simple_http_retry_invoker(),
    )  # fmt: skip
    request, own = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]), os.getpid()
    while True:
        _bury()
        found = client.AcquireTask(request)
        if found.HasField("task") and found.token and os.fork() == 0:
            _become_app(address, found.token, own)
        time.sleep(_PAUSE)


def _become_app(address: str, token: str, parent: int) -> None:
    """What ``flwr-clientapp`` does, in this fork; it ends with it, whatever happens."""
    status = 1
    try:
        run_clientapp(address, token, True, parent_pid=parent, runtime_dependency_install=False)
    except SystemExit as end:  # so it ends
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)  # nothing of the parent's is closed or written twice


def _bury() -> None:
    """Forks that ended are waited for: Flower looks for processes by number. One that was killed could not say so itself."""
    with suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if (code := os.waitstatus_to_exitcode(ended[1])) < 0:
                print(f"an app (process {ended[0]}) was ended by signal {-code}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="mira.fleet.flower.app_launcher")
    parser.add_argument("--node", required=True, help="address of the SuperNode's Runtime API, on loopback")
    serve(parser.parse_args().node)


if __name__ == "__main__":
    main()
