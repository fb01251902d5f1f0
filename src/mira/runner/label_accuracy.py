"""Accuracy by likelihood for tasks with few answers: the share of examples with the expected answer as the likeliest one.

The candidates are the answers in the client's training examples. The metric needs no generation and does not depend on spelling.
The likelihood is that of the whole answer with its end token.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mira.core.engine import Engine
from mira.data.corpus import Corpus
from mira.data.types import Example

MOST = 20  # largest number of different answers of such a task


def label_accuracy(engine: Engine, corpus: Corpus, rows: Tensor, limit: int | None) -> list[float | None]:
    """For each client the share of test examples with the expected answer as the likeliest of all training answers, with the
    client's row of ``rows`` [K,P]; None if the task has too many answers."""
    return [_accuracy(engine, corpus, k, row, limit) for k, row in enumerate(rows)]


def _accuracy(engine: Engine, corpus: Corpus, k: int, row: Tensor, limit: int | None) -> float | None:
    owner = corpus.federation.clients[k]
    labels = sorted({example.output for example in owner.train})
    if not (2 <= len(labels) <= min(MOST, len(owner.train) // 2)):
        return None
    asked = owner.test[:limit]
    tried = [_answered(example, label) for example in asked for label in labels]
    places = [f"an answer of client '{owner.name}'"] * len(tried)
    nll, _ = engine.score(row[None], [corpus.encoder.encode_all(tried, places)])
    chosen = nll.view(len(asked), len(labels)).argmin(1).tolist()
    right: int = sum(labels[n] == example.output for n, example in zip(chosen, asked, strict=True))
    return right / len(asked)


def _answered(example: Example, label: str) -> Example:
    messages = example.messages
    last = (*messages[:-1], replace(messages[-1], content=label)) if messages else ()
    return replace(example, output=label, messages=last)
