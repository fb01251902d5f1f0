"""Worker processes of a comparison on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING

from mira.comparison.work import outcome_of
from mira.comparison.workers import Outcome, Task
from mira.core.errors import UserError

if TYPE_CHECKING:
    from pebble import ProcessPool

_LOST = "its worker process died (killed, or out of memory)"


class Processes:
    """``count`` processes, each of which does one task at a time. A process that dies fails its own task alone."""

    def __init__(self, count: int, out: Path) -> None:
        self._out = out.absolute()
        # As on the command line: threads that spin while they wait would slow the other processes.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # A pool for each process: processes of one pool share a lock, which one that is killed might hold.
        self._idle = [_new_pool() for _ in range(count)]
        self._busy: dict[Future[Outcome], tuple[ProcessPool, Task, float]] = {}

    @property
    def free(self) -> int:
        return len(self._idle)

    def start(self, task: Task) -> None:
        pool = self._idle.pop()
        with _no_interrupts():
            if not pool.active:  # its process died when it had nothing to do
                _end([pool])
                pool = _new_pool()
            future: Future[Outcome] = pool.schedule(outcome_of, args=(task, self._out))
        self._busy[future] = pool, task, time.perf_counter()

    def finished(self, seconds: float) -> Sequence[Outcome]:
        ended, _ = wait(self._busy, timeout=seconds, return_when=FIRST_COMPLETED)
        return [self._outcome(future) for future in ended]

    def stop(self) -> None:
        _end([*self._idle, *(pool for pool, _, _ in self._busy.values())])
        self._idle, self._busy = [], {}

    def _outcome(self, future: Future[Outcome]) -> Outcome:
        pool, task, began = self._busy.pop(future)
        self._idle.append(pool)
        error = future.exception()
        if error is None:
            return future.result()
        from pebble import ProcessExpired

        if not isinstance(error, ProcessExpired | BrokenProcessPool):
            raise error
        return Outcome(task, {}, time.perf_counter() - began, _LOST, lost=True)


def check_main() -> None:
    """Raise UserError in a worker process that runs the user's script anew, as each further process would again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "workers: each worker process imports the script first; put the call of mira.compare under"
            " \"if __name__ == '__main__':\""
        )


def _new_pool() -> ProcessPool:
    # Spawned, not forked: a fork of a process with threads may hang.
    from pebble import ProcessPool  # only here: a machine without pebble can train

    context = multiprocessing.get_context("spawn")
    return ProcessPool(1, initializer=_begin, initargs=(multiprocessing.get_start_method(),), context=context)


def _end(pools: Sequence[ProcessPool]) -> None:
    for pool in pools:
        pool.stop()  # type: ignore[no-untyped-call]
    for pool in pools:
        pool.join()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from the processes and threads that start meanwhile: they inherit the mask, and this process ends them."""
    resource_tracker.ensure_running()  # before: its start would lift the mask again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(method: str) -> None:
    """Prepare a worker process: it ends at once when it is told to, and when the process of the comparison is gone.

    ``method``: the start method of that process. Libraries that make locks then make the same ones as in a serial comparison;
    under "fork" none is left behind by a process that is killed.
    """
    multiprocessing.set_start_method(method, force=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
