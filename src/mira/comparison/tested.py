"""The measurements of a comparison's run on the test split, in test.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from mira.store.files import TESTED, corrupt, read_json

_Number = Annotated[float, Field(strict=True)] | None


class _Client(BaseModel):
    test_loss: _Number


class _Answers(BaseModel):
    class Scores(BaseModel):
        rouge_l: _Number
        exact_match: _Number

    rouge_l: _Number
    exact_match: _Number
    clients: dict[str, Scores]


class _Transfer(BaseModel):
    global_loss: _Number = None
    mean_row_loss: _Number = None


class _Losses(BaseModel):
    """``answers``, ``transfer``: at the best round alone."""

    local_loss: _Number
    validation_loss: _Number
    clients: dict[str, _Client]
    answers: _Answers | None = None
    transfer: _Transfer | None = None


class _Tested(BaseModel):
    """The fields that the tables are made of; a file may have more. ``start``: absent in older comparisons."""

    best_round: int
    start: _Losses | None = None
    best: _Losses
    last: _Losses

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.best.transfer is None:
            raise ValueError("best.transfer is missing")
        names = self.best.clients.keys()
        answers = self.best.answers.clients if self.best.answers else self.best.clients
        if any(each.keys() != names for each in (answers, self.last.clients, (self.start or self.last).clients)):
            raise ValueError("its measurements are of different clients")
        return self


def measured(folder: Path) -> dict[str, Any] | None:
    """The content of test.json in the run ``folder``; None without one. Raises UserError where it is damaged."""
    path = folder / TESTED
    if not path.exists():
        return None
    found = read_json(path)
    try:
        _Tested.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise corrupt(path, ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))) from None
    value: dict[str, Any] = found
    return value


def is_tested(folder: Path) -> bool:
    """True where nothing is left to measure. Files of older comparisons have no losses before training."""
    return "start" in (measured(folder) or {})
