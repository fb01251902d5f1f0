"""Measuring every client under the row it would deploy: loss, answers, transfer.

Loss is token-weighted cross-entropy in nats; means over clients are unweighted, so that a client with long answers
counts as much as any other. ROUGE-L: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from mira.core.layout import Layout
from mira.core.seeds import generator
from mira.core.types import Engine, Grade, Method, ServerState

Record = dict[str, Any]


def losses(
    method: Method, engine: Engine, state: ServerState, names: Sequence[str], limit: int | None, test: bool = True
) -> Record:
    """Validation and test loss of every client, and their means. Without ``test`` that split is not read: None."""
    everyone = torch.arange(len(names))
    splits = ("validation", "test") if test else ("validation",)
    validation, *tested = engine.evaluate(method.serve(state, everyone), everyone, splits, limit).loss.T.tolist()
    on_test = tested[0] if test else [None] * len(names)
    clients = {
        name: {"validation_loss": v, "test_loss": t, "perplexity": None if t is None else _perplexity(t)}
        for name, v, t in zip(names, validation, on_test, strict=True)
    }
    return {"validation_loss": _mean(validation), "local_loss": _mean(tested[0]) if test else None, "clients": clients}


def answers(names: Sequence[str], grades: Sequence[Grade]) -> Record:
    """Every client's exact match and ROUGE-L, and their means."""
    means = {key: _mean([grade[key] for grade in grades]) for key in ("exact_match", "rouge_l")}
    return {**means, "clients": dict(zip(names, grades, strict=True))}


def grade(
    engine: Engine, rows: Tensor, client: Tensor, references: Sequence[Sequence[str]], limit: int | None,
    max_new_tokens: int,
) -> list[Grade]:  # fmt: skip
    """Exact match and ROUGE-L F1 of row i's greedy answers on the test split of client[i]."""
    given = engine.generate(rows, client, "test", limit, max_new_tokens)
    return [
        {"exact_match": exact_match(g, r), "rouge_l": rouge_l(g, r)} for g, r in zip(given, references, strict=True)
    ]


def transfer(
    method: Method, engine: Engine, state: ServerState, layout: Layout, names: Sequence[str], seed: int, clients: int,
    examples: int, among: Tensor | None = None,
) -> Record:  # fmt: skip
    """Each sampled client's row on the test split of each sampled client, and the mean row on each of them. ``among``: the
    clients to sample from, None for all.

    ``matrix[i][j]``: loss of row i on the data of client j; ``global_loss``: mean off the diagonal.
    """
    pool = torch.arange(len(names)) if among is None else among
    n = min(clients, len(pool))
    if n < 2:
        return {}
    chosen = pool[torch.randperm(len(pool), generator=generator("transfer", seed))[:n]].sort().values
    rows = method.serve(state, chosen)
    matrix = torch.stack([engine.evaluate(row.expand(n, -1), chosen, ("test",), examples).loss[:, 0] for row in rows])
    mean = engine.evaluate(layout.mean(rows).expand(n, -1), chosen, ("test",), examples).loss[:, 0]
    others = ~torch.eye(n, dtype=torch.bool)
    return {
        "names": [names[int(k)] for k in chosen],
        "matrix": matrix.tolist(),
        "global_loss": float(matrix[others].mean()),
        "mean_row_loss": float(mean.mean()),
    }


def exact_match(given: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to their reference, surrounding white space aside."""
    return _mean([float(g.strip() == r.strip()) for g, r in zip(given, references, strict=True)])


def rouge_l(given: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 with Porter stemming, as Natural Instructions scores it."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return _mean([float(scorer.score(r, g)["rougeL"].fmeasure) for g, r in zip(given, references, strict=True)])


def _perplexity(loss: float) -> float | None:
    """exp(loss), or None where it leaves the range of a float."""
    return exp(loss) if loss < 700 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
