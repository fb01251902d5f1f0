"""Laws of every method: pure functions, as cheap as the cohort, blind to the order of jobs, safe with lost clients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from mira.core.graph import Graph, Groups
from mira.core.graph_io import in_use, to_tensors
from mira.core.layout import Layout
from mira.core.loop import apply
from mira.core.types import Failure, MemoryRows, Method, Rows, ServerState, Trained, Work, uses_graph
from mira.store import Store
from mira.testing.checks import Check, bound, require, require_close, require_equal, tensors
from mira.testing.method_case import CLIENTS, COHORT, LAYOUT, Case, sparse_graph
from mira.testing.quadratic import QuadraticClients
from mira.testing.recorders import FolderRecorder

MANY = 100_000


def method_checks(method: Method, layout: Layout = LAYOUT, graph: Graph | None = None) -> list[Check]:
    """The checks of ``method`` over seven clients with rows of ``layout``.

    ``graph``: the relations of seven clients, for a method that needs a special one; by default an incomplete weighted graph.
    """
    case = Case(method, layout, graph or sparse_graph())
    return bound(LAWS, case)


def starts_every_client_from_the_common_row(case: Case) -> None:
    """Before round 0 every client trains from the common row, and would deploy it."""
    start, client = torch.arange(float(case.layout.size)), torch.tensor([6, 2, 2, 0])
    state = case.method.init(case.setting(start))
    require_equal(state.round, 0, "init: the number of rounds done")
    work = case.method.broadcast(state, client)
    for name, clients, rows in (
        ("deployed", client, case.method.deployed(state, client)),
        ("broadcast", work.client, work.start),
    ):
        require_equal(rows.dtype, torch.float32, f"{name}: the type of rows")
        require_equal(rows, start.expand(len(clients), -1).contiguous(), f"{name}: rows before round 0")


def gives_work_that_engines_can_do(case: Case) -> None:
    """Work has the documented shapes, names the cohort and nobody else, and keeps optimiser states of jobs apart."""
    state = case.state()
    work = case.method.broadcast(state, torch.tensor(COHORT))
    jobs, size = len(work.client), case.layout.size
    require_equal(set(work.client.tolist()), set(COHORT), "broadcast: the clients with work")
    require_equal(tuple(work.start.shape), (jobs, size), "broadcast: the shape of start")
    require((work.anchor is None) == (work.prox is None), "broadcast: anchor and prox come together or not at all")
    if work.anchor is not None and work.prox is not None:
        require_equal(tuple(work.anchor.shape), (jobs, size), "broadcast: the shape of anchor")
        require_equal(work.prox.dtype, torch.float64, "broadcast: the type of prox")
        require((work.prox >= 0).all(), "broadcast: prox is negative")
    if work.shift is not None:
        require_equal(tuple(work.shift.shape), (jobs, size), "broadcast: the shape of shift")
    for name, mask, shapes in (
        ("trainable", work.trainable, [(size,)]),
        ("upload", work.upload, [(size,), (jobs, size)]),
        ("private", work.private, [(jobs,)]),
    ):
        if mask is not None:
            require_equal(mask.dtype, torch.bool, f"broadcast: the type of {name}")
            require(
                tuple(mask.shape) in shapes, f"broadcast: {name} has the shape {tuple(mask.shape)}, not one of {shapes}"
            )
    everyone = case.method.broadcast(state, torch.arange(CLIENTS)).kept_under
    require_equal(len(set(everyone)), len(everyone), "broadcast: jobs with an optimiser state of their own")


def gives_changes_that_can_be_committed(case: Case) -> None:
    """A change has finite float32 rows at places that the server has, each once."""
    state = case.state()
    change = case.method.aggregate(state, case.trained())
    require_equal(tuple(change.value.shape), (len(change.index), case.layout.size), "aggregate: the shape of value")
    require_equal(change.value.dtype, torch.float32, "aggregate: the type of value")
    require(change.value.isfinite().all(), "aggregate: a row is not finite")
    places = change.index.tolist()
    require_equal(len(set(places)), len(places), "aggregate: places that are written once")
    require(set(places) <= set(range(len(state.rows))), f"aggregate: writes at {places} of {len(state.rows)} rows")


def changes_no_input(case: Case) -> None:
    """State, trained rows and cohort are as they were after every call, and what comes out shares no memory with them."""
    state, done, cohort = case.state(), case.trained(), torch.tensor(COHORT)
    before = tensors(state), tensors(done), tensors(cohort)
    case.method.broadcast(state, cohort).start.add_(1)  # an engine may train in place
    case.method.aggregate(state, done)
    case.method.deployed(state, cohort).add_(1)
    for name, was, value in zip(("state", "trained", "cohort"), before, (state, done, cohort), strict=True):
        require_equal(tensors(value), was, f"the {name} was changed")


def gives_the_same_twice(case: Case) -> None:
    """Equal inputs give equal outputs, to the last bit."""
    first, again = (case.method.aggregate(case.state(), case.trained()) for _ in range(2))
    for name in ("index", "value", "extra", "notes"):
        require_equal(getattr(again, name), getattr(first, name), f"aggregate: {name} of a second call")
    for name in ("offer", "offset"):
        require_equal(
            tensors(getattr(again, name)), tensors(getattr(first, name)), f"aggregate: {name} of a second call"
        )


def ignores_the_order_of_jobs(case: Case) -> None:
    """Jobs that return in another order give the same rows and notes, up to the rounding of sums."""
    state, done = case.state(), case.trained()
    turned = done.select(torch.arange(len(done.client)).roll(1), ())
    require_close(case.rows_after(state, turned), case.rows_after(state, done), "rows, jobs in another order")
    notes = [case.method.aggregate(state, each).notes for each in (done, turned)]
    require_equal(notes[1].keys(), notes[0].keys(), "notes, jobs in another order")
    found, expected = (torch.tensor([note[key] for key in notes[0]]) for note in notes[::-1])
    require_close(found, expected, "notes, jobs in another order")


def does_not_miss_a_lost_client(case: Case) -> None:
    """A client that was asked and lost leaves the server as if it had not been asked."""
    state, done = case.state(), case.trained()
    left = done.select(done.client != COHORT[0], ())
    alone = case.trained(COHORT[1:])
    require_equal(left.client, alone.client, "broadcast: work that depends on the rest of the cohort")
    require_equal(
        case.rows_after(state, left), case.rows_after(state, replace(alone, rows=left.rows)), "rows without the lost"
    )


def works_for_one_client(case: Case) -> None:
    """A cohort of one gives finite rows."""
    require(case.rows_after(case.state(), case.trained(COHORT[:1])).isfinite().all(), "a row is not finite")


def keeps_private_numbers_with_their_client(case: Case) -> None:
    """A private job, or a number that does not travel, decides nothing of what others deploy, or start from later."""
    state, done = case.state(), case.trained()
    work = case.method.broadcast(state, torch.tensor(COHORT))
    secret = torch.zeros_like(work.start, dtype=torch.bool)
    if work.private is not None:
        secret |= work.private[:, None]
    if work.upload is not None:
        secret |= ~work.upload
    if work.trainable is not None:
        secret &= work.trainable
    everyone = torch.arange(CLIENTS)
    for job, client in enumerate(done.client.tolist()):
        if secret[job].any():
            rows = done.rows.clone()
            rows[job][secret[job]] += 100
            a, b = (
                case.seen(apply(state, case.method.aggregate(state, each)), everyone[everyone != client])
                for each in (done, replace(done, rows=rows))
            )
            require_equal(b, a, f"rows of others, once a private number of client {client} differs")


def says_whether_it_uses_the_graph(case: Case) -> None:
    """A method without ``uses_graph = True`` gives the same on any graph."""
    if not uses_graph(case.method):
        graphs = Groups(torch.zeros(CLIENTS, dtype=torch.int64)), Groups(torch.arange(CLIENTS))
        a, b = (case.method.aggregate(case.state(graph), case.trained(graph=graph)).value for graph in graphs)
        require_equal(b, a, "aggregate on another graph, though uses_graph is not True")


def costs_what_the_cohort_costs(case: Case) -> None:
    """With 100,000 clients a round reads and writes a few rows for each client of its cohort."""
    state = case.method.init(case.setting(graph=Groups(torch.arange(MANY) // 4)))
    spy = Spy(state.rows)
    state = replace(state, rows=spy)
    work = case.method.broadcast(state, torch.tensor(COHORT))
    most = 8 * len(work.client)
    require(len(spy.read) <= most, f"broadcast: reads {len(spy.read)} rows for {len(COHORT)} clients")
    spy.read.clear()
    change = case.method.aggregate(state, case.trained())
    require(len(spy.read) <= most, f"aggregate: reads {len(spy.read)} rows for {len(COHORT)} clients")
    require(len(change.index) <= most, f"aggregate: writes {len(change.index)} rows for {len(COHORT)} clients")
    kept = sum(tensor.numel() for tensor in (state.extra | change.extra).values())
    require(kept < MANY, f"keeps {kept} numbers for {MANY} clients, in extra")


@dataclass(frozen=True)
class Spy:
    """Rows that remember which of them were read."""

    beneath: Rows
    read: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.beneath)

    def __getitem__(self, index: Tensor) -> Tensor:
        self.read.extend(index.tolist())
        return self.beneath[index]


def goes_on_after_a_round_without_answers(case: Case) -> None:
    """A round from which nobody comes back changes no row, and the next one works."""
    begin = case.begin()
    recorder = case.in_memory(begin)
    silent = case.run(begin, 1, recorder, Silent(case.clients()))
    everyone = torch.arange(len(begin.rows))
    require_equal(silent.rows[everyone], begin.rows[everyone], "rows after a round without answers")
    after = case.run(silent, 2, recorder)
    require(after.rows[everyone].isfinite().all(), "a row is not finite after a round without answers")


@dataclass(frozen=True)
class Silent:
    """Clients of which none answers."""

    clients: QuadraticClients

    def train(self, work: Work, round: int, lr: float) -> Trained:
        done = self.clients.train(work, round, lr)
        return done.select(done.client < 0, [Failure(int(k), "silent") for k in work.client.unique()])


def resumes_from_a_run_folder(case: Case) -> None:
    """Two rounds, a run folder closed and opened, and two more end where four rounds end, to the last bit."""
    begin = case.begin()
    whole = case.run(begin, 4, case.in_memory(begin))
    with TemporaryDirectory(prefix="mira-testing-") as folder:
        resumed = _halved(case, begin, Path(folder) / "run")
        everyone = torch.arange(len(whole.rows))
        require_equal(resumed.rows[everyone], whole.rows[everyone], "rows of a resumed run")
        require_equal(resumed.extra, whole.extra, "extra tensors of a resumed run")


def _halved(case: Case, begin: ServerState, folder: Path) -> ServerState:
    start = begin.rows[torch.tensor([0])]
    nothing = torch.empty(0, dtype=torch.int64)
    with Store.create(folder, "", {}, start[0], len(begin.rows), to_tensors(begin.graph)) as store:
        store.commit(0, nothing, start[:0], begin.extra, {}, {"validation_loss": 1.0})
        case.run(replace(begin, rows=store.rows()), 2, FolderRecorder(store))
    with Store.open(folder) as store:
        graph, extra = in_use(store.graph(), store.extra(), lambda tensors: begin.graph)  # a foreign one is static here
        done = case.run(ServerState(store.rows(), graph, extra, 2), 4, FolderRecorder(store))
        values = done.rows[torch.arange(len(done.rows))]  # a closed folder is not read
        return replace(done, rows=MemoryRows(start[0], len(values), dict(enumerate(values))))


LAWS = (
    starts_every_client_from_the_common_row,
    gives_work_that_engines_can_do,
    gives_changes_that_can_be_committed,
    changes_no_input,
    gives_the_same_twice,
    ignores_the_order_of_jobs,
    does_not_miss_a_lost_client,
    works_for_one_client,
    keeps_private_numbers_with_their_client,
    says_whether_it_uses_the_graph,
    costs_what_the_cohort_costs,
    goes_on_after_a_round_without_answers,
    resumes_from_a_run_folder,
)
