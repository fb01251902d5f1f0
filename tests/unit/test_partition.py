"""A pool of examples cut among clients: by column, by chance, unevenly."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import Any

import pytest
from pydantic import TypeAdapter

from mira.core.errors import UserError
from mira.data.partition import ByChance, ByColumn, ByDirichlet, Partition, split_pool
from mira.data.sources.dolly import Dolly
from mira.data.sources.hub import HubDataset

SAY = {"instruction": "Say it.", "input": "7", "output": "seven"}


def pool(count: int = 60) -> list[tuple[str, dict[str, Any]]]:
    return [(f"f:{n}", {**SAY, "input": str(n), "kind": "abc"[n % 3]}) for n in range(count)]


def test_a_pool_is_cut_by_column() -> None:
    clients = split_pool(pool(), {}, ByColumn("kind"), 0)
    assert [(c.name, c.group, len(c.examples)) for c in clients] == [("a", "a", 20), ("b", "b", 20), ("c", "c", 20)]


def test_a_value_is_dealt_among_several_clients() -> None:
    clients = split_pool(pool(), {}, ByColumn("kind", clients_per_value=3), 0)
    assert [(c.name, c.group) for c in clients[:4]] == [("a-0", "a"), ("a-1", "a"), ("a-2", "a"), ("b-0", "b")]
    assert sorted(len(c.examples) for c in clients) == [6] * 3 + [7] * 6
    assert sorted(int(e.input) for c in clients for e in c.examples) == list(range(60))
    assert all("abc"[int(e.input) % 3] == c.group for c in clients for e in c.examples)
    assert clients == split_pool(pool(), {}, ByColumn("kind", clients_per_value=3), 0)
    assert clients != split_pool(pool(), {}, ByColumn("kind", clients_per_value=3), 1)


@pytest.mark.parametrize("partition", [ByDirichlet("kind", clients=4, min_examples=5), ByChance(4)])
def test_random_cuts_lose_nothing_and_follow_the_seed(partition: ByDirichlet | ByChance) -> None:
    pytest.importorskip("flwr_datasets", reason="the extra 'datasets' is not installed")
    clients = split_pool(pool(), {}, partition, 0)
    assert [c.name for c in clients] == ["client-0", "client-1", "client-2", "client-3"]
    assert sorted(int(e.input) for c in clients for e in c.examples) == list(range(60))
    assert clients == split_pool(pool(), {}, partition, 0)
    assert clients != split_pool(pool(), {}, partition, 1)


def test_small_alpha_makes_clients_unlike() -> None:
    pytest.importorskip("flwr_datasets", reason="the extra 'datasets' is not installed")

    def spread(alpha: float) -> float:
        clients = split_pool(pool(600), {}, ByDirichlet("kind", 4, alpha, min_examples=1), 0)
        share = [sum(int(e.input) % 3 == 0 for e in c.examples) / len(c.examples) for c in clients]
        return max(share) - min(share)

    assert spread(1000.0) < 0.2 < 0.5 < spread(0.1)


def test_a_cut_that_cannot_be_made_is_told() -> None:
    pytest.importorskip("flwr_datasets", reason="the extra 'datasets' is not installed")
    with pytest.raises(UserError, match=r"data\.partition: 60 examples cannot be divided among 10 clients"):
        split_pool(pool(), {}, ByDirichlet("kind", clients=10, min_examples=20), 0)


def test_a_question_under_two_values_belongs_to_both(caplog: pytest.LogCaptureFixture) -> None:
    again = [("g:0", {**pool()[0][1], "kind": "b", "output": "another"})]
    with caplog.at_level(logging.WARNING):
        clients = split_pool(pool() + again, {}, ByColumn("kind"), 0)
    assert [len(c.examples) for c in clients] == [20, 21, 20]
    assert caplog.messages == ["1 questions are under several values of 'kind': the clients of each have them"]


@pytest.mark.parametrize(
    "partition", [ByColumn("kind", clients_per_value=4), ByDirichlet("kind", 4, min_examples=5), ByChance(4)]
)
def test_all_answers_to_a_question_are_dealt_to_one_client(partition: Partition) -> None:
    pytest.importorskip("flwr_datasets", reason="the extra 'datasets' is not installed")
    others = [(f"g:{n}", {**record, "output": "another"}) for n, (_, record) in enumerate(pool())]
    clients = split_pool(pool() + others, {}, partition, 0)
    assert sum(len(c.examples) for c in clients) == 120
    for client in clients:
        answers = Counter(example.input for example in client.examples)
        assert set(answers.values()) == {2}
    alone = split_pool(pool(), {}, partition, 0)  # and without them nothing is dealt otherwise
    assert [[e.input for e in c.examples] for c in alone] == [[e.input for e in c.examples[::2]] for c in clients]


def test_fields_of_a_pool_that_nothing_reads_are_named(caplog: pytest.LogCaptureFixture) -> None:
    records = [(place, {**record, "id": place}) for place, record in pool()]
    with caplog.at_level(logging.WARNING):
        split_pool(records, {}, ByColumn("kind"), 0)
    assert caplog.messages == ["unused fields: 'id' (in 60 of 60 examples)"]


def test_a_pool_without_the_label_is_refused() -> None:
    with pytest.raises(UserError, match=r"f:0: no field 'colour' \(found: input, instruction, kind, output\)"):
        split_pool(pool(), {}, ByColumn("colour"), 0)


def test_a_random_cut_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mira-fl\[datasets\]'"):
        split_pool(pool(), {}, ByChance(3), 0)
    with pytest.raises(UserError, match=r"pip install 'mira-fl\[datasets\]'"):
        HubDataset("some/data", ByChance(3)).load(0)


def test_a_partition_is_chosen_by_its_word() -> None:
    adapter = TypeAdapter(Dolly)
    assert adapter.validate_python({}).partition == ByColumn("category")
    chosen = adapter.validate_python({"partition": {"by": "dirichlet", "column": "category", "clients": 3}}).partition
    assert chosen == ByDirichlet("category", 3)
