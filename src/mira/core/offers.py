"""Offers of rows to clients: each takes the one of least loss on its own data. A choice costs forward passes alone.

With the points of a line from the client's own row to another one, s = 0 among them, no client takes a row that it has measured
as worse on its data than its own. With the rows of clusters it is the cluster estimate of IFCA (Ghosh et al., "An
Efficient Framework for Clustered Federated Learning", NeurIPS 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from mira.core.engine import ClientEngine
from mira.core.types import Change, Offer, Scores, Work


@dataclass(frozen=True)
class Choice:
    """The ``option`` [n] (int64) that each client of ``offer`` takes, −1 where it takes none, and the ``loss`` [n,c] of each
    option (float64, nats per label token)."""

    offer: Offer
    option: Tensor
    loss: Tensor

    def put_into(self, rows: Tensor) -> Tensor:
        """A copy of ``rows`` with the rows taken in their places. In one process these are to the bit those measured; over
        machines a site has measured them as ``server.wire`` rounds the rows offered."""
        chosen, place = rows.clone(), self.offer.place
        taken = self.offer.taken(self.option.clamp(min=0))
        chosen[place] = torch.where((self.option >= 0)[:, None], taken, rows[place])
        return chosen

    def of_jobs(self, jobs: int) -> Tensor:
        """The option of each of a round's ``jobs`` [J] (int64); −1 for those that took none."""
        option = torch.full((jobs,), -1)
        option[self.offer.place] = self.option
        return option

    @property
    def labels(self) -> dict[int, float]:
        """The label of the option that each client took."""
        labels = self.offer.labels
        found = zip(self.offer.client.tolist(), self.option.tolist(), strict=True)
        return {k: labels[option] for k, option in found if option >= 0}


def unanswered(offer: Offer) -> Tensor:
    """The losses [n,c] of an offer that no client answers: NaN."""
    return torch.full((len(offer.client), len(offer)), torch.nan, dtype=torch.float64)


def option_scores(engine: ClientEngine, offer: Offer, limit: int | None) -> Scores:
    """The scores [n,c] of each option on at most ``limit`` examples of each client's split. One option is in memory at a
    time."""
    found = [engine.evaluate(offer.row(n), offer.client, (offer.split,), limit) for n in range(len(offer))]
    return Scores(torch.cat([each.nll for each in found], 1), torch.cat([each.tokens for each in found], 1))


def choose(offer: Offer, loss: Tensor) -> Choice:
    """The first option of the least ``loss`` [n,c] for each client that has a finite one, else ``offer.otherwise``."""
    answered = loss.isfinite()
    option = loss.where(answered, torch.inf).argmin(1)
    otherwise = -1 if offer.otherwise is None else offer.otherwise
    return Choice(offer, option.where(answered.any(1), otherwise), loss)


def begun(work: Work, choice: Choice) -> Work:
    """``work`` whose jobs start from the rows taken."""
    return replace(work, start=choice.put_into(work.start), offer=None)


def settled(change: Change, choice: Choice) -> Change:
    """``change`` with the rows taken. Of points on a line the note ``effective_step`` is the mean over all rows of the change, 0
    for those that took none."""
    taken = sum(choice.labels.values())
    mean = {} if choice.offer.points is None else {"effective_step": taken / len(change.index)}
    return replace(change, value=choice.put_into(change.value), notes=change.notes | mean, offer=None)


def described(choices: Sequence[Choice], names: Sequence[str]) -> dict[str, Any]:
    """The record of ``choices`` as plain numbers. Under the name of each offer: the label that each client took. Under "offers":
    its options, its split and the losses of each client, None where one is not finite. Empty without choices."""
    if not choices:
        return {}
    offers = {
        choice.offer.name: {
            "options": list(choice.offer.labels), "split": choice.offer.split,
            "losses": {
                names[k]: [x if isfinite(x) else None for x in losses]
                for k, losses in zip(choice.offer.client.tolist(), choice.loss.tolist(), strict=True)
            },
        } for choice in choices
    }  # fmt: skip
    return {"offers": offers} | named({choice.offer.name: choice.labels for choice in choices}, names)


def unmeasured(record: Mapping[str, Any]) -> dict[str, str]:
    """Options that clients without a finite loss took in the round of ``record``, by their names, such as 'strength 0.5'."""
    return {
        client: f"{what} {record[what][client]:g}"
        for what, offer in record.get("offers", {}).items()
        for client, losses in offer["losses"].items()
        if client in record[what] and all(loss is None for loss in losses)
    }


def named(of_clients: Mapping[str, Mapping[int, float]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Numbers of clients under their names."""
    return {key: {names[k]: value for k, value in numbers.items()} for key, numbers in of_clients.items()}
