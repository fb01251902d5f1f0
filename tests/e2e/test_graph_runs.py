"""Graphs that are made from the model or from the rows, in whole runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mira
from helpers.sample_config import begin, outcome, settings, write_clients
from helpers.tiny_models import make_tiny, make_tokenizer
from mira import Experiment, run
from mira.core.graph import Embed
from mira.core.graph_io import from_tensors, in_use
from mira.core.learned_graph import Learned
from mira.data.federation import make_federation
from mira.engine.embed import embed
from mira.model import Base
from mira.results.html.write import write
from mira.runner.recording import state_of
from mira.runner.run import resume
from mira.setup.build import open_session
from mira.store import Store


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_clients(tmp_path / "data.jsonl")


def test_a_run_that_learns_its_graph_resumes_with_it(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    values = settings(tiny_folder, data, graph={"name": "learned", "every": 2}, cohort=0.75, rounds=4)
    experiment = Experiment(**values)
    run(experiment, tmp_path / "whole")
    begin(experiment, tmp_path / "halves", 2)
    resume(tmp_path / "halves")
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")
    with Store.open(tmp_path / "whole", writable=False) as store:
        session = open_session(experiment, folder=store.folder)
        begun, used = from_tensors(store.graph()), state_of(session, store).graph
        kept, _ = in_use(store.graph(), store.extra())
    everyone = torch.arange(4)
    assert not begun.weights(everyone, everyone).any()
    assert isinstance(used, Learned)
    assert isinstance(kept, Learned)
    assert used.seen.tolist() == [0, 1, 2, 3]
    assert torch.equal(used.moved, kept.moved)
    assert torch.equal(used.weights(everyone, everyone), kept.weights(everyone, everyone))


@dataclass(frozen=True)
class Star:
    """The first client with all others, of a class of its own. Where ``grows``: by the share of rounds that are trained."""

    num_clients: int
    grows: bool
    weight: float

    def weights(self, rows: Tensor, columns: Tensor) -> Tensor:
        return ((rows == 0)[:, None] ^ (columns == 0)[None, :]).double() * self.weight

    def neighbours(self, client: Tensor) -> Tensor:
        return torch.arange(self.num_clients) if bool((client == 0).any()) else torch.zeros(1, dtype=torch.int64)

    def laplacian_max(self) -> float:
        return self.num_clients * self.weight

    def degree_max(self) -> float:
        return (self.num_clients - 1) * self.weight

    def isolated(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def updated(self, round: int, client: Tensor, moved: Tensor) -> Star:
        return replace(self, weight=self.weight + 0.25) if self.grows else self

    def to_tensors(self) -> dict[str, Tensor]:
        return {"star": torch.tensor([self.num_clients, self.grows, self.weight], dtype=torch.float64)}


@dataclass(frozen=True)
class StarSection:
    name: str = "star"
    grows: bool = False

    def build(self, names: Sequence[str], groups: Sequence[str], seed: int, embed: Embed) -> Star:
        return Star(len(names), self.grows, 0.5)

    def restore(self, tensors: Mapping[str, Tensor]) -> Star:
        clients, grows, weight = tensors["star"].tolist()
        return Star(int(clients), bool(grows), weight)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("grows", [False, True])
def test_a_run_resumes_with_a_graph_of_a_foreign_class(
    grows: bool, tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    mira.register(graph=StarSection)
    graph = {"name": "star", "grows": grows}
    experiment = Experiment(**settings(tiny_folder, data, graph=graph, method={"form": "paper"}, rounds=4))
    run(experiment, tmp_path / "whole")
    begin(experiment, tmp_path / "halves", 2)
    resume(tmp_path / "halves")
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")
    with Store.open(tmp_path / "whole", writable=False) as store:
        used = state_of(open_session(experiment, folder=store.folder), store).graph
    assert used == Star(4, grows, 1.5 if grows else 0.5)
    assert "Graph between clients" in write([tmp_path / "whole"], tmp_path / "page.html").read_text(encoding="utf-8")


def test_descriptions_relate_clients_of_the_same_task(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Clients say "Add." or "Take away.", by turns; the run and its resumption see the same graph."""
    experiment = Experiment(**settings(tiny_folder, data, graph={"name": "knn", "neighbours": 1}, rounds=1))
    result = run(experiment, tmp_path / "run")
    assert result["rounds"] == 1
    row = 2 * 2 * ((32 + 32) + (32 + 16))  # 2 layers, rank 2, q maps 32 to 32 and v 32 to 16
    for client in result["clients"]:
        # Down: its start and the two ends of the line that it chooses on. Up: its row and the description, 32 numbers.
        assert (client["bytes_up"], client["bytes_down"]) == (4 * row + 4 * 32, 3 * 4 * row)
    assert result["bytes_up"] == sum(client["bytes_up"] for client in result["clients"])
    with Store.open(tmp_path / "run", writable=False) as store:
        graph = from_tensors(store.graph())
    everyone = torch.arange(4)
    expected = [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    torch.testing.assert_close(graph.weights(everyone, everyone), torch.tensor(expected).double())


def test_nobody_is_described_to_a_method_without_a_graph(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("mira.setup.session.embed")
    values = settings(tiny_folder, data, graph={"name": "knn"}, method={"name": "fedit"}, rounds=1)
    result = run(Experiment(**values), tmp_path / "run")
    assert {client["bytes_up"] for client in result["clients"]} == {
        client["bytes_down"] for client in result["clients"]
    }
    with Store.open(tmp_path / "run", writable=False) as store:
        assert not from_tensors(store.graph()).weights(torch.arange(4), torch.arange(4)).any()
    assert "Graph between clients" not in write([tmp_path / "run"], tmp_path / "page.html").read_text(encoding="utf-8")


def test_without_a_description_training_prompts_speak(data: Path, tmp_path: Path, tiny_folder: Path) -> None:
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines = [line | {"instruction": f"{line['instruction']} {n}"} for n, line in enumerate(lines)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    e = Experiment(**settings(tiny_folder, data))
    client = make_federation(e.data, e.split, e.seed).clients[0]
    assert client.description == ""
    assert all(text.casefold() in client.about for example in client.train for text in example.asked)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_embedding_is_the_mean_of_the_plain_models_hidden_states(kind: str) -> None:
    base = Base.of(make_tiny(kind), make_tokenizer())  # type: ignore[arg-type]
    before = base.model.config._attn_implementation
    texts = ["Add.", "Take away, twice."]
    expected = []
    for text in texts:
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        expected.append(base.model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0))
    # sdpa against eager attention in fp32.
    torch.testing.assert_close(embed(base.model, base.tokenizer, texts), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert base.model.config._attn_implementation == before
    assert embed(base.model, base.tokenizer, [""]).isfinite().all()
