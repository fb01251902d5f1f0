"""Devices and workers of one run: the rules among their keys. They decide where a run is computed and not its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mira.core.errors import UserError

if TYPE_CHECKING:
    from mira.config.experiment import EngineSection, ModelSection

KEYS = ("engine.devices", "engine.workers", "engine.ray")


def check(engine: EngineSection, model: ModelSection) -> None:
    """Raise UserError where devices, workers and the cluster do not go together, or not with ``model.device``."""
    devices = engine.devices or ()
    if devices and engine.workers is not None:
        raise UserError(
            f"engine.workers={engine.workers}: engine.devices={_told(devices)} gives one worker for each device of this machine;"
            " leave one of the two out"
        )
    if engine.ray != "auto" and engine.workers is None:
        raise UserError(
            f"engine.ray={engine.ray}: needs the number of workers; set engine.workers, or leave engine.ray out"
        )
    kinds = {device.split(":")[0] for device in devices}
    if len(kinds) > 1:
        raise UserError(f"engine.devices={_told(devices)}: CPU and GPU round differently; give devices of one kind")
    if kinds and model.device not in ("auto", *kinds):
        raise UserError(
            f"engine.devices={_told(devices)}: model.device={model.device} asks for another kind; leave model.device out"
        )


def _told(devices: tuple[str, ...]) -> str:
    return f"[{', '.join(devices)}]"
