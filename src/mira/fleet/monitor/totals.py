"""The sums over a run that an operator watches, made of the records of its rounds alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from mira.core.robust import COUNTED, doubted
from mira.fleet.messages.transport import RejectionKind

K = TypeVar("K")
V = TypeVar("V", int, float)
Outcome = Literal["accepted", "late", "offline", "failed", "rejected"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
REJECTIONS: tuple[str, ...] = tuple(kind for kind in get_args(RejectionKind) if kind != "failed")
PHASES = ("prepare", "train", "aggregate", "measure")
_OUTCOME: dict[str, Outcome] = {"late": "late", "offline": "offline", **dict.fromkeys(REJECTIONS, "rejected")}


@dataclass(frozen=True)
class Totals:
    """Sums over the committed rounds of a run. ``replies``: by site and outcome; ``rejected``: by site and kind; ``sent``:
    bytes of adapters by site and direction, up or down; ``seconds``: by phase. The losses are those of the last round that has
    them, means over sites. ``epsilon``: of each site with noise, as of the last round. ``counted``: the share of its weight that
    the adapter of each site had under a defence in its last round; ``doubted``: by site, the rounds in which it was little."""

    rounds: int = 0
    tokens: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    replies: Mapping[tuple[str, Outcome], int] = field(default_factory=dict)
    rejected: Mapping[tuple[str, str], int] = field(default_factory=dict)
    sent: Mapping[tuple[str, str], int] = field(default_factory=dict)
    train_loss: float | None = None
    validation_loss: float | None = None
    epsilon: Mapping[str, float] = field(default_factory=dict)
    counted: Mapping[str, float] = field(default_factory=dict)
    doubted: Mapping[str, int] = field(default_factory=dict)

    def after(self, record: Mapping[str, Any]) -> Totals:
        """The sums with one more round's ``record`` (docs/run-folder.md). Fields that older records lack count as none."""
        kinds = _kinds(record)
        outcomes = [(name, outcome_of(kinds.get(name))) for name in record.get("cohort", ())]
        losses = [loss for loss in record.get("train_loss", {}).values() if loss is not None]  # None: not told
        validation = record.get("validation_loss")
        privacy = record.get("privacy", {})
        return replace(
            self,
            rounds=record["round"],
            tokens=self.tokens + record.get("tokens", 0),
            seconds=_added(self.seconds, record.get("phase_seconds", {}).items()),
            replies=_added(self.replies, ((key, 1) for key in outcomes)),
            rejected=_added(self.rejected, ((key, 1) for key in kinds.items() if key[1] in REJECTIONS)),
            sent=_added(self.sent, (
                ((name, way), size) for name, ways in record.get("client_bytes", {}).items() for way, size in ways.items()
            )),
            train_loss=sum(losses) / len(losses) if losses else self.train_loss,
            validation_loss=self.validation_loss if validation is None else validation,
            epsilon={name: told["epsilon"] for name, told in privacy.items()} if privacy else self.epsilon,
            counted={**self.counted, **record.get(COUNTED, {})},
            doubted=_added(self.doubted, ((name, 1) for name in doubted(record))),
        )  # fmt: skip


def totals(records: Iterable[Mapping[str, Any]]) -> Totals:
    """The sums over all ``records`` of a run, in order."""
    found = Totals()
    for record in records:
        found = found.after(record)
    return found


def outcome_of(kind: str | None) -> Outcome:
    """The outcome of a site's reply that was lost for a reason of ``kind``; None: it was used."""
    return "accepted" if kind is None else _OUTCOME.get(kind, "failed")


def _kinds(record: Mapping[str, Any]) -> dict[str, str]:
    """The kind of each loss; records of earlier versions have none."""
    told: Mapping[str, str] = record.get("lost_kind", {})
    return {**dict.fromkeys(record.get("lost", ()), "failed"), **told}


def _added(before: Mapping[K, V], more: Iterable[tuple[K, V]]) -> dict[K, V]:
    """The sums ``before`` with ``more`` added to them."""
    found = dict(before)
    for key, value in more:
        found[key] = found[key] + value if key in found else value
    return found
