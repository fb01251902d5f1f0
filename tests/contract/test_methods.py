"""The work that each method gives and the change that it makes. The laws of all methods are in ``mira.testing.methods``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.method_variants import (
    BESIDE_ONE,
    COHORT_MIXED,
    ROW_OF_EACH,
    TWO_OF_EACH,
    used_by,
)
from helpers.method_variants import WHOLE as VARIANTS
from mira.core.graph import Graph, Groups
from mira.core.loop import apply, describe, screen
from mira.core.seeds import generator
from mira.core.types import Change, MemoryRows, Method, ServerState, Setting, Trained, uses_graph
from mira.methods import METHODS
from mira.testing.method_case import LAYOUT, sparse_graph
from mira.testing.methods import Spy
from mira.testing.quadratic import numbered

pytestmark = pytest.mark.quick

COHORT = [4, 0, 3]
NEIGHBOURS = {1, 5}  # of the cohort and outside it, on the graph below


@pytest.fixture(params=VARIANTS)
def method(request: pytest.FixtureRequest) -> Method:
    return VARIANTS[request.param]


def state_of(method: Method, related: Graph | None = None, round: int = 3) -> ServerState:
    """A state in which every row has been written: row k is all k."""
    related = used_by(method, related or sparse_graph())
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size), related.num_clients, related, 0.01, 4))
    return replace(state, rows=numbered(state.rows, torch.zeros(LAYOUT.size)), round=round)


def trained(method: Method, cohort: Sequence[int] = COHORT, **changed: Any) -> Trained:
    """What came back of the work ``method`` gives to ``cohort``: random rows, but for what may not move."""
    work = method.broadcast(state_of(method), torch.tensor(cohort))
    client = work.client.tolist()
    draw = generator("trained", len(client))
    rows = torch.randn(len(client), LAYOUT.size, generator=draw)
    if work.trainable is not None:
        rows = torch.where(work.trainable, rows, work.start)
    whole = {
        "client": torch.tensor(client), "job": torch.arange(len(client)),
        "rows": rows,
        "examples": torch.tensor([10 + 7 * k for k in client]), "tokens": torch.tensor([100 + k for k in client]),
        "steps": torch.tensor([2 + k % 3 for k in client]), "loss": torch.rand(len(client), generator=draw).double(),
        "lr": 0.01,
    }  # fmt: skip
    return Trained(**(whole | changed))


def after(state: ServerState, change: Change) -> dict[int, Tensor]:
    """Every row of the server once ``change`` is made."""
    mixed = apply(state, change)
    return {k: mixed.rows[torch.tensor([k])][0] for k in range(len(mixed.rows))}


# Row i of the state is all i: from which rows A (3 numbers) and B (2) of each job start, and which it is pulled to.
START = {
    "ditto": [0, 5, 0, 1, 0, 4], "mr-mtl": [5, 1, 4], "fedavg-ft": [5, 1, 4], "mira-common": [5, 1, 4],
    **dict.fromkeys([*ROW_OF_EACH, *COHORT_MIXED, *TWO_OF_EACH], COHORT),
}  # fmt: skip
ANCHOR = {
    "fedprox": [0, 0, 0], "pfedme": [0, 0, 0], "mr-mtl": [0, 0, 0], "ditto": [0] * 6, "pfedgraph": COHORT,
    "fedamp": [11, 7, 10],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_work_is_what_each_client_starts_from(name: str) -> None:
    method = VARIANTS[name]
    work = method.broadcast(state_of(method), torch.tensor(COHORT))
    assert work.client.tolist() == ([4, 4, 0, 0, 3, 3] if name == "ditto" else COHORT)
    a = START.get(name, [0, 0, 0])
    b = [5, 1, 4] if name == "fedsa-lora" else a
    assert work.start.tolist() == [[i, i, i, j, j] for i, j in zip(a, b, strict=True)]
    assert (work.anchor is None) is (work.prox is None) is (name not in ANCHOR)
    if work.anchor is not None and work.prox is not None:
        assert work.anchor[:, 0].tolist() == ANCHOR[name]
        assert work.prox.tolist() == ([0, 0.3] * 3 if name == "ditto" else [0.3] * 3)
    assert work.kept_under == ([4, 11, 0, 7, 3, 10] if name == "ditto" else COHORT)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_private_and_what_travels(name: str) -> None:
    """Local sends nothing, Ditto not its clients' own rows, FFA-LoRA no A, FedSA-LoRA no B; all others the row. Down goes an
    anchor too, where it is another row than the start, and the rows that a round adds to the base: those of its three clients,
    and of FedEx-LoRA their mean. A factor that is frozen does not return."""
    method = VARIANTS[name]
    state, done = state_of(method), trained(method)
    work = method.broadcast(state, torch.tensor(COHORT))
    private = {"local": [True] * 3, "ditto": [False, True] * 3}.get(name)
    assert (None if work.private is None else work.private.tolist()) == private
    record = describe(4, work, done, method.aggregate(state, done), [f"c{k}" for k in range(7)])
    sent = 3 * 4 * {"local": 0, "ffa-lora": 2, "fedsa-lora": 3}.get(name, LAYOUT.size)
    back = {"rolora": 3 * 4 * 3, "fedsvd": 3 * 4 * 2}.get(name, sent)  # the fourth round is one of A
    assert (record["bytes_down"], record["bytes_up"]) == (
        sent * {"mr-mtl": 2, "fedamp": 2, "scaffold": 2, "flora": 4, "fedex-lora": 5}.get(name, 1),
        back,
    )


def test_a_learned_graph_mixes_from_the_first_round_on_and_is_kept() -> None:
    """With who was found related in this very round; whoever was absent has nobody yet."""
    method = VARIANTS["mira-learned"]
    state, done = state_of(method), trained(method)
    state = replace(
        state, rows=MemoryRows(torch.zeros(LAYOUT.size), 7, {})
    )  # where all rows begin, they are displacements
    done.rows[1] = done.rows[0] + 0.1 * done.rows[1]  # clients 4 and 0 alike, 3 apart
    change = method.aggregate(state, done)
    torch.testing.assert_close(change.value[0], 0.6 * done.rows[0] + 0.4 * done.rows[1])
    assert torch.equal(change.value[2], done.rows[2])
    assert apply(state, change).graph.neighbours(torch.arange(7)).tolist() == [0, 4]


def test_who_mixes_along_no_graph_is_known(method: Method) -> None:
    """For the others none is made: all relations or none must be the same to them."""
    graphs = Groups(torch.zeros(7, dtype=torch.int64)), Groups(torch.arange(7))
    a, b = (method.aggregate(state_of(method, known), trained(method)) for known in graphs)
    learns = method is VARIANTS["mira-learned"]
    same = torch.equal(a.value, b.value) and (a.offer is None) is (b.offer is None)
    assert same is (learns or not uses_graph(method))


# The cost of a round.


def spied(method: Method, related: Graph) -> tuple[ServerState, Spy]:
    related = used_by(method, related)
    state = method.init(Setting(LAYOUT, torch.zeros(LAYOUT.size), related.num_clients, related, 0.01, 4))
    spy = Spy(state.rows)
    return replace(state, rows=spy), spy


def test_a_round_touches_the_cohorts_rows_and_their_neighbours_alone(method: Method) -> None:
    state, spy = spied(method, sparse_graph())
    name = next(name for name, variant in VARIANTS.items() if variant is method)
    method.broadcast(state, torch.tensor(COHORT))
    assert len(spy.read) <= (6 if name in TWO_OF_EACH else 4)
    spy.read.clear()
    change = method.aggregate(state, trained(method))
    if getattr(method, "neighbours", None) == "all":
        assert sorted(spy.read) == sorted(NEIGHBOURS)
    elif name in ("mr-mtl", "scaffold"):
        assert sorted(spy.read) == [0, 1, 4, 5]  # the row of all, and what the cohort's rows were
    elif name in ("mira-learned", "mira-similarity"):
        assert sorted(spy.read) == sorted(COHORT)  # what they were, for displacements
    else:
        assert set(spy.read) <= (set() if name in ROW_OF_EACH + COHORT_MIXED + TWO_OF_EACH else {0})
    own = COHORT if name in ROW_OF_EACH + COHORT_MIXED + TWO_OF_EACH else [5, 1, 4] if name in BESIDE_ONE else []
    own = [] if name == "mira-common" else own  # the first round is a common one
    together = [] if name in ROW_OF_EACH + COHORT_MIXED + TWO_OF_EACH + ["fedavg-ft"] else [0]
    together = [0, 1, 2] if name == "ifca" else together  # the clusters that begin
    assert change.index.tolist() == together + own + ([11, 7, 10] if name in TWO_OF_EACH else [])
    assert change.value.shape == (len(change.index), LAYOUT.size)
    assert change.value.dtype == torch.float32


# Order, loss and failure.


@pytest.mark.parametrize("name", [name for name in ROW_OF_EACH if name != "mira-learned"])  # on the graph above
def test_a_lost_client_keeps_its_row_and_is_not_missed_by_strangers(name: str) -> None:
    """The round is as if the lost client 3 had never been in the cohort; client 4, unrelated to it, cannot tell."""
    method, done = VARIANTS[name], trained(VARIANTS[name])
    # One local step each, so that the mean number of steps, and with it the paper's c, does not tell either.
    done = replace(done, steps=torch.ones_like(done.steps))
    state = state_of(method)
    left = done.select(torch.tensor([0, 1]), [])
    whole, without = (after(state, method.aggregate(state, each)) for each in (done, left))
    assert torch.equal(without[3], torch.full((5,), 3.0))
    torch.testing.assert_close(without[4], whole[4], rtol=0, atol=1e-6)
    related = not torch.allclose(without[0], whole[0])
    assert related is (name not in ("local", "mira-personal"))  # personal: until the client has chosen
    pool = {"mira-all": [1, 3], "mira-paper-all": [1, 3]}.get(name, [])  # the lost one counts with its last known row
    strength = 0.4 if not name.startswith("mira-paper") else 0.01 * 1 * 2.0
    weight = {1: 0.5, 3: 1.0}
    expected = done.rows[1].clone()
    total = sum(weight[k] for k in pool)
    scale = strength / (total or 1.0) if not name.startswith("mira-paper") else strength
    for k in pool:
        expected -= scale * weight[k] * (done.rows[1] - float(k))
    torch.testing.assert_close(without[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BESIDE_ONE)
def test_a_lost_client_keeps_its_own_row_beside_that_of_all(name: str) -> None:
    """Client 3 is lost, with all its jobs; the row of all is made of the others."""
    method = VARIANTS[name]
    state, done = state_of(method), trained(method)
    left = done.select(done.client != 3, [])
    rows = after(state, method.aggregate(state, left))
    assert torch.equal(rows[4], torch.full((5,), 4.0))
    assert not torch.equal(rows[5], torch.full((5,), 5.0))


@pytest.mark.parametrize("name", ["fedit", "fedprox"])
def test_fedavg_averages_those_who_came_back_by_their_examples(name: str) -> None:
    done = trained(VARIANTS[name]).select(torch.tensor([0, 2]), [])
    change = VARIANTS[name].aggregate(state_of(VARIANTS[name]), done)
    torch.testing.assert_close(change.value[0], (38 * done.rows[0] + 31 * done.rows[1]) / 69)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_never_reaches_a_method(method: Method, poison: float) -> None:
    bad = trained(method)
    bad.rows[-1, 1] = poison
    kept = screen(bad)
    assert sorted(set(kept.client.tolist())) == [0, 4]
    assert [f.client for f in kept.failed] == [3]
    assert kept.failed[0].reason.startswith("adapter is not finite; lower training.lr")
    state = state_of(method)
    clean = method.aggregate(state, trained(method).select(bad.client != 3, []))
    change = method.aggregate(state, kept)
    assert torch.equal(change.value, clean.value)
    assert bool(torch.isfinite(change.value).all())


def test_a_client_without_a_loss_is_named_with_what_to_do() -> None:
    bad = trained(VARIANTS["local"])
    bad.loss[0] = float("nan")
    kept = screen(bad)
    assert kept.client.tolist() == [0, 3]
    assert kept.failed[0].client == 4
    assert "lower training.lr" in kept.failed[0].reason


@pytest.mark.parametrize("name", [*ROW_OF_EACH, *COHORT_MIXED, "fedit", "fedprox", "ditto"])
def test_one_client_alone_keeps_what_it_learned(name: str) -> None:
    """Where nobody related is at hand a round is local training, bit for bit."""
    method = VARIANTS[name]
    state, done = state_of(method, Groups(torch.arange(7))), trained(method, [4])
    assert torch.equal(method.aggregate(state, done).value, done.rows)


def test_no_strength_is_local(method: Any) -> None:
    if method.name != "mira":
        return
    off = replace(method, **{"regularisation" if method.form == "paper" else "strength": 0.0})
    state, done = state_of(off), trained(off)
    assert torch.equal(off.aggregate(state, done).value, VARIANTS["local"].aggregate(state, done).value)


def test_the_papers_form_takes_the_former_default_of_strength() -> None:
    """It stands in run folders and files of before, and has no effect."""
    paper, old = METHODS["mira"](form="paper"), METHODS["mira"](form="paper", strength=0.5)
    state, done = state_of(paper), trained(paper)
    assert torch.equal(old.aggregate(state, done).value, paper.aggregate(state, done).value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "paper", "strength": 0.3}, "method.strength=0.3: belongs to form 'normalised'"),
        ({"regularisation": 2.0}, "method.regularisation=2: belongs to form 'paper'"),
    ],
)
def test_mira_ignores_no_strength_in_silence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS["mira"](**settings)
