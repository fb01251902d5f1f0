"""Notes on the validity of the figures."""

from __future__ import annotations

from collections.abc import Sequence

from mira.results.html.load import RunData
from mira.results.html.variants import Variant
from mira.results.tables import privacy

_NAMED = 5  # largest number of clients named in a note


def notes(runs: Sequence[RunData], variants: Sequence[Variant], names: Sequence[str]) -> list[str]:
    """One sentence each, the most serious first."""
    return [
        *_comparable(runs, variants),
        *(note for run in runs for note in _of_run(run, alone=len(runs) == 1)),
        *(note for variant in variants for note in _of_variant(variant, names, alone=len(variants) == 1)),
    ]


def _comparable(runs: Sequence[RunData], variants: Sequence[Variant]) -> list[str]:
    found = []
    by_seed: dict[int, set[str]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, set()).add(str(run.environment.get("data", {}).get("sha256")))
    if any(len(digests) > 1 for digests in by_seed.values()):
        found.append("The runs were not made on the same data: their losses cannot be compared.")
    if len({str(run.environment.get("model", {}).get("sha256")) for run in runs}) > 1:
        found.append("The runs have different base models: differences are not due to the method alone.")
    if len({frozenset(run.names) for run in runs}) > 1:
        found.append("The runs have different clients; only their common clients are shown.")
    if len(variants) > 1 and len({tuple(run.seed for run in v.runs) for v in variants}) > 1:
        found.append("The variants were not run with the same seeds.")
    if len(variants) > 1 and any(len(variant.runs) < 3 for variant in variants):
        found.append("Fewer than three seeds: a difference may be due to chance. Repeat with more seeds.")
    return found


def _of_run(run: RunData, alone: bool) -> list[str]:
    who = "The run" if alone else run.folder.name
    found = []
    done = len(run.records) - 1
    if run.result is None:
        found.append(f"{who} is not finished: {done} of {run.rounds} rounds.")
    elif reason := run.records[-1].get("stopped"):
        found.append(f"{who} ended early, after {done} of {run.rounds} rounds: {reason}.")
    if template := run.environment.get("prompt", {}).get("template"):
        found.append(f"{who} was trained and measured with {template} prompts.")
    lost = run.lost
    if lost:
        times = "once" if len(lost) == 1 else f"{len(lost)} times"
        found.append(
            f"{who} continued without a client {times}: {_list([name for _, name, _ in lost])}; see Lost clients."
        )
    if doubted := run.doubted:
        found.append(f"{who} let clients count for little: {_list([name for name, *_ in doubted])}; see Defence.")
    if spent := run.records[-1].get("privacy"):
        found.append(f"{who} added noise: {privacy(spent)}.")
    cut = run.environment.get("truncated", {})
    if cut:
        found.append(
            f"{who} truncated inputs to prompt.max_length={run.config.get('prompt.max_length')}: {_list(list(cut))}."
        )
    return found


def _of_variant(variant: Variant, names: Sequence[str], alone: bool) -> list[str]:
    who = "" if alone else f"{variant.label}: "
    if variant.first.config.get("privacy.metrics") == '"none"':
        return [f"{who}its clients told no losses, metrics and counts (privacy.metrics: none)."]
    pairs = [(name, variant.start.get(name), variant.after.get(name)) for name in names]
    endless = [name for name, _, after in pairs if after is None]
    worse = [name for name, before, after in pairs if before is not None and after is not None and after > before]
    found = []
    if endless:
        found.append(f"{who}no finite loss for {_list(endless)}; means over clients are left out.")
    if worse:
        found.append(f"{who}worse than before training: {_list(worse)}.")
    last = len(variant.first.records) - 1
    if all(run.best < len(run.records) - 1 for run in variant.runs) and last:
        rounds = ", ".join(str(run.best) for run in variant.runs)
        found.append(
            f"{who}validation loss was lowest in round {rounds} of {last}, not in the last: export with --round best."
        )
    return found


def _list(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return (
        ", ".join(unique) if len(unique) <= _NAMED else f"{', '.join(unique[:_NAMED])} and {len(unique) - _NAMED} more"
    )
