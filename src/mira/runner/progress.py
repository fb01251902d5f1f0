"""Progress of a run on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mira.runner.callbacks import Callback


class RunProgress(Callback):
    """Display of rounds, clients, tokens per second and remaining time."""

    def __init__(
        self, console: Console, onward: Callable[[str], str] = lambda folder: f"mira run {folder} --resume"
    ) -> None:
        """``onward``: the command that goes on with an interrupted run, by its folder, quoted."""
        self._console, self._onward = console, onward
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._rounds = 0
        self._clients = 0
        self._first = 0
        self._spent = 0.0
        self._tokens = 0
        self._since = time.perf_counter()
        self.advice = "nothing was started"
        """The message for a user who interrupts the run."""

    def start(self, folder: Path, rounds: int, clients: int, done: int) -> None:
        self._rounds, self._clients, self._first = rounds, clients, done
        self._spent, self._tokens, self._since = 0.0, 0, time.perf_counter()
        self.advice = f"committed rounds are kept, go on with: {self._onward(shlex.quote(str(folder)))}"
        self._console.print(
            f"run folder {folder}: {clients} clients, {rounds} rounds"
            + (f", going on after round {done}" if done else ""),
            markup=False, emoji=False, highlight=False,
        )  # fmt: skip
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("round"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(), console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=rounds, completed=done, speed="")
            self._bar.start()

    def stage(self, name: str) -> None:
        self._console.print(f"{name} …", style="dim", highlight=False)

    def tokens(self, count: int) -> None:
        self._tokens += count
        if self._bar is not None and self._task is not None:
            speed = self._tokens / max(time.perf_counter() - self._since, 1e-9)
            self._bar.update(self._task, speed=f"{self._clients} clients, {speed:.0f} tokens/s")

    def round(self, record: dict[str, Any]) -> None:
        done = record["round"]
        self._spent += record["seconds"]
        left = self._spent / (done - self._first) * (self._rounds - done)
        losses = [loss for loss in record["train_loss"].values() if loss is not None]
        asked, lost = len(record["cohort"]), len(record["lost"])
        came = f"{asked - lost} of {asked} clients" if 0 < lost < asked else f"{asked} clients"
        parts = [f"round {done}/{self._rounds}", came]
        if losses:
            parts.append(f"train loss {sum(losses) / len(losses):.3f}")
        else:
            parts.append("losses not told" if record["train_loss"] else "no client came back")
        if record.get("validation_loss") is not None:
            away = len(record.get("unmeasured", ()))
            measured = f" ({self._clients - away} of {self._clients} measured)" if away else ""
            parts.append(f"validation {record['validation_loss']:.3f}{measured}")
        parts += [f"{record['tokens_per_second']:.0f} tokens/s"] if record["tokens_per_second"] else []
        parts += [
            f"{record['seconds']:.1f} s",
            f"about {left:.0f} s left",
        ]
        self._console.print(" · ".join(parts), highlight=False)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        if done == self._rounds:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
