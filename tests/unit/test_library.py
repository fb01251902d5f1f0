"""The library as a notebook uses it: objects in the place of names, callbacks, a finished run as an object."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import mira
from helpers.memory_experiment import DATA, PLAN
from helpers.sample_config import lasting, outcome
from helpers.tiny_models import make_tiny, make_tokenizer
from mira.config.sections import SECTIONS
from mira.core.graph import Edges, Graph
from mira.core.types import MemoryRows

pytestmark = pytest.mark.usefixtures("registries")


@dataclass(frozen=True)
class Pull:
    """Every client moves a part of the way to the mean of the round."""

    name: str = "pull"
    step: float = 0.5
    """The part."""

    def init(self, setting: mira.Setting) -> mira.ServerState:
        return mira.ServerState(MemoryRows(setting.start, setting.num_clients, {}), setting.graph, {})

    def broadcast(self, state: mira.ServerState, cohort: Tensor) -> mira.Work:
        return mira.Work(cohort, start=state.rows[cohort])

    def aggregate(self, state: mira.ServerState, trained: mira.Trained) -> mira.Change:
        mean = trained.rows.mean(0).expand_as(trained.rows)
        return mira.Change(trained.client, trained.rows.lerp(mean, self.step), {}, notes={})

    def deployed(self, state: mira.ServerState, client: Tensor) -> Tensor:
        return state.rows[client]


@dataclass(frozen=True)
class Pair:
    """The first two clients are neighbours."""

    name: str = "pair"

    def build(self, names: Any, groups: Any, seed: int, embed: Any) -> Graph:
        one = torch.ones(1, dtype=torch.float64)
        return Edges.of(torch.tensor([0]), torch.tensor([1]), one, len(names))


@pytest.fixture
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return make_tiny(), make_tokenizer()


@pytest.fixture
def finished(loaded: Any, tmp_path: Path) -> mira.Run:
    return mira.run(PLAN, tmp_path / "run", model=loaded, data=DATA)


class Seen(mira.Callback):
    """Keeps the numbers of the rounds that it is told of."""

    def __init__(self, end: int | None = None, interrupt: int | None = None) -> None:
        self.early: list[int] = []
        self.rounds: list[int] = []
        self.end, self.interrupted = end, interrupt

    def earlier(self, record: dict[str, Any]) -> None:
        self.early.append(record["round"])

    def stop(self, record: dict[str, Any]) -> bool:
        return record["round"] == self.end

    def round(self, record: dict[str, Any]) -> None:
        self.rounds.append(record["round"])
        if record["round"] == self.interrupted:
            raise KeyboardInterrupt


def test_all_public_names_are_there_and_told_of() -> None:
    for name in mira.__all__:
        assert getattr(mira, name) is not None
        assert name in (mira.__doc__ or "") or name == "__version__"
    assert set(mira.__all__) <= set(dir(mira))
    assert mira.__version__ == "0.1.0"


def test_objects_in_the_place_of_names(loaded: Any, tmp_path: Path) -> None:
    run = mira.run(PLAN, tmp_path / "run", model=loaded, data=DATA, method=Pull(step=0.25), graph=Pair())
    assert run["method"] == "pull"
    assert run["local_loss"] < run["local_loss_start"]
    assert run.clients == list(DATA)
    plugins = run.environment["plugins"]
    assert plugins["method"] == {"name": "pull", "place": f"{__name__}:Pull", "package": "", "version": ""}
    assert run.experiment.method.step == 0.25  # type: ignore[attr-defined]
    assert "step: 0.25" in (tmp_path / "run" / "config.yaml").read_text()
    with torch.no_grad():
        assert torch.equal(loaded[0](torch.tensor([[5, 6]])).logits, make_tiny()(torch.tensor([[5, 6]])).logits)


def test_a_list_of_clients_is_the_same_as_a_dict(loaded: Any, tmp_path: Path) -> None:
    clients = [
        mira.Client(
            name, tuple(mira.Example("Add.", each["input"], each["output"]) for each in examples), description="Add."
        )
        for name, examples in DATA.items()
    ]
    for place, data in (("dict", DATA), ("list", clients)):
        mira.run(PLAN, tmp_path / place, model=(make_tiny(), make_tokenizer()), data=data)
    assert outcome(tmp_path / "dict") == outcome(tmp_path / "list")


def test_inside_a_running_loop(loaded: Any, tmp_path: Path) -> None:
    async def notebook() -> mira.Run:
        return mira.run(PLAN | {"rounds": 1}, tmp_path / "run", model=loaded, data=DATA)

    assert asyncio.run(notebook())["rounds"] == 1


def test_an_interrupted_run_goes_on_with_the_same_objects(finished: mira.Run, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        mira.run(PLAN, tmp_path / "cut", [Seen(interrupt=2)], model=(make_tiny(), make_tokenizer()), data=DATA)
    seen = Seen()
    resumed = mira.resume(tmp_path / "cut", [seen], model=(make_tiny(), make_tokenizer()), data=DATA)
    assert (seen.early, seen.rounds) == ([0, 1, 2], [3])
    assert lasting(resumed.result) | {"run": "", "clients": []} == lasting(finished.result) | {"run": "", "clients": []}
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({}, "the run was started with a model in memory; pass it again as model="),
        ({"model": "other"}, "model was .* when the run started"),
        ({"data": "other"}, "data was .* when the run started"),
    ],
)
def test_other_objects_do_not_go_on(given: dict[str, str], fault: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        mira.run(PLAN, tmp_path / "cut", [Seen(interrupt=1)], model=(make_tiny(), make_tokenizer()), data=DATA)
    model = (make_tiny(seed=int("model" in given)), make_tokenizer())
    data = {name: examples[::-1] for name, examples in DATA.items()} if "data" in given else DATA
    with pytest.raises(mira.UserError, match=fault):
        mira.resume(tmp_path / "cut", **({"model": model, "data": data} if given else {"data": DATA}))


def test_a_callback_ends_the_run(loaded: Any, tmp_path: Path) -> None:
    run = mira.run(PLAN, tmp_path / "run", [Seen(end=2)], model=loaded, data=DATA)
    assert (run["rounds"], run["stopped"]) == (2, "Seen")
    assert run["exact_match"] is not None  # measured as after the last of all rounds
    assert (tmp_path / "run" / "adapters" / "ann" / "adapter_model.safetensors").is_file()
    assert mira.resume(tmp_path / "run").result == run.result
    assert run.report().is_file()


def test_early_stopping() -> None:
    stop = mira.EarlyStopping(patience=2, least=0.1)
    stop.start(Path(), 9, 3, 0)
    losses = [3.0, 2.5, 2.45, None, 2.44]
    said = [stop.stop({"round": n, "validation_loss": loss}) for n, loss in enumerate(losses)]
    assert said[:3] == [None, None, None]
    assert said[3] == "validation_loss has not fallen below 2.5 for 2 measurements"
    assert stop.stop({"round": 5}) is None  # not measured
    with pytest.raises(mira.UserError, match="metric=los: not a number of the record; choose one of validation_loss"):
        mira.EarlyStopping("los").stop({"validation_loss": 1.0})
    with pytest.raises(mira.UserError, match="patience=0: must be at least 1"):
        mira.EarlyStopping(patience=0)


def test_a_finished_run_as_an_object(finished: mira.Run, tmp_path: Path) -> None:
    opened = mira.open_run(tmp_path / "run", model=(make_tiny(), make_tokenizer()), data=DATA)
    assert dict(opened) == opened.result == finished.result
    assert [record["round"] for record in opened.records] == [0, 1, 2, 3]
    assert opened.evaluate()["local_loss"] == opened["local_loss"]
    assert [Path(line).name for line in opened.export(["bob"])] == ["bob"]
    assert opened.answers("cleo", 2)[0].expected in {example["output"] for example in DATA["cleo"]}
    with pytest.raises(mira.UserError, match="no client is named 'bo'; did you mean 'bob'"):
        opened.generate("bo", "1 and 2")


def test_an_adapter_as_peft_model_answers_as_the_run_does(finished: mira.Run) -> None:
    peft = finished.adapter("ann")
    text = "### Instruction:\n1 and 2"
    tokens = make_tokenizer()(text, return_tensors="pt").input_ids
    with torch.no_grad():
        adapted, base = peft(tokens).logits, make_tiny()(tokens).logits
    assert not torch.allclose(adapted, base)
    state = finished.state()
    assert len(state.rows) == 3
    assert state.round == 3


def test_metrics_as_a_table(finished: mira.Run) -> None:
    pandas = pytest.importorskip("pandas")
    table = finished.metrics()
    assert list(table.index.names) == ["round", "client"]
    assert len(table) == 4 * 3
    wide = finished.metrics("validation_loss")
    assert isinstance(wide, pandas.DataFrame)
    assert list(wide.columns) == list(DATA)
    assert wide.loc[3, "ann"] == finished.records[3]["clients"]["ann"]["validation_loss"]
    with pytest.raises(mira.UserError, match="no metric is called 'validation_los'; did you mean 'validation_loss'"):
        finished.metrics("validation_los")


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"model": "gpt2"}, r"model: must be a pair \(model, tokenizer\)"),
        ({"data": {"a": ["text"]}}, r"data\['a'\]\[0\]: must be a dict of fields or a mira.Example, is str"),
        ({"data": {"a": [{"input": "x"}]}}, r"data\['a'\]\[0\]: no field"),
        ({"data": ["a"]}, "data: must be a list of mira.Client or a dict of name: examples, has str"),
        ({"method": Pull}, "method: give an instance, Pull\\(\\), not the class"),
        ({"method": object()}, "must be a dataclass"),
    ],
)  # fmt: skip
def test_wrong_objects_are_refused_in_one_line(given: dict[str, Any], fault: str, tmp_path: Path) -> None:
    whole = {"model": (make_tiny(), make_tokenizer()), "data": DATA} | given
    with pytest.raises(mira.UserError, match=fault):
        mira.run(PLAN, tmp_path / "run", **whole)
    assert not (tmp_path / "run").exists()


def test_a_model_with_an_adapter_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with_adapter = get_peft_model(make_tiny(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(mira.UserError, match=r"has an adapter on it already; .* adapter\.start"):
        mira.run(PLAN, tmp_path / "run", model=(with_adapter, make_tokenizer()), data=DATA)


def test_worker_processes_know_no_class_of_this_process(tmp_path: Path) -> None:
    mira.register(method=Pull)
    base = {"rounds": 1, "model": {"name": "m"}, "data": {"source": "builtin"}, "training": {"local_steps": 1}}
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"experiment": base, "seeds": [0, 1], "entries": {"Pull": {"method.name": "pull"}}}))
    with pytest.raises(
        mira.UserError,
        match=r"^workers=2: method 'pull' \(.*:Pull\) is registered in this process alone; run it with workers=1",
    ):
        mira.compare(file, tmp_path / "o", workers=2)


def test_registered_classes_are_configured_by_name() -> None:
    base = {"rounds": 1, "model": {"name": "m"}, "data": {"source": "builtin"}, "training": {"local_steps": 1}}
    with pytest.raises(mira.UserError, match=r"method\.name='pull': must be one of"):
        mira.Experiment(**base, method={"name": "pull"})
    mira.register(method=Pull, graph=Pair)
    experiment = mira.Experiment(**base, method={"name": "pull", "step": 1}, graph={"name": "pair"})
    assert experiment.method == Pull(step=1.0)
    with pytest.raises(mira.UserError, match=r"method\.stp: unknown key; did you mean 'step'"):
        mira.Experiment(**base, method={"name": "pull", "stp": 1})
    from mira import config

    assert config.schema()["$defs"]["Pull"]["properties"]["name"]["const"] == "pull"
    assert config.parse_text(config.dump(experiment)) == experiment


@dataclass(frozen=True)
class Nameless:
    step: float = 1.0


@dataclass(frozen=True)
class Mira(Pull):
    name: str = "mira"


@dataclass(frozen=True)
class Half:
    name: str = "half"
    init: ClassVar[Any] = None


@pytest.mark.parametrize(
    ("cls", "fault"),
    [
        (dict, "must be a dataclass"),
        (Nameless, "needs a field name whose default is its name"),
        (Mira, "method.name=mira is MIRA's own; give yours another name"),
        (Half, "a method needs the functions init, broadcast, aggregate, deployed; lacks init"),
    ],
)
def test_a_class_that_lacks_something_is_not_registered(cls: type, fault: str) -> None:
    with pytest.raises(mira.UserError, match=fault):
        mira.register(method=cls)


def test_a_run_without_its_class_says_what_to_register(loaded: Any, tmp_path: Path) -> None:
    mira.run(PLAN | {"rounds": 1}, tmp_path / "run", model=loaded, data=DATA, method=Pull())
    SECTIONS["method"]._added.clear()
    SECTIONS["method"].changes += 1
    with pytest.raises(
        mira.UserError, match=r"method.name=pull is .*:Pull, which is not registered; call mira.register"
    ):
        mira.open_run(tmp_path / "run", model=loaded, data=DATA).evaluate()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["method"] == "pull"
    assert mira.open_run(tmp_path / "run")["method"] == "pull"


@dataclass(frozen=True)
class Odd(Pull):
    name: str = "odd"
    where: Tensor | None = None


def test_a_field_that_no_configuration_can_give_is_refused_at_once() -> None:
    with pytest.raises(mira.UserError, match="Odd: has a field that a configuration cannot give"):
        mira.register(method=Odd)
    assert mira.Experiment(rounds=1, model={"name": "m"}, data={"source": "builtin"}, training={"local_steps": 1})


def test_instances_are_validated(loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(mira.UserError, match=r"method\.step='far': must be a valid number"):
        mira.run(PLAN, tmp_path / "run", model=loaded, data=DATA, method=Pull(step="far"))  # type: ignore[arg-type]


def test_a_second_run_on_the_same_model_is_bit_identical(loaded: Any, tmp_path: Path) -> None:
    for place in ("first", "second"):
        mira.run(PLAN, tmp_path / place, model=loaded, data=DATA)
    assert outcome(tmp_path / "first") == outcome(tmp_path / "second")


def test_an_unfinished_run_is_still_an_object(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        mira.run(PLAN, tmp_path / "cut", [Seen(interrupt=1)], model=(make_tiny(), make_tokenizer()), data=DATA)
    run = mira.open_run(tmp_path / "cut")
    assert run
    assert run != mira.open_run(tmp_path / "cut")
    assert not run.finished
    assert run.clients == list(DATA)
    with pytest.raises(mira.UserError, match="is not finished; resume it with"):
        run["local_loss"]
