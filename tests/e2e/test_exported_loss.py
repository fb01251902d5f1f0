"""The loss that a run reports is the one of its exported folder in plain PEFT, where names mean two things to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from helpers.sample_config import settings, write_clients
from helpers.tiny_models import make_tokenizer
from helpers.unusual_models import make
from mira import run
from mira.adapters import lora_peft
from mira.config import Experiment
from mira.core.errors import UserError
from mira.setup.build import open_session


def values_on(name: str, adapter: dict[str, Any], engine: str, folder: Path) -> dict[str, Any]:
    make(name).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    values = settings(folder / "base", write_clients(folder / "clients.jsonl"), rounds=1)
    values["adapter"], values["engine"]["name"] = {"rank": 2} | adapter, engine
    return values


@pytest.mark.parametrize(
    ("name", "adapter", "engine"),
    [
        ("deepseek_v3", {"targets": ["gate_proj", "up_proj", "down_proj", "o_proj"]}, "batched"),
        ("glm4_moe", {"targets": ["gate_proj", "o_proj"]}, "reference"),
        ("qwen3_moe", {"targets": ["experts.gate_up_proj", "experts.down_proj"]}, "reference"),
        ("qwen3_moe", {"targets": ["experts.gate_up_proj", "experts.down_proj"]}, "batched"),
        ("gpt_oss", {"targets": ["o_proj", "experts.gate_up_proj", "experts.down_proj"]}, "batched"),
        ("phi3", {"dora": True}, "reference"),
    ],
)
def test_a_folder_has_the_loss_that_was_reported(
    name: str, adapter: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    experiment = Experiment(**values_on(name, adapter, engine, tmp_path))
    client = run(experiment, tmp_path / "run")["clients"][0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, client["adapter"])  # missing tensors would be a warning, and so an error
    total, tokens = 0.0, 0
    for example in open_session(experiment).corpus.encoded(0, "test"):
        ids, label = torch.tensor(example.tokens), torch.tensor(example.label)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total += float(cross_entropy(logits[label], ids[1:][label], reduction="sum"))
        tokens += int(label.sum())
    assert client["loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_a_run_that_peft_would_read_as_another_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = values_on("deepseek_v3", {"targets": ["gate_proj", "up_proj", "down_proj"]}, "batched", tmp_path)
    monkeypatch.setattr(lora_peft, "by_weight", lambda modules, model: (list(modules), []))
    with pytest.raises(UserError, match=r"adapter\.targets: PEFT reads something else for"):
        run(Experiment(**values), tmp_path / "run")
    assert not (tmp_path / "run").exists()
