"""MLflow: a tracking server, or a database file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from pydantic import Field
from pydantic.dataclasses import dataclass

from mira.core.errors import UserError
from mira.core.pydantic_config import STRICT
from mira.trackers.tracker import Numbers, Parameters, remembered

if TYPE_CHECKING:
    from mlflow import MlflowClient

_AT_ONCE = 100  # parameters in one request to a server; it takes 1000 metrics, more than a round has


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mlflow:
    """Needs the extra 'mlflow'. User and password come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    uri: str | None = None
    """http(s)://... or sqlite:////folder/mlflow.db; null: MLFLOW_TRACKING_URI, without it RUN/mlflow.db."""
    experiment: Annotated[str, Field(min_length=1)] = "mira"
    """Made when it does not exist."""

    def __post_init__(self) -> None:
        if self.uri is not None and urlsplit(self.uri).password is not None:
            raise UserError(
                "tracking.mlflow.uri: holds a password, and a configuration is kept and shared; take it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )

    def start(self, parameters: Parameters, name: str, folder: Path) -> MlflowRun:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # both are read at the import
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        here = f"sqlite:///{folder / 'mlflow.db'}"
        client = MlflowClient(self.uri or os.environ.get("MLFLOW_TRACKING_URI") or here)

        def begin() -> str:
            known = client.get_experiment_by_name(self.experiment)
            number = known.experiment_id if known else client.create_experiment(self.experiment)
            identity: str = client.create_run(number, run_name=name).info.run_id
            return identity

        identity = remembered(folder, "mlflow", begin)
        run = client.get_run(identity)
        missing = [Param(key, str(value)) for key, value in parameters.items() if key not in run.data.params]
        for first in range(0, len(missing), _AT_ONCE):
            client.log_batch(identity, params=missing[first : first + _AT_ONCE])
        client.update_run(identity, status="RUNNING")
        return MlflowRun(client, identity, int(run.data.metrics.get("round", -1)))


class MlflowRun:
    """A run on an MLflow server. ``last``: the last round that the server has already."""

    def __init__(self, client: MlflowClient, identity: str, last: int) -> None:
        self._client, self._identity, self._last, self._status = client, identity, last, "KILLED"

    def record(self, round: int, numbers: Numbers) -> None:
        if round > self._last:
            self._log(round, {**numbers, "round": round})

    def finish(self, round: int, numbers: Numbers) -> None:
        self._log(round, numbers)
        self._status = "FINISHED"

    def close(self) -> None:
        self._client.set_terminated(self._identity, self._status)

    def _log(self, step: int, numbers: Numbers) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._identity, [Metric(key, value, now, step) for key, value in numbers.items()])
