"""Variants: groups of runs that differ in their seed alone, with labels that tell them apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from mira.results.html.load import Losses, RunData
from mira.results.statistics import Mean, mean

# Configuration keys that do not make another variant.
_ASIDE = ("name", "seed", "engine.threads")


@dataclass(frozen=True)
class Variant:
    label: str
    runs: tuple[RunData, ...]  # one a seed

    @property
    def first(self) -> RunData:
        return self.runs[0]

    @cached_property
    def rounds(self) -> list[int]:
        """The rounds that were measured in every run."""
        return [n for n in self.first.measured if all(n in run.measured for run in self.runs)]

    @cached_property
    def start(self) -> Losses:
        """Loss of each client before training, mean over seeds; None where it was not measured."""
        return _over_seeds([run.before for run in self.runs])

    @cached_property
    def after(self) -> Losses:
        """Loss of each client at the validation-best round, mean over seeds."""
        return _over_seeds([run.after for run in self.runs])

    def at(self, round: int, names: Sequence[str]) -> list[float | None]:
        """Test loss of ``names`` after ``round``, mean over seeds."""
        losses = _over_seeds([run.losses(round) for run in self.runs])
        return [losses[name] for name in names]

    def seed_means(self, names: Sequence[str], round: int | None = None) -> list[float | None]:
        """Mean test loss of ``names`` for each seed, after ``round`` or after the seed's best round."""
        values = []
        for run in self.runs:
            losses = run.after if round is None else run.losses(round)
            each = mean([losses.get(name) for name in names])
            values.append(each.value if each else None)
        return values

    def loss(self, names: Sequence[str]) -> Mean | None:
        """Mean test loss of ``names`` at the best round; the interval is over seeds, or over clients where there is one seed."""
        values = self.seed_means(names) if len(self.runs) > 1 else [self.after.get(name) for name in names]
        return mean(values)

    def score(self, key: str) -> Mean | None:
        """A score of ``RunData.score`` over seeds; None unless all have it."""
        return mean([run.score(key) for run in self.runs])

    @property
    def sent(self) -> float:
        return fmean(run.sent(len(run.records) - 1) for run in self.runs)

    @property
    def seconds(self) -> float:
        return fmean(run.seconds for run in self.runs)


def group(runs: Sequence[RunData]) -> list[Variant]:
    """The variants of ``runs``, in the given order; the runs of a variant in the order of their seeds."""
    same: dict[str, list[RunData]] = {}
    for run in runs:
        same.setdefault(json.dumps(_essence(run)), []).append(run)
    members = [tuple(sorted(found, key=lambda run: run.seed)) for found in same.values()]
    return [Variant(label, found) for label, found in zip(_labels([m[0] for m in members]), members, strict=True)]


def differing(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) for each configuration key that differs, except seeds and names."""
    essences = [_essence(run) for run in runs]
    keys = dict.fromkeys(key for essence in essences for key in essence)
    rows = [(key, [essence.get(key, "–") for essence in essences]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _essence(run: RunData) -> dict[str, str]:
    """The configuration of a variant. Older runs have a strength in the paper's form, which has none."""
    unused = {"method.strength"} if run.config.get("method.form") == '"paper"' else set()
    return {key: value for key, value in run.config.items() if key not in {*_ASIDE, *unused}}


def _labels(runs: Sequence[RunData]) -> list[str]:
    """Labels that tell the runs apart: the method's name, then fields that differ (the last word of the key)."""
    methods = [json.loads(run.config.get("method.name", '"?"')) for run in runs]
    labels = list(methods)
    for key, values in differing(runs):
        if len(set(labels)) == len(labels):
            break
        if key == "method.name":
            continue
        for label in {label for label in labels if labels.count(label) > 1}:
            places = [n for n, other in enumerate(labels) if other == label]
            if len({values[n] for n in places} - {"–"}) > 1:
                for n in places:
                    labels[n] = f"{label} · {_word(key)} {_value(values[n])}"
    return [
        label if labels.count(label) == 1 else f"{label} · {run.folder.name}"
        for label, run in zip(labels, runs, strict=True)
    ]


def _value(text: str) -> str:
    value = json.loads(text) if text != "–" else text
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _word(key: str) -> str:
    """'method.strength' → 'strength'; 'graph.name' → 'graph'."""
    section, _, field = key.rpartition(".")
    return section if field in ("name", "kind", "source") and section else field


def _over_seeds(losses: Sequence[Losses]) -> Losses:
    """Mean over seeds for each client of the first seed; None where a seed lacks the client or has no finite number."""
    values = {name: mean([each.get(name) for each in losses]) for name in losses[0]}
    return {name: value.value if value else None for name, value in values.items()}
