"""Rows offered to clients: which one each takes, what is committed, and what is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.quadratic_rounds import K, start_of
from mira.core.checks import checked_change, checked_work
from mira.core.errors import UserError
from mira.core.loop import Schedule, run_rounds
from mira.core.offers import choose, described, settled, unanswered, unmeasured
from mira.core.training import Training
from mira.core.types import Change, MemoryRows, Offer, Scores, ServerState, Setting, Trained, Work
from mira.testing.quadratic import LAYOUT, QuadraticClients
from mira.testing.recorders import MemoryRecorder

pytestmark = pytest.mark.quick

NAMES = [f"c{k}" for k in range(K)]
TOY = QuadraticClients.draw(K)


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, LAYOUT.size, generator=torch.Generator().manual_seed(seed))


def offer(rows: tuple[Tensor, ...], points: tuple[float, ...] | None = None) -> Offer:
    everyone = torch.arange(len(rows[0]))
    return Offer("taken", everyone, everyone, rows, "validation", points)


def test_the_first_of_the_least_losses_is_taken_and_what_is_not_finite_never() -> None:
    nan, inf = float("nan"), float("inf")
    loss = torch.tensor([[2.0, 1, 1], [1, 1, 1], [nan, 3, 2], [inf, 4, nan], [nan, nan, inf]]).double()
    rows = drawn(5)
    assert choose(offer((rows, rows, rows)), loss).option.tolist() == [1, 0, 2, 1, -1]


def test_points_lie_on_the_line_and_the_first_is_the_own_row_to_the_bit() -> None:
    own, other = drawn(4), drawn(4, 1)
    line = offer((own, other), (0.0, 0.25, 1.0))
    assert torch.equal(line.row(0), own)
    torch.testing.assert_close(line.row(1), 0.75 * own + 0.25 * other)
    torch.testing.assert_close(line.row(2), other)
    assert line.labels == (0.0, 0.25, 1.0)


@pytest.mark.parametrize("points", [None, (0.0, 0.3, 0.7)])
def test_the_row_taken_is_the_row_that_was_measured_to_the_bit(points: tuple[float, ...] | None) -> None:
    made = offer((drawn(4), drawn(4, 1)), points)
    option = torch.tensor([0, 1, 1, 0]) if points is None else torch.tensor([0, 1, 2, 1])
    taken = made.taken(option)
    assert all(torch.equal(taken[i], made.row(int(n))[i]) for i, n in enumerate(option))


def test_a_client_without_an_answer_keeps_the_value_and_counts_as_no_step() -> None:
    everyone, value = torch.arange(3), drawn(3, 2)
    made = Offer(
        "strength", torch.tensor([2, 0]), torch.tensor([2, 0]), (drawn(2), drawn(2, 1)), "validation", (0.0, 0.5)
    )
    change = Change(everyone, value, {}, {"effective_step": 0.0}, offer=made)
    done = settled(change, choose(made, torch.tensor([[3.0, 2.0], [torch.nan, torch.nan]]).double()))
    assert torch.equal(done.value[:2], value[:2])
    assert torch.equal(done.value[2], made.row(1)[0])
    assert done.notes == {"effective_step": pytest.approx(0.5 / 3)}
    assert done.offer is None


def test_a_client_without_a_loss_takes_the_option_that_the_offer_names() -> None:
    """Not the first of its equal losses; of one with no example of the split they are 0 nats / 0 tokens each."""
    everyone, value, rows = torch.arange(3), drawn(3, 2), (drawn(3), drawn(3, 1))
    made = Offer("strength", everyone, everyone, rows, "validation", (0.0, 0.5, 1.0), otherwise=1)
    empty = Scores(torch.zeros(3).double(), torch.zeros(3, dtype=torch.int64)).loss
    loss = torch.stack(
        [torch.tensor([3.0, 2.0, 1.0]).double(), empty, torch.tensor([torch.nan, torch.inf, 4.0]).double()]
    )
    choice = choose(made, loss)
    assert choice.labels == {0: 1.0, 1: 0.5, 2: 1.0}
    done = settled(Change(everyone, value, {}, {}, offer=made), choice)
    assert torch.equal(done.value[1], made.row(1)[1])
    assert done.notes == {"effective_step": pytest.approx(2.5 / 3)}
    record = described([choice], NAMES)
    assert record["offers"]["strength"]["losses"]["c1"] == [None] * 3
    assert unmeasured(record) == {"c1": "strength 0.5"}
    assert unmeasured(described([choose(replace(made, otherwise=None), loss)], NAMES)) == {}
    assert unmeasured({"round": 0}) == {}


# In the round loop.


@dataclass(frozen=True)
class Two:
    """Clients start from the better of two rows, and keep the better of their trained row and the other row."""

    name: str = "two"

    def init(self, setting: Setting) -> ServerState:
        return ServerState(MemoryRows(setting.start, K, {}), setting.graph, {})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        rows = tuple(drawn(2).double()[n].expand(len(cohort), -1) for n in range(2))
        places = torch.arange(len(cohort))
        return Work(cohort, state.rows[cohort], offer=Offer("begun", places, cohort, rows, "train"))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        assert trained.option is not None
        others = drawn(2).double()[1 - trained.option.clamp(min=0)]
        places = torch.arange(len(trained.client))
        made = Offer("kept", places, trained.client, (trained.rows, others), "validation", (0.0, 1.0))
        return Change(trained.client, trained.rows, {}, {}, offer=made)

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client]


def run(losses: Callable[[Offer], Tensor]) -> tuple[MemoryRecorder, ServerState]:
    state = start_of(Two())
    recorder = MemoryRecorder(state.rows)
    schedule = Schedule(0, 1, 0.6, Training(lr=0.1, local_steps=1))
    end = run_rounds(Two(), TOY, state, schedule, NAMES, recorder, lambda s, r: {}, lambda r: None, losses)
    return recorder, end


def test_offers_at_the_start_and_at_the_end_of_a_round() -> None:
    recorder, end = run(TOY.losses)
    record, two = recorder.records[0], drawn(2).double()
    size = LAYOUT.size * 8  # float64
    for name in record["cohort"]:
        k = NAMES.index(name)
        loss = [float(0.5 * (TOY.curvature[k] * (row - TOY.target[k]).square()).sum()) for row in two]
        first = loss.index(min(loss))
        assert record["begun"][name] == first
        assert record["offers"]["begun"]["losses"][name] == pytest.approx(loss)
        begin = Work(torch.tensor([k]), two[first][None])
        own = TOY.train(begin, 0, 0.1).rows[0]
        after = [0.5 * (TOY.curvature[k] * (row - TOY.target[k]).square()).sum() for row in (own, two[1 - first])]
        kept = own if after[0] <= after[1] else two[1 - first]
        torch.testing.assert_close(end.rows[torch.tensor([k])][0], kept, rtol=0, atol=1e-12)
        # A start, two rows at the start and the two ends of the line.
        assert record["client_bytes"][name] == {"down": 5 * size, "up": size}
    assert record["offers"]["kept"]["options"] == [0.0, 1.0]
    assert (record["offers"]["begun"]["split"], record["offers"]["kept"]["split"]) == ("train", "validation")


def test_where_nobody_answers_everybody_starts_from_and_keeps_the_plain_row() -> None:
    recorder, end = run(unanswered)
    record = recorder.records[0]
    assert record["begun"] == record["kept"] == {}
    assert record["offers"]["kept"]["losses"]["c0" if "c0" in record["cohort"] else record["cohort"][0]] == [None, None]
    cohort = torch.tensor([NAMES.index(name) for name in record["cohort"]])
    plain = TOY.train(Work(cohort, start_of(Two()).rows[cohort]), 0, 0.1)
    assert torch.equal(end.rows[cohort], plain.rows)


# Wrong offers.


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda o: None, "offer must be a mira.core.types.Offer; it is dict"),
        (lambda o: replace(o, name="round"), "name 'round' is no name of its own"),
        (lambda o: replace(o, place=o.place + 1), "place must hold numbers from 0 to 1; it holds 2"),
        (lambda o: replace(o, place=o.place * 0), "place must hold 2 different numbers"),
        (lambda o: replace(o, client=o.client * 0), "client must hold 2 different numbers"),
        (lambda o: replace(o, split="test"), "split must be 'train' or 'validation'; it is 'test'"),
        (lambda o: replace(o, points=(0.0,), rows=o.rows[:1]), "points lie between two rows; it has 1"),
        (lambda o: replace(o, points=()), "has no option"),
        (lambda o: replace(o, rows=()), "has no option"),
        (lambda o: replace(o, otherwise=2), "otherwise must be an option from 0 to 1; it is 2"),
        (lambda o: replace(o, rows=(o.rows[0], o.rows[1][:1])), "rows[1] must be float64 [2, 10]"),
    ],
)
def test_a_wrong_offer_is_refused_in_one_line(spoil: Any, text: str) -> None:
    state, two = start_of(Two()), torch.arange(2)
    rows = drawn(2).double()
    good = Offer("kept", two, two, (rows, rows), "validation")
    change, work = Change(two, rows, {}, {}, offer=good), Work(two, rows, offer=good)
    assert checked_change(Two(), change, state, rows[0]) is change
    assert checked_work(Two(), work, K) is work
    wrong: Any = {} if (spoilt := spoil(good)) is None else spoilt
    for check in (
        lambda: checked_change(Two(), replace(change, offer=wrong), state, rows[0]),
        lambda: checked_work(Two(), replace(work, offer=wrong), K),
    ):
        with pytest.raises(UserError) as caught:
            check()
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_offer_to_another_client_than_the_jobs_is_refused() -> None:
    two, rows = torch.arange(2), drawn(2).double()
    work = Work(two, rows, offer=Offer("kept", two, two + 1, (rows, rows), "train"))
    with pytest.raises(UserError, match="offer must name the client of each job"):
        checked_work(Two(), work, K)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [({9: 1.0}, "by client number; it holds 9"), ({0: float("nan")}, "it holds 0: nan")],
)
def test_wrong_numbers_of_clients_are_refused(numbers: dict[int, float], text: str) -> None:
    rows = drawn(2).double()
    change = Change(torch.arange(2), rows, {}, {}, of_clients={"strength": numbers})
    with pytest.raises(UserError, match=text):
        checked_change(Two(), change, start_of(Two()), rows[0])
