"""Each check of ``mira.testing`` sees what it is for: something that breaks one law fails that check."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mira.adapters.lora import Lora
from mira.core.errors import UserError
from mira.core.graph import Edges, Graph, Groups
from mira.core.types import Change, MemoryRows, ServerState, Setting, Trained, Work
from mira.data.sources.builtin import Builtin
from mira.data.types import Client, Example
from mira.graphs.known import Complete
from mira.methods.local import Local
from mira.testing import Check, adapter_checks, graph_checks, method_checks, source_checks


def fails(law: str, checks: list[Check]) -> bool:
    """Whether the check called ``law`` raises AssertionError."""
    try:
        next(check for check in checks if check.__name__ == law)()
    except AssertionError:
        return True
    return False


def all_pass(checks: list[Check]) -> bool:
    return not any(fails(check.__name__, checks) for check in checks)


@dataclass(frozen=True)
class Faulty:
    """Local training with one function replaced."""

    init: Callable[[Setting], ServerState] = Local().init
    broadcast: Callable[[ServerState, Tensor], Work] = Local().broadcast
    aggregate: Callable[[ServerState, Trained], Change] = Local().aggregate
    deployed: Callable[[ServerState, Tensor], Tensor] = Local().deployed
    name: str = "faulty"


def change(value: Tensor, index: Tensor, **extra: Tensor) -> Change:
    return Change(index, value, extra, {})


def spoil(state: ServerState, trained: Trained) -> Change:
    trained.rows.mul_(2)
    return change(trained.rows, trained.client)


def at_random(state: ServerState, trained: Trained) -> Change:
    return change(trained.rows + torch.rand(()), trained.client)


def first_counts(state: ServerState, trained: Trained) -> Change:
    return change(trained.rows[:1].expand_as(trained.rows).clone(), trained.client)


def by_count(state: ServerState, trained: Trained) -> Change:
    return change(trained.rows / 3 * len(trained.job) / int(trained.job.max() + 1), trained.client)


def leaking(state: ServerState, trained: Trained) -> Change:
    everyone = torch.arange(len(state.rows))[:7]
    return change(trained.rows.mean(0).expand(len(everyone), -1).clone(), everyone)


def along_the_graph(state: ServerState, trained: Trained) -> Change:
    return change(trained.rows * state.graph.degree_max(), trained.client)


def reads_all(state: ServerState, cohort: Tensor) -> Work:
    state.rows[torch.arange(len(state.rows))[:1000]]
    return Local().broadcast(state, cohort)


@dataclass(frozen=True)
class Forgetful:
    """Computes otherwise on rows that come from a run folder."""

    name: str = "forgetful"

    init, broadcast, deployed = Local.init, Local.broadcast, Local.deployed

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        return change(trained.rows * (2 if isinstance(state.rows, MemoryRows) else 1), trained.client)


METHODS: list[tuple[str, Any]] = [
    ("starts_every_client_from_the_common_row", Faulty(deployed=lambda state, client: state.rows[client] + 1)),
    ("gives_work_that_engines_can_do", Faulty(broadcast=lambda s, c: replace(Local().broadcast(s, c), slot=c * 0))),
    ("gives_work_that_engines_can_do", Faulty(broadcast=lambda s, c: replace(Local().broadcast(s, c), anchor=s.rows[c]))),
    ("gives_changes_that_can_be_committed", Faulty(aggregate=lambda s, t: change(t.rows / 0, t.client))),
    ("gives_changes_that_can_be_committed", Faulty(aggregate=lambda s, t: change(t.rows, t.client * 0))),
    ("gives_changes_that_can_be_committed", Faulty(aggregate=lambda s, t: change(t.rows.double(), t.client))),
    ("changes_no_input", Faulty(aggregate=spoil)),
    ("gives_the_same_twice", Faulty(aggregate=at_random)),
    ("ignores_the_order_of_jobs", Faulty(aggregate=first_counts)),
    ("does_not_miss_a_lost_client", Faulty(aggregate=by_count)),
    ("works_for_one_client", Faulty(aggregate=lambda s, t: change(t.rows / t.rows.std(0, keepdim=True), t.client))),
    ("keeps_private_numbers_with_their_client", Faulty(aggregate=leaking)),
    ("says_whether_it_uses_the_graph", Faulty(aggregate=along_the_graph)),
    ("costs_what_the_cohort_costs", Faulty(broadcast=reads_all)),
    ("costs_what_the_cohort_costs", Faulty(aggregate=lambda s, t: change(t.rows, t.client, x=torch.zeros(len(s.rows))))),
    ("resumes_from_a_run_folder", Forgetful()),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(("law", "method"), METHODS)
def test_a_faulty_method_is_found(law: str, method: Any) -> None:
    assert fails(law, method_checks(method))


@dataclass(frozen=True)
class Wrong:
    """A graph with one function replaced."""

    inner: Graph
    changed: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.changed[name] if name in self.changed else getattr(self.inner, name)


@dataclass(frozen=True)
class Section:
    make: Callable[[int, int], Any]
    name: str = "wrong"

    def build(self, names: Any, groups: Any, seed: int, embed: Any) -> Any:
        return self.make(len(names), seed)


def ring(count: int, **changed: Any) -> Wrong:
    """Each client with the next, static but for what is ``changed``."""
    k = torch.arange(count)
    found = Wrong(Edges.of(k, (k + 1) % count, torch.ones(count), count), changed)
    changed.setdefault("updated", lambda round, client, rows: found)
    return found


GRAPHS: list[tuple[str, Any]] = [
    (
        "has_symmetric_weights_of_no_self",
        lambda n, s: ring(n, weights=lambda r, c: torch.ones(len(r), len(c)).double()),
    ),
    (
        "gives_any_block_of_its_weights",
        lambda n, s: ring(n, weights=lambda r, c: Groups(torch.zeros(n).long()).weights(r, r)),
    ),
    ("names_its_neighbours", lambda n, s: ring(n, neighbours=lambda client: client)),
    ("names_its_neighbours", lambda n, s: ring(n, isolated=lambda: torch.arange(n))),
    ("bounds_its_laplacian", lambda n, s: ring(n, laplacian_max=lambda: 1.0)),
    ("is_built_from_the_seed_alone", lambda n, s: Groups(torch.randint(2, (n,)))),
]


@pytest.mark.parametrize(("law", "make"), GRAPHS)
def test_a_faulty_graph_is_found(law: str, make: Any) -> None:
    assert fails(law, graph_checks(Section(make)))
    assert all_pass(graph_checks(Complete()))


def test_a_graph_that_cannot_be_restored_is_found() -> None:
    checks = graph_checks(Section(lambda n, seed: ring(n)))  # a class of its own, and a section without restore
    with pytest.raises(UserError, match="no restore"):
        fails("comes_back_from_its_tensors", checks)


@dataclass(frozen=True)
class Loading:
    load: Callable[[int], list[Client]]


def client(name: str = "a", output: str = "x") -> Client:
    return Client(name, (Example("Say it.", "", output),))


SOURCES: list[tuple[str, Callable[[int], list[Client]]]] = [
    ("gives_clients_with_names_of_their_own", lambda seed: []),
    ("gives_clients_with_names_of_their_own", lambda seed: [client(), client()]),
    ("gives_examples_to_every_client", lambda seed: [Client("a")]),
    ("gives_examples_to_every_client", lambda seed: [client(output=" ")]),
    ("gives_the_same_for_a_seed", lambda seed: [client(output=str(random.random()))]),
    ("uses_no_shared_generator", lambda seed: [client(output=str(float(torch.rand(()))))]),
]


@pytest.mark.parametrize(("law", "load"), SOURCES)
def test_a_faulty_source_is_found(law: str, load: Any) -> None:
    assert fails(law, source_checks(Loading(load)))
    assert all_pass(source_checks(Builtin(examples=3)))


@dataclass(frozen=True)
class Odd:
    """LoRA with one function of its adapter replaced."""

    changed: Callable[[Any], dict[str, Any]]

    def on(self, base: Any, seed: int) -> Any:
        adapter = Lora(rank=2, targets=("q_proj",)).on(base, seed)
        return Wrong(adapter, self.changed(adapter))  # type: ignore[arg-type]


def pickled(folder: Path, row: Tensor, base_name: str) -> None:
    folder.mkdir()
    torch.save(row, folder / "row.bin")


ADAPTERS: list[tuple[str, Callable[[Any], dict[str, Any]]]] = [
    ("starts_from_the_seed_alone", lambda adapter: {"start": lambda seed: torch.randn(adapter.layout.size)}),
    ("starts_from_the_seed_alone", lambda adapter: {"start": lambda seed: adapter.start(seed)[1:]}),
    ("writes_a_folder_that_peft_reads", lambda adapter: {"save": pickled}),
    ("writes_a_folder_that_peft_reads", lambda adapter: {"save": lambda f, row, base: adapter.save(f, row * 2, base)}),
    ("merges_to_the_same_model", lambda adapter: {"merged": lambda row: adapter.merged(row * 2)}),
    ("leaves_the_base_as_it_was", lambda adapter: {
        "save": lambda f, row, base: adapter.model.get_input_embeddings().weight.data.add_(1)
    }),
]  # fmt: skip


@pytest.mark.parametrize(("law", "changed"), ADAPTERS)
def test_a_faulty_adapter_is_found(law: str, changed: Any) -> None:
    assert fails(law, adapter_checks(Odd(changed)))
