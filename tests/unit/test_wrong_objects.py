"""Wrong objects at the doors of the library: each is refused in one line that names the fix."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import mira
from helpers import memory_experiment
from helpers.memory_experiment import DATA
from helpers.tiny_models import make_tiny, make_tokenizer
from mira.core.graph import Edges
from mira.core.types import MemoryRows
from mira.store import Store

SHORT = {
    "training": {"lr": 0.02, "local_steps": 1, "batch_size": 2},
    "evaluation": {"max_new_tokens": 1, "transfer_clients": 0},
}
PLAN: dict[str, Any] = memory_experiment.PLAN | SHORT | {"rounds": 2}


def run(folder: Path, **given: Any) -> mira.Run:
    whole = {"model": (make_tiny(), make_tokenizer()), "data": DATA} | given
    return mira.run(PLAN, folder / "run", **whole)


def refused(folder: Path, text: str, **given: Any) -> None:
    """Assert that a run on ``given`` objects raises UserError of one line that holds ``text``."""
    with pytest.raises(mira.UserError) as caught:
        run(folder, **given)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Own:
    """Every client keeps its own adapter."""

    name: str = "own"

    def init(self, setting: mira.Setting) -> mira.ServerState:
        return mira.ServerState(MemoryRows(setting.start, setting.num_clients, {}), setting.graph, {})

    def broadcast(self, state: mira.ServerState, cohort: Tensor) -> mira.Work:
        return mira.Work(cohort, start=state.rows[cohort])

    def aggregate(self, state: mira.ServerState, trained: mira.Trained) -> mira.Change:
        return mira.Change(trained.client, trained.rows, {}, notes={})

    def deployed(self, state: mira.ServerState, client: Tensor) -> Tensor:
        return state.rows[client]


def spoilt(function: str, spoil: Callable[[Any], Any]) -> Any:
    """An instance of a method like ``Own`` with a ``function`` whose result is spoilt."""

    def wrong(self: Any, *args: Any) -> Any:
        return spoil(getattr(Own, function)(self, *args))

    @dataclass(frozen=True)
    class Spoilt:
        name: str = "spoilt"
        init, broadcast, aggregate, deployed = Own.init, Own.broadcast, Own.aggregate, Own.deployed

    setattr(Spoilt, function, wrong)
    return Spoilt()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda c: replace(c, value=c.value * float("nan")), "row 0 is not finite"),
        (lambda c: replace(c, value=c.value[:, :3]), "value must be float32 [3, "),
        (lambda c: replace(c, value=c.value[:2]), "value must be float32 [3, "),
        (lambda c: replace(c, value=c.value.double()), "it is float64 [3, "),
        (lambda c: replace(c, value=None), "it is NoneType"),
        (lambda c: replace(c, index=c.index + 1), "index must hold numbers from 0 to 2; it holds 3"),
        (lambda c: replace(c, index=c.index * 0), "index must name each row once"),
        (lambda c: replace(c, index=[0, 1, 2]), "index must be a tensor of int64 numbers"),
        (lambda c: replace(c, extra={"m": 1.0}), "extra['m'] is float"),
        (lambda c: replace(c, notes={"round": 7}), "notes['round'] is a field of the record itself"),
        (lambda c: replace(c, notes={"stopped": 1}), "notes['stopped'] is a field of the record itself"),
        (lambda c: replace(c, notes={"step": torch.ones(1)}), "notes['step'] is Tensor"),
        (lambda c: replace(c, notes={"step": float("nan")}), "notes['step'] is nan"),
        (lambda c: replace(c, graph=Edges.dense(torch.zeros(2, 2))), "a graph of all 3 clients; it returned one of 2"),
        (lambda c: None, "must return a mira.Change; it returned NoneType"),
    ],
)
def test_a_wrong_change_is_refused_before_it_is_committed(spoil: Any, text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, method=spoilt("aggregate", spoil))
    refused_again = mira.open_run(tmp_path / "run").records
    assert [record["round"] for record in refused_again] == [0]


def test_the_method_function_and_round_are_named(tmp_path: Path) -> None:
    refused(
        tmp_path, "method.name=spoilt: aggregate in round 1: must return", method=spoilt("aggregate", lambda c: None)
    )


@pytest.mark.parametrize(
    ("function", "spoil", "text"),
    [
        ("init", lambda state: None, "init: must return a mira.ServerState; it returned NoneType"),
        ("init", lambda state: replace(state, rows=None), "init: rows must be rows"),
        ("init", lambda state: replace(state, graph=None), "init: must return a graph"),
        ("init", lambda state: replace(state, extra={"m": 1}), "init: extra must be a dict of names to tensors"),
        ("broadcast", lambda work: None, "broadcast: must return a mira.Work; it returned NoneType"),
        ("broadcast", lambda work: replace(work, start=work.start[:, :3]), "broadcast: start must be float32 [1, "),
        ("broadcast", lambda work: replace(work, client=work.client + 3), "client must hold numbers from 0 to 2"),
        ("broadcast", lambda work: replace(work, anchor=work.start), "anchor and prox must be given together"),
        ("deployed", lambda rows: rows[:0], "deployed: rows for 1 client must be float32 [1, "),
        ("deployed", lambda rows: None, "deployed: rows for 1 client must be a tensor"),
    ],
)
def test_a_wrong_state_or_work_is_refused_before_the_run(function: str, spoil: Any, text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, method=spoilt(function, spoil))
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Drawn:
    """A graph of a given kind."""

    name: str = "drawn"
    kind: str = "none"

    def build(self, names: Any, groups: Any, seed: int, embed: Any) -> Any:
        matrix = torch.ones(3, 3) - torch.eye(3)
        return {
            "none": lambda: None,
            "tensor": lambda: matrix,
            "class": lambda: Edges,
            "small": lambda: Edges.dense(matrix[:2, :2]),
            "large": lambda: Edges.dense(torch.zeros(5, 5)),
            "negative": lambda: Edges.dense(-matrix),
            "nan": lambda: Edges.dense(matrix * float("nan")),
            "skew": lambda: Edges.dense(matrix.triu()),
        }[self.kind]()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("none", "graph.name=drawn: build: must return a graph, as mira.core.graph.Edges.dense(matrix)"),
        ("tensor", "it returned Tensor"),
        ("class", "it returned the class Edges"),
        ("small", "must return a graph of all 3 clients; it returned one of 2"),
        ("large", "must return a graph of all 3 clients; it returned one of 5"),
        ("negative", "graph.name=drawn: build: graph: edge weights must be finite and not negative"),
        ("nan", "edge weights must be finite and not negative"),
        ("skew", "the matrix is not symmetric"),
    ],
)
def test_a_wrong_graph_is_refused_before_the_run(kind: str, text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, graph=Drawn(kind=kind))
    assert not (tmp_path / "run").exists()


def test_a_copy_without_empty_folders_opens_and_goes_on(tmp_path: Path) -> None:
    class Cut(mira.Callback):
        def round(self, record: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[Cut()], method=Own())
    folder = tmp_path / "run"
    for kind in ("optim", "extra"):
        (folder / kind).rmdir()
    assert len(mira.open_run(folder).records) == 2
    assert mira.resume(folder, model=(make_tiny(), make_tokenizer()), data=DATA)["rounds"] == 2
    assert (folder / "optim").is_dir()


def test_a_copy_without_the_rows_that_its_rounds_name_is_refused(tmp_path: Path) -> None:
    run(tmp_path, method=Own())
    shutil.rmtree(tmp_path / "run" / "rows")
    with pytest.raises(mira.UserError, match=r"rows/.*safetensors: corrupt checkpoint \(missing\)"):
        Store.open(tmp_path / "run")


class Partial:
    """A callback that lacks functions."""

    def round(self, record: dict[str, Any]) -> None:
        return None


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        (mira.EarlyStopping(), "callbacks: must be a list of callbacks, as in callbacks=[...]; is EarlyStopping"),
        (mira.EarlyStopping, "is the class EarlyStopping"),
        (print, "must be a list of callbacks"),
        (None, "is NoneType"),
        ("x", "is str"),
        ([None], "callbacks[0]: NoneType is no callback"),
        ([mira.EarlyStopping], "callbacks[0]: give an instance, EarlyStopping(), not the class"),
        ([Partial()], "Partial is no callback, as it lacks the function start; derive its class from mira.Callback"),
    ],
)
def test_wrong_callbacks_are_refused_at_once(callbacks: Any, text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, callbacks=callbacks)
    with pytest.raises(mira.UserError):
        mira.open_run(tmp_path, callbacks)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"method": Own()}, "mira.register(method=...): takes a class"),
        ({"source": "x"}, "mira.register(source=...): takes a class"),
        ({}, "mira.register: nothing is given"),
    ],
)
def test_register_takes_classes(given: dict[str, Any], text: str) -> None:
    with pytest.raises(mira.UserError) as caught:
        mira.register(**given)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("section", "given", "text"),
    [
        ("method", "fedit", "put a name or a section into the configuration, as method.name"),
        ("method", {"name": "fedit"}, "takes an instance of a class, not dict"),
        ("graph", torch.ones(3, 3), "not torch's Tensor"),
        ("adapter", "folder", "as adapter.kind"),
        ("adapter", LoraConfig(r=4), "not peft's LoraConfig"),
    ],
)
def test_names_and_strangers_in_the_place_of_instances(section: str, given: Any, text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, **{section: given})


def on_meta() -> Any:
    with torch.device("meta"):
        return type(make_tiny())(make_tiny().config)


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (lambda: make_tiny(), "model: must be a pair (model, tokenizer), is Llama"),
        (lambda: (make_tokenizer(), make_tiny()), "the pair is in the wrong order; give (model, tokenizer)"),
        (lambda: (make_tiny(), None), "must be the model's tokenizer; it is NoneType"),
        (lambda: (type(make_tiny()), make_tokenizer()), "it is the class Llama"),
        (lambda: ("name", make_tokenizer()), "must be a transformers model, loaded; it is str"),
        (
            lambda: (make_tiny().model, make_tokenizer()),
            "has no language-model head; load it with AutoModelForCausalLM",
        ),
        (lambda: (on_meta(), make_tokenizer()), "has no weights (device meta)"),
    ],
)
def test_a_wrong_pair_of_model_and_tokenizer(pair: Any, text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, model=pair())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (Path("data.jsonl"), "is a path; put it into the configuration, as data.path"),
        ({"a": None}, "data['a']: must be a list of examples, is NoneType"),
        ({"a": mira.Client("a", ())}, "data['a']: must be the examples of the client, is a mira.Client"),
        ({}, "data: holds no client; give one at least"),
        ([], "data: holds no client; give one at least"),
        (3, "must be a list of mira.Client or a dict of name: examples, is int"),
    ],
)
def test_wrong_data(data: Any, text: str, tmp_path: Path) -> None:
    refused(tmp_path, text, data=data)


def test_a_wrong_order_to_a_finished_run(tmp_path: Path) -> None:
    done = run(tmp_path)
    for call, text in (
        (lambda: done.export(format="pefd"), "format='pefd': unknown; did you mean 'peft'"),  # type: ignore[arg-type]
        (lambda: done.export(hub="me/x"), "hub='me/x': must be a mira.serving.push.Hub, as Hub('owner/name-{client}')"),  # type: ignore[arg-type]
        (lambda: done.answers("ann", 0), "count=0: must be at least 1"),
        (lambda: done.answers("ann", -1), "count=-1: must be at least 1"),
    ):
        with pytest.raises(mira.UserError) as caught:
            call()
        assert text in str(caught.value)
