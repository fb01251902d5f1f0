"""Devices and workers of one run. They decide where a run is computed, and its numbers up to rounding only: a run may be resumed
on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mira.core.errors import UserError

FIELDS = ("devices", "workers", "ray")  # of the section engine
Placement = Mapping[str, Any]  # some of these fields, with their values


def check(devices: Sequence[str], workers: int | None, ray: str, device: str) -> None:
    """Raise UserError where devices, workers and the cluster do not go together, or not with ``device``, the model's."""
    if devices and workers is not None:
        raise UserError(
            f"engine.workers={workers}: engine.devices={_told(devices)} gives one worker for each device of this machine;"
            " leave one of the two out"
        )
    if ray != "auto" and workers is None:
        raise UserError(f"engine.ray={ray}: needs the number of workers; set engine.workers, or leave engine.ray out")
    kinds = {each.partition(":")[0] for each in devices}
    if len(kinds) > 1:
        raise UserError(f"engine.devices={_told(devices)}: CPU and GPU round differently; give devices of one kind")
    if kinds and device not in ("auto", *kinds):
        raise UserError(
            f"engine.devices={_told(devices)}: model.device={device} asks for another kind; leave model.device out"
        )


def completed(given: Placement) -> dict[str, Any]:
    """All that ``given`` changes: new workers take the place of devices, and new devices that of workers on a cluster. Where
    either is given as null, one process takes the place of both. Raises UserError for a field of another kind."""
    if other := [name for name in given if name not in FIELDS]:
        raise UserError(f"engine.{other[0]}: a run resumes with its own; other {', '.join(FIELDS)} may be given")
    if given.get("devices") is not None:
        return {"workers": None, "ray": "auto", **given}
    if given.get("workers") is not None:
        return {"devices": None, **given}
    if {"devices", "workers"} & given.keys():
        return {"devices": None, "workers": None, "ray": "auto", **given}
    return dict(given)


def told(devices: Sequence[str] | None, workers: int | None, ray: str) -> str:
    """The placement in words."""
    if workers is not None:
        return f"{workers} worker{'s' if workers > 1 else ''} on Ray ({ray})"
    return f"{', '.join(devices)}" if devices else "one process"


def _told(devices: Sequence[str]) -> str:
    return f"[{', '.join(devices)}]"
