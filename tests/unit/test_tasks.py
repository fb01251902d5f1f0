"""Clients made from tasks: several for each task, and mixtures; the generated suites and the shipped federations."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mira import config
from mira.adapters.lora_peft import start_row
from mira.core.errors import UserError
from mira.core.layout import Entry, Layout
from mira.core.loop import sample_cohort
from mira.data.federation import SPLITS, Federation, SplitSizes, batches, make_federation
from mira.data.partition import ByColumn, ByMixture, split_pool
from mira.data.sources.builtin import SUITES, Builtin
from mira.data.sources.memory import Given
from mira.data.sources.natural_instructions import NaturalInstructions
from mira.data.tasks import Mixture, mixed, questions_of, shared
from mira.data.types import Client, Example
from mira.setup.environment import _fingerprint as fingerprint

ROOT = Path(__file__).parents[2]
FEDERATIONS = sorted((ROOT / "configs" / "federations").glob("*.yaml"))


def task(name: str, questions: int, answers: int = 1) -> Client:
    examples = [Example(name, f"{n}", f"{n} {a}") for n in range(questions) for a in range(answers)]
    return Client(name, tuple(examples), group="family", description=name)


def keys(client: Client) -> set[tuple[str, ...]]:
    return {example.key for example in client.examples}


def all_different(clients: list[Client]) -> bool:
    return len(set().union(*map(keys, clients))) == sum(len(keys(client)) for client in clients)


# The laws of both partitions


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(2, 6), st.integers(1, 3), st.integers(0, 9))
def test_clients_of_a_task_have_all_its_examples_between_them(
    sizes: list[int], among: int, answers: int, seed: int
) -> None:
    tasks = [task(f"t{n}", size, answers) for n, size in enumerate(sizes)]
    clients = shared(tasks, among, seed, "")
    assert len({client.name for client in clients}) == len(clients) == among * len(tasks)
    for each in tasks:
        own = [client for client in clients if client.task == each.name]
        assert {(client.group, client.description) for client in own if client.examples} == {(each.name, each.name)}
        assert Counter(e for client in own for e in client.examples) == Counter(each.examples)
        assert all_different(own)
        assert max(len(keys(client)) for client in own) - min(len(keys(client)) for client in own) <= 1
    assert shared(tasks, among, seed, "") == clients
    assert shared(tasks, 1, seed, "") == tasks


@settings(max_examples=60)
@given(
    st.lists(st.integers(12, 60), min_size=1, max_size=6), st.integers(1, 12), st.data(), st.floats(0.01, 50),
    st.integers(0, 99),
)  # fmt: skip
def test_a_mixture_deals_equal_disjoint_parts_of_a_few_tasks(
    sizes: list[int], clients: int, data: st.DataObject, alpha: float, seed: int
) -> None:
    each = data.draw(st.integers(1, len(sizes)))
    pools = {f"t{n}": questions_of(task(f"t{n}", size, 2).examples) for n, size in enumerate(sizes)}
    mixture = Mixture(clients, each, alpha)
    made = mixed(pools, mixture, None, seed, "data.mixture")
    assert made == mixed(pools, mixture, None, seed, "data.mixture")
    assert [client.name for client in made] == sorted({client.name for client in made})
    assert len(made) == clients
    size = len(keys(made[0]))
    assert {(len(keys(client)), len(client.examples)) for client in made} == {(size, 2 * size)}
    assert all_different(made)
    for client in made:
        of = Counter(example.instruction for example in client.examples)
        assert 1 <= len(of) <= each
        assert of[client.group] == max(of.values())
        assert set(client.task.split(" + ")) == set(of)
        assert client.description == (client.group if len(of) == 1 else "")
    with pytest.raises(UserError, match=f"have examples for {size} a client, not {size + 1}; use fewer clients"):
        mixed(pools, mixture, size + 1, seed, "data.mixture")


def test_every_task_has_equally_many_clients_of_a_mixture_and_alpha_their_proportions() -> None:
    pools = {f"t{n}": questions_of(task(f"t{n}", 999).examples) for n in range(6)}

    def most(alpha: float) -> float:
        """The mean share of the task of most examples. At α = 1 it is 3/4 for two tasks."""
        clients = mixed(pools, Mixture(90, 2, alpha), 40, 0, "data.mixture")
        return sum(max(Counter(e.instruction for e in c.examples).values()) for c in clients) / 90 / 40

    assert most(0.1) > 0.9 > most(1.0) > 0.7 > 0.55 > most(100.0)
    every = mixed(pools, Mixture(9, 2, 1000.0), 50, 0, "data.mixture")  # large α: no proportion rounds to none
    assert Counter(name for c in every for name in c.task.split(" + ")) == dict.fromkeys(pools, 3)


def test_splits_of_all_clients_are_disjoint() -> None:
    for source in (Builtin(examples=12, clients_per_task=3), Builtin(examples=12, mixture=Mixture(20))):
        federation = make_federation(source, SplitSizes(6, 2, 4), 0)
        asked = [e.key for c in federation.clients for name in ("train", "validation", "test") for e in c.split(name)]
        assert len(asked) == len(set(asked)) == 12 * len(federation.clients)


# The sources


def tasks_in(folder: Path, *names: str, instances: int = 25) -> Path:
    for name in names:
        given = [{"id": str(n), "input": f"question {n}", "output": [str(n)]} for n in range(instances)]
        task = {"Definition": ["Answer."], "Categories": ["Talk"], "Instances": given}
        (folder / f"{name}.json").write_text(json.dumps(task))
    return folder


def pool() -> list[tuple[str, dict[str, Any]]]:
    say = {"instruction": "Say it.", "output": "seven"}
    return [(f"f:{n}", {**say, "input": str(n), "kind": "abc"[n % 3]}) for n in range(60)]


def test_federations_stay_as_they_were(tmp_path: Path) -> None:
    """The digests are those of the version before clients_per_task and mixtures."""
    folder = tasks_in(tmp_path, "task1_a", "task2_b", "task3_c")
    three = split_pool(pool(), {}, ByColumn("kind", 3), 0)
    made = [
        make_federation(Builtin(), SplitSizes(24, 8, 16), 0),
        make_federation(NaturalInstructions(folder, clients=2, share=0.9), SplitSizes(8, 4, 4), 0),
        make_federation(Given(three), SplitSizes(2, 1, 1), 0),
    ]
    assert [fingerprint(federation) for federation in made] == [
        "c41bfa1e1b84c15c8c01bebb3210e3aff68e7362b199dcb29eab260e419b23bf",
        "206ca86316e772fe612e27976ac7ef8c1a934be8c96bb77201af647a061a889b",
        "0468cb7005f3f50205a199c531809ff64f2ca8524cb1460574e30247bea36e6d",
    ]


def test_natural_instructions_share_and_mix_their_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tasks_in(tmp_path, *"abcde")
    four = NaturalInstructions(folder, clients=6, clients_per_task=3).load(0)
    assert four == NaturalInstructions(folder, tasks=2, clients_per_task=3).load(0)
    assert [(c.name, c.task, c.group, len(c.examples)) for c in four][:3] == [
        ("a-0", "a", "a", 9), ("a-1", "a", "a", 8), ("a-2", "a", "a", 8)
    ]  # fmt: skip
    assert {c.task for c in four} == {"a", "c"}
    (folder / "x.json").write_text((folder / "a.json").read_text().replace("Answer.", "Other."))
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        two = NaturalInstructions(folder, tasks=("a", "x"), mixture=Mixture(3, alpha=1000.0)).load(0)
    assert [len(c.examples) for c in two] == [16, 16, 16]
    assert caplog.messages == ["data.mixture: 3 clients have 16 questions each; 2 questions are not used"]
    assert {c.task for c in two} <= {"a + x", "x + a"}


def test_a_pool_is_cut_into_mixtures_of_its_labels() -> None:
    clients = split_pool(pool(), {}, ByMixture("kind", clients=6), 0)
    assert [c.name for c in clients] == [f"client-{n}" for n in range(6)]
    assert all_different(clients)
    for client in clients:
        of = Counter("abc"[int(e.input) % 3] for e in client.examples)
        assert len(of) <= 2
        assert of[client.group] == max(of.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clients_per_task": 2, "mixture": {"clients": 3}}, "data.clients_per_task=2: a mixture has no clients of one"),
        ({"examples": 200, "clients_per_task": 4}, "data.examples=200: 200 for each of 4 .* lower examples to 125 or"),
        ({"clients_per_task": 501}, "data.clients_per_task=501: "),
        ({"mixture": {}}, "data.mixture.clients: missing"),
        ({"clients": 3}, "data.clients: unknown key"),
        ({"source": "natural-instructions", "path": ".", "clients": 3, "mixture": {"clients": 3}}, "set data.mixture.clients"),
        ({"source": "natural-instructions", "path": ".", "clients": 3, "tasks": 3}, "data.clients=3: data.tasks=3 decides it"),
        (
            {"source": "natural-instructions", "path": ".", "clients": 3, "clients_per_task": 2},
            "data.clients=3: must be a multiple of data.clients_per_task=2",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {"rounds": 1, "model": {"name": "m"}, "training": {"local_steps": 1}}
    with pytest.raises(UserError, match=message):
        config.Experiment(**whole, data={"source": "builtin", **values})


def test_too_few_tasks_or_examples_are_told_with_a_way_out(tmp_path: Path) -> None:
    folder, sizes = tasks_in(tmp_path, "a", "b"), SplitSizes(4, 2, 4)

    def federation(source: Any) -> Federation:
        return make_federation(source, sizes, 0)

    cases = [
        (Builtin(tasks=13), r"data\.tasks=13: data\.suite=easy has 12 tasks"),
        (Builtin(tasks=("unit-length",)), "data.tasks: no task 'unit-length'; did you mean 'units-length'"),
        (Builtin(examples=9), "has 9 different examples, .* or raise data.examples"),
        (Builtin(examples=9, clients_per_task=2), "'units-length-0' has 9 different.* or raise data.examples"),
        (Builtin(examples=9, mixture=Mixture(9)), "'client-0' has 9 different.* or raise data.examples"),
        (Builtin(tasks=1, mixture=Mixture(9)), r"data\.mixture\.tasks_per_client=2: there are 1 tasks"),
        (Builtin(tasks=2, examples=400, mixture=Mixture(9)), "examples for 109 a client, not 400; use fewer clients"),
        (NaturalInstructions(folder, clients_per_task=3), "'a-0' has 9 different .* or lower data.clients_per_task"),
        (NaturalInstructions(folder, mixture=Mixture(60)), "clients=60: the tasks have examples for 0 a client, not 1"),
        (NaturalInstructions(folder, mixture=Mixture(9, alpha=9.0)), "or lower data.mixture.clients"),
        (NaturalInstructions(folder, clients=6, clients_per_task=2), "clients=6: .* 2 usable tasks .* 3 are needed"),
        (NaturalInstructions(folder, tasks=3), "data.tasks=3: .* holds 2 usable tasks"),
        (Given(split_pool(pool(), {}, ByColumn("kind", 3), 0)), "or lower data.partition.clients_per_value"),
    ]  # fmt: skip
    for source, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            federation(source)
        assert "\n" not in str(caught.value)


# The hard suite


def test_the_hard_suite_has_two_tasks_in_each_of_six_families_and_new_worlds_for_each_seed() -> None:
    clients = Builtin(suite="hard", examples=500).load(0)
    assert Counter(c.group for c in clients) == dict.fromkeys(
        ("language", "desk", "stock", "weather", "directory", "letters"), 2
    )
    assert clients == Builtin(suite="hard", examples=500).load(0)
    for client, other in zip(clients, Builtin(suite="hard", examples=500).load(1), strict=True):
        answers, others = ({e.input: e.output for e in c.examples} for c in (client, other))
        assert len(answers) == 500
        same = [answers[given] == others[given] for given in answers if given in others]
        assert sum(same) <= len(same) / 3  # a held-out variant: the same questions have other answers
        assert len({e.instruction for e in client.examples}) == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_answers_of_the_hard_suite_follow_one_rule_a_task(seed: int) -> None:
    """Each word of a question decides its part of the answer alone, so that the examples of other clients help."""
    made = {c.name: c.examples for c in Builtin(suite="hard", examples=500).load(seed)}
    for name in ("language-hills", "language-coast"):
        words: dict[str, set[str]] = {}
        for example in made[name]:
            for word in set(example.input.lower().strip(".").split()) - {"the"}:
                said = set(example.output.lower().strip(".").split())
                words[word] = words.get(word, said) & said
        assert all(len(said) == 1 for said in words.values())
        assert len(set.union(*words.values())) == len(words)
    code = {e.output: e.input for e in made["stock-label"]} | {e.input: e.output for e in made["stock-code"]}
    assert all(code[e.output] == e.input for e in made["stock-label"])
    both = [e for e in made["stock-code"] if e.input in {o.output for o in made["stock-label"]}]
    assert both
    assert all({o.output: o.input for o in made["stock-label"]}[e.input] == e.output for e in both)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_can_be_chosen(suite: Any) -> None:
    whole: dict[str, Any] = {"rounds": 1, "model": {"name": "m"}, "training": {"local_steps": 1}}
    chosen: Any = config.Experiment(**whole, data={"source": "builtin", "suite": suite, "tasks": 4}).data
    assert len({client.group for client in chosen.load(0)}) == 4  # evenly spaced over the families


# The shipped federations


@pytest.mark.parametrize("file", FEDERATIONS, ids=lambda file: file.stem)
def test_a_shipped_federation(file: Path, tmp_path: Path) -> None:
    names = [f"task{n:02}" for n in range(14)]
    more = [f"data.path={tasks_in(tmp_path, *names, instances=400)}"] if file.stem.endswith("-ni") else []
    experiment = config.load(file, more)
    federation = make_federation(experiment.data, experiment.split, experiment.seed)
    kind = file.stem.removesuffix("-ni")
    assert len(federation.clients) == {"shared": 24, "mixed": 24, "apart": 12}[kind]
    groups = Counter(client.group for client in federation.clients)
    if kind == "shared":
        assert set(groups.values()) == {4}
    if kind == "mixed":
        assert all(len(client.task.split(" + ")) <= 2 for client in federation.clients)
    assert all(len(client.train) == 12 for client in federation.clients)
    assert f"mira run configs/federations/{file.name}" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FEDERATIONS, ids=lambda file: file.stem)
def test_another_seed_is_another_sample_of_everything(file: Path, tmp_path: Path) -> None:
    """Examples of each client and their order, the start and the cohorts: differences over seeds show all of the chance."""
    names = [f"task{n:02}" for n in range(14)]
    more = [f"data.path={tasks_in(tmp_path, *names, instances=400)}"] if file.stem.endswith("-ni") else []
    experiment = config.load(file, more)
    one, other = (make_federation(experiment.data, experiment.split, seed).clients for seed in (20, 21))
    for mine, theirs in zip(one, other, strict=True):
        for split in SPLITS:
            shown = [{example.key for example in client.split(split)} for client in (mine, theirs)]
            assert len(shown[0] & shown[1]) < len(shown[0]) / 2, (mine.name, split)
    orders = [[batches(seed, 1, client.name, 12, 2, steps=3) for client in one] for seed in (20, 21)]
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 2
    layout = Layout((Entry("q", "A", (2, 8), 0),), rank=2)
    assert not (start_row(layout, 20) == start_row(layout, 21)).any()
    cohorts = [[sample_cohort(seed, n, 24, 0.1).tolist() for n in range(20)] for seed in (20, 21)]
    assert sum(a == b for a, b in zip(*cohorts, strict=True)) < 5


def test_three_federations_on_two_suites() -> None:
    assert sorted(file.stem for file in FEDERATIONS) == [
        "apart",
        "apart-ni",
        "mixed",
        "mixed-ni",
        "shared",
        "shared-ni",
    ]
