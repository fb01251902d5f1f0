"""Evaluation of every client with the row that it deploys: loss, answers, transfer.

Loss is token-weighted cross-entropy in nats. Means over clients are unweighted, so that long answers do not give a client more
weight. A client on a machine of its own that does not answer counts with its last known loss: a mean over the clients that
answer would change with their selection. With a row for each client, that last loss is still exact, as the row of an absent
client does not change. ROUGE-L: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, F1, over the words of
``mira.core.text_metrics``, which are ROUGE's own for ASCII text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import exp, isnan, nan
from typing import Any

import torch
from torch import Tensor

from mira.core.engine import ClientEngine, Evaluator, Grade
from mira.core.errors import UserError, did_you_mean
from mira.core.layout import Layout
from mira.core.seeds import generator
from mira.core.text_metrics import chrf, words
from mira.core.types import Method, ServerState

Record = dict[str, Any]
Metric = Callable[[Sequence[str], Sequence[str]], float]  # (answers of a client, reference answers) -> value

LABEL_ACCURACY = "label_accuracy"  # measured by likelihood, without generation: mira.runner.label_accuracy
_ALWAYS = ("exact_match", "rouge_l")
_more: dict[str, Metric] = {
    "chrf": lambda given, references: _mean([chrf(g, r) for g, r in zip(given, references, strict=True)])
}


def register(name: str, metric: Metric) -> None:
    """Register ``metric``, a function of a client's answers and the reference answers, under ``name`` for
    ``evaluation.metrics`` in this process. Raises UserError where ``name`` is a built-in metric."""
    if name in (*_ALWAYS, LABEL_ACCURACY):
        raise UserError(f"metric '{name}': is built in; register yours under another name")
    _more[name] = metric


def check_metrics(names: Sequence[str]) -> None:
    """Raise UserError for an unknown name in ``evaluation.metrics``."""
    for name in names:
        if name not in (*_more, LABEL_ACCURACY):
            hint = did_you_mean(name, (*_more, LABEL_ACCURACY))
            raise UserError(
                f"evaluation.metrics: unknown metric '{name}' (add yours with mira.runner.evaluation.register){hint}"
            )


def losses(
    method: Method, engine: Evaluator, state: ServerState, names: Sequence[str], limit: int | None, test: bool = True,
    known: Mapping[str, Record] | None = None,
) -> Record:  # fmt: skip
    """Validation and test loss of every client, and their means. Without ``test`` the test split is not read, and its losses are
    None.

    ``known``: the last losses of each client. ``unmeasured`` of the result, where clients did not answer: for each of them the
    round of the last losses, which enter the means; None for a client without any, which enters no mean.
    """
    everyone = torch.arange(len(names))
    splits = ("validation", "test") if test else ("validation",)
    scores = engine.evaluate(method.deployed(state, everyone), everyone, splits, limit)
    validation, *tested = scores.loss.T.tolist()
    on_test = tested[0] if test else [None] * len(names)
    clients = {
        name: {"validation_loss": v, "test_loss": t, "perplexity": None if t is None else _perplexity(t)}
        for name, v, t in zip(names, validation, on_test, strict=True)
    }
    silent = [names[k] for k in (scores.tokens == 0).any(1).nonzero()[:, 0].tolist()]
    before = {name: (known or {}).get(name) for name in silent}
    counted = [scores for scores in (clients | before).values() if scores]
    return {
        "validation_loss": _mean_known(counted, "validation_loss"),
        "local_loss": _mean_known(counted, "test_loss") if test else None,
        **({"unmeasured": {name: last and last["round"] for name, last in before.items()}} if silent else {}),
        "clients": clients,
    }


def known_from(records: Iterable[Record]) -> dict[str, Record]:
    """The last losses of every client, and the ``round`` of that measurement."""
    known: dict[str, Record] = {}
    for record in records:
        away = record.get("unmeasured", {})
        found = {name: scores for name, scores in record.get("clients", {}).items() if name not in away}
        known |= {name: {**scores, "round": record["round"]} for name, scores in found.items()}
    return known


def answers(names: Sequence[str], grades: Sequence[Grade]) -> Record:
    """Exact match, ROUGE-L and further metrics of every client, and the mean of each over the clients that have it.
    ``unmeasured``: clients that did not answer."""
    came = [grade for grade in grades if not isnan(grade["exact_match"])]
    keys = dict.fromkeys((*_ALWAYS, *(key for grade in came for key in grade)))
    means = {key: _mean(found) if (found := [g[key] for g in came if key in g]) else nan for key in keys}
    silent = [name for name, grade in zip(names, grades, strict=True) if isnan(grade["exact_match"])]
    clients = dict(zip(names, grades, strict=True))
    return {**means, **({"unmeasured": silent} if silent else {}), "clients": clients}


def grade(
    engine: ClientEngine, rows: Tensor, client: Tensor, references: Sequence[Sequence[str]], limit: int | None,
    max_new_tokens: int, metrics: Sequence[str] = (),
) -> list[Grade]:  # fmt: skip
    """Exact match, ROUGE-L F1 and ``metrics`` of the greedy answers of row i on the test split of client[i]."""
    given = engine.generate(rows, client, "test", limit, max_new_tokens)
    more = [name for name in metrics if name in _more]
    return [
        {"exact_match": exact_match(g, r), "rouge_l": rouge_l(g, r)} | {name: float(_more[name](g, r)) for name in more}
        for g, r in zip(given, references, strict=True)
    ]


def transfer(
    method: Method, engine: ClientEngine, state: ServerState, layout: Layout, names: Sequence[str], seed: int, clients: int,
    examples: int, limit: int | None, among: Tensor | None = None,
) -> Record:  # fmt: skip
    """Losses of the rows of sampled clients on ``examples`` of the test splits of all sampled clients, and of one row for all on
    all of the test data. ``among``: the clients that take part; None: all.

    ``matrix[i][j]``: loss of row i on the data of client j. ``global_loss``: the mean off the diagonal. ``mean_row_loss``: the
    mean loss of the clients with the mean of their rows, on at most ``limit`` examples each, as for the losses of own rows.
    """
    pool = torch.arange(len(names)) if among is None else among
    n = min(clients, len(pool))
    if n < 2:
        return {}
    chosen = pool[torch.randperm(len(pool), generator=generator("transfer", seed))[:n]].sort().values
    rows = method.deployed(state, chosen)
    matrix = torch.stack([engine.evaluate(row.expand(n, -1), chosen, ("test",), examples).loss[:, 0] for row in rows])
    one = layout.mean(method.deployed(state, pool))
    common = engine.evaluate(one.expand(len(pool), -1), pool, ("test",), limit).loss[:, 0]
    others = ~torch.eye(n, dtype=torch.bool)
    return {
        "names": [names[int(k)] for k in chosen],
        "matrix": matrix.tolist(),
        "global_loss": float(matrix[others].mean()),
        "mean_row_loss": float(common.mean()),
    }


def exact_match(given: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that equal their reference, except for surrounding white space."""
    return _mean([float(g.strip() == r.strip()) for g, r in zip(given, references, strict=True)])


def rouge_l(given: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 with Porter stemming, as Natural Instructions scores it, over words in any script."""
    # Imported on use: it brings SciPy and NLTK, which take 2 s.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return _mean([float(scorer.score(r, g)["rougeL"].fmeasure) for g, r in zip(given, references, strict=True)])


class _Words:
    """The tokenizer of ROUGE-L: words in any script, ASCII words stemmed."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        return [self._stem(word) if word.isascii() and word.isalnum() else word for word in words(text)]

    def _stem(self, word: str) -> str:
        stem: list[str] = self._english.tokenize(word)
        return stem[0]


def _perplexity(loss: float) -> float | None:
    """exp(loss), or None where it overflows."""
    return exp(loss) if loss < 700 else None


def _mean_known(clients: Sequence[Record], key: str) -> float:
    """The mean of ``key`` over ``clients``; NaN where a client has no finite loss, or there are no clients."""
    values = [nan if client[key] is None else client[key] for client in clients]
    return _mean(values) if values else nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
