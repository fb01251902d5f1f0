"""One liar among eight clients in two groups: with ``server.robust: clip`` the honest ones end as without it."""

from __future__ import annotations

import pytest
from benchmarks.liars import GROUPS, LIAR, LIES, NAMES, Lying, quadratic

from mira.core.robust import COUNTED, doubted
from mira.methods import METHODS
from mira.methods.defended import defended

pytestmark = pytest.mark.quick

DAMAGE = {  # the least that the lie costs without a defence, relative; 0 for those that look like an honest client
    "sign-flipped": 0.5, "scaled": 0.5, "flipped and scaled": 0.5, "random": 0.0, "random and scaled": 0.1, "copied": 0.1,
    "drifting": 0.0, "drifting faster": 0.5,
}  # fmt: skip
NAMED = [lie for lie, damage in DAMAGE.items() if damage]  # a liar that harms is named


@pytest.mark.parametrize("lie", LIES)
def test_honest_clients_end_within_five_per_cent_of_the_loss_without_the_liar(lie: str) -> None:
    trial, method = quadratic(0, rounds=12), METHODS["mira"](strength=0.5)
    alone = trial.run(method, "none", GROUPS, Lying(trial.clients, None))[0]
    bare = trial.run(method, "none", GROUPS, Lying(trial.clients, LIES[lie]))[0]
    clipped, records = trial.run(method, "clip", GROUPS, Lying(trial.clients, LIES[lie]))
    assert bare > (1 + DAMAGE[lie]) * alone
    assert clipped < 1.05 * alone
    named = [set(doubted(record)) for record in records]
    assert all(each <= {NAMES[LIAR]} for each in named), "no honest client is named"
    assert any(named) or lie not in NAMED


@pytest.mark.parametrize(("lie", "most"), [("flipped and scaled", 1.05), ("sign-flipped", 1.10)])
def test_clients_that_choose_their_strength_end_below_training_alone_even_without_a_defence(
    lie: str, most: float
) -> None:
    """They go no further than their validation data allow. The sign-flipped displacement is not held within 5 % by any rule: the
    liar chooses s = 1, and begins from its neighbours' mean."""
    trial, method = quadratic(0, rounds=12), METHODS["mira"](strength="personal")
    alone, local = (
        trial.run(each, "none", GROUPS, Lying(trial.clients, None))[0] for each in (method, METHODS["local"]())
    )
    bare, clipped = (trial.run(method, rule, GROUPS, Lying(trial.clients, LIES[lie]))[0] for rule in ("none", "clip"))
    assert alone < bare < local
    assert clipped < most * alone


@pytest.mark.parametrize("rule", ["clip", "median", "trimmed"])
def test_a_defence_without_a_liar_costs_little_and_names_nobody(rule: str) -> None:
    trial, method = quadratic(0, rounds=12), METHODS["mira"](strength=0.5)
    plain = trial.run(method, "none", GROUPS, trial.clients)[0]
    defended, records = trial.run(method, rule, GROUPS, trial.clients)  # type: ignore[arg-type]
    assert defended < (1.001 if rule == "clip" else 1.05) * plain
    assert all(record[COUNTED].keys() == set(NAMES) and not doubted(record) for record in records)


def test_no_defence_is_the_method_itself() -> None:
    """So that a run with robust: none is bit-identical to one of a version without defences."""
    method = METHODS["mira"](strength=0.5)
    assert defended(method, "none") is method
