"""The strength of each client's mixing step: the options to choose from, or a number from similarity to its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from mira.core.errors import UserError
from mira.core.similarity import cosines

POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # s offered to a client that chooses its own
FIXED = 0.5  # s of clients that cannot choose


def check_own(strength: str, form: str, space: str, strength_end: float | None, neighbours: str) -> None:
    """Raise UserError for settings of MIRA that a ``strength`` of each client's own cannot have."""
    given = f"method.strength={strength}"
    if form == "paper":
        raise UserError(
            f"{given}: belongs to form 'normalised', not 'paper'; set method.form=normalised, or method.strength=null"
        )
    if strength_end is not None:
        raise UserError(f"{given}: changes by itself; leave method.strength_end out, or give strength as a number")
    if space == "product":
        raise UserError(
            f"{given}: moves along a line between adapters, and space=product mixes their products; set"
            " method.space=factors or rotated, or method.strength=0.5"
        )
    if strength == "similarity" and neighbours == "all":
        raise UserError(
            f"{given}: compares displacements of this round, which absent neighbours do not have; set method.neighbours=cohort"
        )


def of_similarity(displacement: Tensor, a: Tensor) -> Tensor:
    """s_k = m_k·c_k / (1 + m_k·c_k) [M] float64, within [0, 1), of displacements [M,P] of a round's clients and their graph a
    [M,M]; 0 for a client without neighbours.

    c_k = Σ_l a_kl·cos(Δ_k, Δ_l) / Σ_l a_kl, not below 0. m_k = (Σ_l a_kl)² / Σ_l a_kl², which is the number of neighbours where
    their weights are equal, else their effective number (Kish, "Survey Sampling", 1965). Neighbours of one task (c = 1) are
    averaged in full, s = m/(1 + m) with the client's own row among m + 1; unrelated ones (c = 0) not at all.
    """
    a = a.double()
    degree, square = a.sum(1), a.square().sum(1)
    related = degree > 0
    cosine = cosines(displacement, torch.zeros_like(displacement[0]))
    c = ((a * cosine).sum(1) / degree.where(related, 1.0)).clamp(min=0)
    evidence = c * degree.square() / square.where(related, 1.0)
    return evidence / (1 + evidence)
