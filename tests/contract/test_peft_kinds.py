"""Kinds that PEFT has and MIRA does not: a section of a few lines is trained, mixed, exported and merged as PEFT does it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, VeraConfig
from peft.tuners import LoHaModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.engines import TEXT, RandomCorpus
from helpers.sample_config import mira, settings, write_clients
from helpers.tiny_models import make_tiny, save_tiny
from mira import Experiment
from mira.adapters import ADAPTERS
from mira.adapters.peft import PeftAdapter, smallest
from mira.adapters.types import BaseLike
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.training import Training
from mira.core.types import Work
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec
from mira.runner.run import resume, run
from mira.setup.build import open_session
from mira.store import Store


@dataclass(frozen=True)
class IA3:
    """IA3 (Liu et al. 2022): a trained factor for each output of the target layers."""

    kind: str = "ia3"
    targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """Ends of the names of layers."""

    def smallest(self) -> Layout:
        return smallest()

    def on(self, base: BaseLike, seed: int) -> PeftAdapter:
        inner = [name for name in self.targets if name == "down_proj"]
        return PeftAdapter.of(base, IA3Config(target_modules=list(self.targets), feedforward_modules=inner))


CONFIGS: dict[str, PeftConfig] = {
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(target_modules=["q_proj"], r=4),
    "loha": LoHaConfig(target_modules=["q_proj"], r=2),
    "lokr": LoKrConfig(target_modules=["q_proj"], r=2),
}
IDS = torch.arange(3, 20)[None]


@dataclass(frozen=True)
class InMemory:
    model: PreTrainedModel
    name: str = "tiny"
    revision: str | None = None
    sha256: str = "0123"
    source: str = "folder"

    def unquantised(self) -> PreTrainedModel:
        return self.model


def adapter_on(config: PeftConfig, dtype: torch.dtype = torch.float32) -> PeftAdapter:
    return PeftAdapter.of(InMemory(make_tiny("llama", dtype)), config)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_a_plain_loop_around_peft(name: str) -> None:
    corpus, training = RandomCorpus((3,)), Training(local_steps=3, clip=None)
    adapter = adapter_on(CONFIGS[name], torch.float64)
    start = adapter.start(0).double()
    engine = ReferenceEngine.of(EngineSpec(adapter.base.model, TEXT, adapter, corpus, training, 0))
    trained = engine.train(Work(torch.tensor([0]), start[None]), 0, 1e-2).rows[0]

    single = adapter.attached(make_tiny("llama", torch.float64))
    single.load(start)
    optimizer = torch.optim.AdamW(single.parameters, lr=1e-2, weight_decay=0.0)
    for batch in corpus.batches(0, 0):
        optimizer.zero_grad()
        losses = []
        for s in batch:
            labels = torch.where(torch.tensor(s.label), torch.tensor(s.tokens), -100)[1:]
            out = single.module(input_ids=torch.tensor([s.tokens])).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(out, labels, reduction="sum"))
        (torch.stack(losses).sum() / sum(sum(s.label) for s in batch)).backward()
        optimizer.step()
    moved = float(torch.linalg.vector_norm(single.row() - start))
    assert moved > 0
    assert float(torch.linalg.vector_norm(trained - single.row())) <= 1e-6 * moved  # padding: sums in another order


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_what_peft_reads_and_merges(name: str, tmp_path: Path) -> None:
    adapter = adapter_on(CONFIGS[name])
    row = adapter.start(0)
    assert torch.equal(row, adapter.start(0))
    row = row + 0.1 * torch.randn(row.shape, generator=torch.Generator().manual_seed(0))
    adapter.save(tmp_path, row, "some/base")
    assert torch.equal(adapter.read(tmp_path), row)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    ours = adapter.attached(make_tiny())
    ours.load(row)
    theirs = PeftModel.from_pretrained(make_tiny(), tmp_path)
    assert torch.equal(logits(ours.module), logits(theirs))
    assert float((logits(theirs) - logits(make_tiny())).abs().max()) > 1e-3
    with adapter.merged(row) as merged:
        torch.testing.assert_close(logits(merged), logits(theirs), rtol=0, atol=1e-5)
    assert torch.equal(logits(adapter.base.model), logits(make_tiny()))


def test_a_kind_that_peft_cannot_merge_is_refused_and_a_fault_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_on(CONFIGS["loha"])
    row = adapter.start(0)

    def merged_with(raised: Exception) -> None:
        def merge(*given: object, **named: object) -> None:
            raise raised

        monkeypatch.setattr(LoHaModel, "merge_and_unload", merge)
        with adapter.merged(row):
            pass

    for refusal in (NotImplementedError("not yet"), ValueError("not yet")):
        with pytest.raises(
            UserError, match=r"^--merge: PEFT cannot merge LOHA \(\w+: not yet\); export the adapter alone$"
        ):
            merged_with(refusal)
    with pytest.raises(AttributeError, match="fault"):
        merged_with(AttributeError("fault"))
    monkeypatch.undo()
    monkeypatch.delattr(BaseTuner, "merge_and_unload")
    with pytest.raises(UserError, match="it has no merge_and_unload"), adapter.merged(row):
        pass


def test_a_start_is_pefts_own() -> None:
    adapter = adapter_on(CONFIGS["ia3"])
    assert bool((adapter.start(0) == 1).all())  # IA3 begins with factors of 1
    assert not torch.equal(adapter_on(CONFIGS["loha"]).start(0), adapter_on(CONFIGS["loha"]).start(1))


def test_an_exported_row_is_a_start(tmp_path: Path) -> None:
    adapter = adapter_on(CONFIGS["loha"])
    row = adapter.start(0) + 0.1
    adapter.save(tmp_path, row, "base")
    assert torch.equal(PeftAdapter.of(adapter.base, CONFIGS["loha"], str(tmp_path)).start(0), row)
    for other, message in (
        (CONFIGS["lokr"], "is LOHA, and the run's adapter.kind is LOKR in PEFT"),
        (LoHaConfig(target_modules=["q_proj"], r=4), "does not fit"),
        (LoHaConfig(target_modules=["k_proj"], r=2), "does not fit"),
    ):
        with pytest.raises(UserError, match=rf"^adapter\.start={tmp_path}: {message}"):
            PeftAdapter.of(adapter.base, other, str(tmp_path)).start(0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(num_virtual_tokens=4), r"PREFIX_TUNING makes virtual tokens; use adapter\.kind=prompt"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), r"LORA with these settings changes the base"),
        (IA3Config(target_modules=["nothing"], feedforward_modules=[]), r"^adapter: PEFT cannot put IA3 on architecture 'llama'"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_row_is_refused(config: PeftConfig, message: str) -> None:
    model = make_tiny()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(UserError, match=message):
        PeftAdapter.of(InMemory(model), config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert not any(tensor.requires_grad for tensor in model.parameters())


def test_a_bias_that_all_clients_share_is_not_trained() -> None:
    with pytest.raises(UserError, match="changes the base's own weights"):
        PeftAdapter.of(InMemory(make_tiny("qwen2")), LoraConfig(target_modules=["q_proj"], bias="all"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """IA3 is offered in this test alone."""
    for name, empty in (("_added", {}), ("_plugins", {}), ("changes", ADAPTERS.changes)):
        monkeypatch.setattr(ADAPTERS, name, empty)
    ADAPTERS.add(IA3)


@pytest.mark.parametrize("method", ["mira", "fedit"])
def test_a_run_from_end_to_end(method: str, registered: None, tmp_path: Path) -> None:
    """Trained, mixed, stopped and resumed, exported, read by PEFT, merged."""
    model, data = save_tiny(tmp_path / "model"), write_clients(tmp_path / "clients.jsonl")
    values = settings(model, data, method={"name": method}, rounds=2) | {"adapter": {"kind": "ia3"}}
    values["training"] |= {"lr": 0.05, "local_steps": 4}
    experiment = Experiment(**values)
    result = run(experiment, tmp_path / "run")
    assert result["local_loss"] < result["local_loss_start"]
    assert resume(tmp_path / "run")["local_loss"] == result["local_loss"]
    adapter = open_session(experiment).adapter
    assert isinstance(adapter, PeftAdapter)
    with Store.open(tmp_path / "run", writable=False) as store:
        rows = store.rows()[torch.arange(store.num_rows)]
    folder = Path(result["clients"][0]["adapter"])
    assert torch.equal(adapter.read(folder), rows[0])
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder)
    exported = mira("export", tmp_path / "run", "--client", "ann", "--merge")
    assert exported.status == 0, exported.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged/ann")
    torch.testing.assert_close(logits(merged), logits(peft), rtol=0, atol=1e-5)


def test_batched_refuses_it_and_methods_of_factors_too(registered: None, tmp_path: Path) -> None:
    model, data = save_tiny(tmp_path / "model"), write_clients(tmp_path / "clients.jsonl")
    values = settings(model, data) | {"adapter": {"kind": "ia3"}}
    with pytest.raises(UserError, match=r"engine\.name=batched: has no arithmetic for this adapter\.kind; use"):
        _ = open_session(Experiment(**values | {"engine": {"name": "batched"}})).engine.engine
    assert isinstance(open_session(Experiment(**values)).engine, ReferenceEngine)
    with pytest.raises(UserError, match=r"method\.name=ffa-lora: needs the factors A and B"):
        Experiment(**values | {"method": {"name": "ffa-lora"}})
    with pytest.raises(UserError, match=r"clients\.rank\.ann=2: ranks belong to adapter\.kind=lora"):
        Experiment(**values | {"clients": {"rank": {"ann": 2}}})
