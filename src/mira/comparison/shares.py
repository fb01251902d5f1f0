"""The share of the machine that a run of a comparison uses, and the number of runs at a time.

Threads and memory of a run depend on the machine and the plan, never on the number of workers: they decide last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mira.comparison.plan import Plan, Resources
from mira.core.errors import UserError
from mira.core.machine import Share

_PROCESS = 10**9  # bytes of a run beside its weights: libraries, data, rows and passes
_UNKNOWN = 2 * 10**9  # bytes of weights that are not on this machine yet


@dataclass(frozen=True)
class Machine:
    """``memory``: bytes in all. ``free``: bytes not in use. ``gpus``: GPUs of this machine that runs may use."""

    cores: int
    memory: int
    free: int
    gpus: int = 0


@dataclass(frozen=True)
class Need:
    """Bytes of memory of a run: the largest peak of the finished runs, or an estimate from its weights."""

    memory: int
    is_measured: bool

    @staticmethod
    def of(peaks: Sequence[int], weights: int | None) -> Need:
        """``peaks``: peak memory of each finished run, in bytes. ``weights``: bytes of the weight files; None: unknown."""
        return Need(max(peaks), True) if peaks else Need(estimated(weights), False)


def estimated(weights: int | None) -> int:
    """Estimated bytes of memory of a run: twice its weights, which are read and then converted, and the rest of the process."""
    return 2 * (_UNKNOWN if weights is None else weights) + _PROCESS


def threads_of_a_run(plan: Plan, machine: Machine, weights: int | None, recorded: int | None) -> int:
    """CPU threads of each run. ``recorded``: those of an existing run, which all others need too."""
    given = recorded or plan.base.engine.threads or plan.comparison.resources.cpus
    if given:
        return given
    return machine.cores // min(machine.cores, plan.total, _side_by_side(plan.comparison.resources, machine, weights))


def _side_by_side(resources: Resources, machine: Machine, weights: int | None) -> int:
    """The number of runs that fit on the GPUs of the machine, whether or not they are all used; else into its memory."""
    gpus = 1.0 if resources.gpus is None else resources.gpus
    if not machine.gpus or not gpus:
        return max(1, machine.memory // estimated(weights))
    # The part of one GPU that is left beside whole runs is no use to another.
    return max(1, machine.gpus * int(1 / gpus + 1e-9) if gpus < 1 else int(machine.gpus / gpus))


def share_of_a_run(resources: Resources, machine: Machine, threads: int) -> Share:
    """The memory and GPUs of each run of ``threads`` threads."""
    whole = machine.memory // max(1, machine.cores // threads)
    memory = whole if resources.memory is None else int(resources.memory * 1e9)
    return Share(memory, 1.0 if resources.gpus is None else resources.gpus)


def number_of_workers(given: int | str, plan: Plan, machine: Machine, threads: int, need: Need) -> tuple[int, str]:
    """The number of runs at a time, and a line that says why. ``given``: a number, or "auto"."""
    most, why = _allowed(plan, machine, threads, need)
    if given == "auto":
        return most, _line(most, threads, why)
    if not str(given).isdecimal() or int(given) < 1:
        raise UserError(f"--workers {given}: give a number of runs at a time from 1 on, or auto")
    return int(given), _line(int(given), threads, f"as given; auto: {most}" if most > int(given) else "as given")


def _allowed(plan: Plan, machine: Machine, threads: int, need: Need) -> tuple[int, str]:
    """The number of runs at a time that cores and memory allow, and its reason."""
    if machine.gpus:
        return 1, "on one GPU; --ray auto runs one on each GPU, or more with gpus: 0.5 under resources"
    by_cores, by_memory = machine.cores // threads, machine.free // need.memory
    source = "measured" if need.is_measured else "estimated from its weights"
    gb = f"{need.memory / 1e9:.1f} GB a run ({source}), {machine.free / 1e9:.1f} GB free"
    return max(1, min(by_cores, by_memory, plan.total)), f"{machine.cores} cores; {gb}"


def _line(count: int, threads: int, why: str) -> str:
    runs = "1 run" if count == 1 else f"{count} runs"
    return f"{runs} at a time with {threads} thread{'s' * (threads > 1)} each: {why}"
