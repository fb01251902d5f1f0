"""Clients in this process, with the interface of remote sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mira.core.engine import ClientBackend, Engine, Grade
from mira.core.errors import UserError
from mira.core.offers import option_scores
from mira.core.types import Offer
from mira.core.wire import Wire
from mira.runner import evaluation
from mira.runner.label_accuracy import label_accuracy
from mira.setup.session import Session, enough_memory


def clients_of(session: Session) -> ClientBackend:
    """The session's remote sites; without any, the clients in this process."""
    return session.remote or LocalClients(session)


@dataclass(frozen=True)
class LocalClients:
    """Clients in this process: the session's engine trains and evaluates them, and no number is private to a site."""

    session: Session
    wire: Wire = "fp32"
    has_whole_adapters: bool = True
    sends_descriptions: bool = True

    @property
    def engine(self) -> Engine:
        return self.session.engine

    def grade(self, rows: Tensor, client: Tensor, limit: int | None, max_new_tokens: int, round: int) -> list[Grade]:
        engine, corpus, metrics = self.session.engine, self.session.corpus, self.session.experiment.evaluation.metrics
        references = [corpus.references(k, "test", limit) for k in client.tolist()]
        grades = evaluation.grade(engine, rows, client, references, limit, max_new_tokens, metrics)
        if evaluation.LABEL_ACCURACY not in metrics:
            return grades
        pairs = zip(grades, label_accuracy(engine, corpus, rows, limit), strict=True)
        return [grade if share is None else grade | {evaluation.LABEL_ACCURACY: share} for grade, share in pairs]

    def losses(self, offer: Offer, limit: int | None) -> Tensor:
        if offer.split == "train" and self.session.accountant is not None:
            raise UserError(
                f"privacy.unit=example: method.name={self.session.experiment.method.name} chooses by the loss on training"
                " examples, which has no noise; take another method"
            )
        privacy = self.session.experiment.privacy
        if privacy is not None and not privacy.exact:
            raise UserError(
                f"privacy.metrics={privacy.metrics}: method.name={self.session.experiment.method.name} chooses by losses, which"
                " clients do not tell; take another method"
            )
        with enough_memory(self.session.experiment):
            return option_scores(self.session.engine, offer, limit).loss

    def rebase(self, offset: Tensor | None) -> None:
        self.session.rebase(offset)

    def allow_transfer(self) -> Tensor:
        return torch.arange(len(self.session.names))

    def needs_warm_start(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def round_extras(self) -> dict[str, Any]:
        accountant = self.session.accountant
        return {} if accountant is None else {"privacy": accountant.spent()}

    def begin(self, has_private_parts: bool) -> None: ...

    def committed(self, record: Mapping[str, Any]) -> None:
        if self.session.accountant is not None:
            self.session.accountant.recall(record)

    def finish(self, deployed: Callable[[Tensor], Tensor]) -> None: ...
