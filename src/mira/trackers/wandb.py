"""Weights & Biases. Set WANDB_MODE=offline to keep everything in RUN/wandb and send it later with `wandb sync`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.pydantic_config import STRICT
from mira.trackers.tracker import Numbers, Parameters, remembered

if TYPE_CHECKING:
    import wandb


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Wandb:
    """Needs the extra 'wandb', and a key from `wandb login` or WANDB_API_KEY."""

    project: Annotated[str, Field(min_length=1)] = "mira"
    """Made when it does not exist."""
    entity: str | None = None
    """User or team; null: the key's own."""

    def start(self, parameters: Parameters, name: str, folder: Path) -> WandbRun:
        """Start or resume the run. Only numbers and hyper-parameters are sent: no command line, code, git, machine or console."""
        import wandb

        offline = wandb.setup().settings.mode not in ("online", "shared")
        if not offline and not wandb.login(prompt=False):  # a prompt would wait behind the progress bar
            raise PermissionError("no key; run 'wandb login', set WANDB_API_KEY, or set WANDB_MODE=offline")
        run = wandb.init(
            project=self.project, entity=self.entity, name=name, dir=str(folder), config=dict(parameters),
            id=remembered(folder, "wandb", lambda: uuid4().hex), resume=None if offline else "allow",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, save_code=False,
                x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
            ),
        )  # fmt: skip
        return WandbRun(run)


class WandbRun:
    def __init__(self, run: wandb.Run) -> None:
        self._run, self._status = run, 1

    def record(self, round: int, numbers: Numbers) -> None:
        if round >= self._run.starting_step:  # a resumed run begins after the server's last step
            self._run.log(dict(numbers), step=round)

    def finish(self, round: int, numbers: Numbers) -> None:
        self._run.summary.update(dict(numbers))
        self._status = 0

    def close(self) -> None:
        self._run.finish(exit_code=self._status)
