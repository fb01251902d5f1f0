"""The learning rate over the rounds, and how many steps a client does."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mira.core.training import Training


def rates(rounds: int, **settings: object) -> list[float]:
    training = Training(local_steps=1, **settings)  # type: ignore[arg-type]
    return [training.lr_at(round, rounds) for round in range(rounds)]


def test_schedules_by_hand() -> None:
    assert rates(4, lr=0.8) == [0.8] * 4
    assert rates(4, lr=0.8, schedule="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert rates(4, lr=0.8, schedule="cosine") == pytest.approx(
        [0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    )
    assert rates(6, lr=0.8, schedule="linear", warmup_rounds=2) == pytest.approx([0.4, 0.8, 0.8, 0.6, 0.4, 0.2])


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(1, 50), st.integers(0, 49))
def test_the_peak_is_reached_once_warm_and_never_passed(schedule: str, rounds: int, warmup: int) -> None:
    warmup = min(warmup, rounds - 1)
    lr = rates(rounds, lr=0.5, schedule=schedule, warmup_rounds=warmup)
    assert lr[warmup] == max(lr) == 0.5
    assert min(lr) > 0
    assert lr[:warmup] == sorted(lr[:warmup])
    assert lr[warmup:] == sorted(lr[warmup:], reverse=True)


def test_steps_of_a_round() -> None:
    assert Training(local_steps=7).steps_for(3) == 7
    assert Training(local_epochs=2, batch_size=4).steps_for(9) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither of local_steps and local_epochs"),
        ({"local_steps": 1, "local_epochs": 1}, "both of local_steps and local_epochs"),
        ({"local_steps": 1, "momentum": 0.5}, "belongs to optimizer 'sgd'"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**settings)  # type: ignore[arg-type]
