"""The batched engine finds out the needs of an architecture; another engine computes those that it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.engines import RandomCorpus, adapter_of, make_engine, warm_row
from helpers.model_families import FAMILIES, MIXERS, PACKED, PADDED, Family, build
from helpers.sample_config import settings, write_clients
from helpers.tiny_models import make_tiny, make_tokenizer
from mira.adapters.attach import Attached
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import start_row
from mira.adapters.prompt import VirtualPrompt
from mira.config import Experiment
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.training import Training
from mira.core.types import Work
from mira.engine.attention.patching import PatchedModel, patch_attention
from mira.engine.batched import BatchedEngine
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec, Text
from mira.setup.build import open_session
from mira.setup.session import Session

SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


def model_of(name: str, **more: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**(SHAPE | more))
        model = AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:  # which are empty memory until weights are loaded
                parameter.data.normal_()
    return model.requires_grad_(False).eval()


def engine_on(model: PreTrainedModel) -> BatchedEngine:
    layout = Lora(rank=2, alpha=4.0, targets=".*(q_proj|qkv_proj|query_key_value|in_proj)").layout(model)
    return BatchedEngine.of(spec_on(model, layout), tokens_per_pass=4096)


def spec_on(model: PreTrainedModel, layout: Layout) -> EngineSpec:
    corpus: Any = RandomCorpus((1,))
    return EngineSpec(
        model, Text(1, frozenset([0]), str), adapter_of(model, layout), corpus, Training(local_steps=1), 0
    )


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Qwen3", {"head_dim": 8}),
        ("Gemma3Text", {"head_dim": 8, "sliding_window": 8}),
        ("Phi3", {}),
        ("Olmo2", {}),
        ("SmolLM3", {}),
        ("Granite", {}),
        ("Mixtral", {"num_local_experts": 2}),
        ("GPTNeoX", {}),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ],
)
def test_packed_losses_equal_the_models_own(name: str, more: dict[str, Any]) -> None:
    """fp32: sums of a few losses of 5 nats, each from logits that agree to 1e-6."""
    model = model_of(name, **more)
    sequences = RandomCorpus((1,)).encoded(0, "test")
    oracle = []
    for s in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([s.tokens])).logits[0, :-1]
        label = torch.tensor(s.label)[1:]
        oracle.append(cross_entropy(logits[label], torch.tensor(s.tokens)[1:][label], reduction="sum"))
    engine = engine_on(model)
    ours, _ = engine.score(start_row(engine.spec.layout, 0)[None], [sequences])
    torch.testing.assert_close(ours.float(), torch.stack(oracle), rtol=1e-5, atol=0)


def family(name: str) -> Family:
    return next(one for one in FAMILIES if one.name == name)


def way_of(name: str, dtype: torch.dtype = torch.float32) -> PatchedModel:
    return patch_attention(build(family(name), dtype), Attached(0.0), 48)


@pytest.mark.filterwarnings("ignore")  # optional kernels that are not installed
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("recurrent_gemma", MIXERS),  # a recurrence and a convolution, which 16 bits nearly drown
        ("lfm2_moe", MIXERS),
        ("llama", PACKED),
        ("gpt_oss", PACKED),
        ("gemma2", PACKED),
        ("qwen3_moe", PACKED),  # experts
        ("deepseek_v3", PACKED),
        ("qwen3_5_moe_text", MIXERS),
        ("zaya", PADDED),  # a convolution within attention
        ("gptj", PADDED),  # an attention of its own
        ("minimax_m3_vl_text", PADDED),  # attention to chosen blocks
        ("llama4_text", PADDED),  # layers that number the tokens of a pass themselves
    ],
)
def test_in_16_bits_models_are_told_apart_as_in_32(name: str, kind: str) -> None:
    assert way_of(name, torch.bfloat16).kind == kind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["recurrent_gemma", "llama"])
def test_passes_over_a_model_that_keeps_what_it_computed_come_in_turn(name: str) -> None:
    assert way_of(name).one_at_a_time is (name == "recurrent_gemma")


@pytest.mark.filterwarnings("ignore")
def test_every_call_of_attention_has_keys_and_values_of_its_own() -> None:
    """Two calls a layer, and layers that run again and again."""
    for name in ("diffllama", "hrm_text"):
        assert way_of(name).decodes


def test_a_chunk_shorter_than_a_sequence_is_seen_without_a_long_probe() -> None:
    model = build(replace(family("llama4_text"), more={"num_hidden_layers": 2, "attention_chunk_size": 2000}))
    for longest, kind in ((1999, PACKED), (2001, PADDED)):
        attached = Attached(0.0)
        assert patch_attention(model, attached, longest).kind == kind
        attached.detach()


def test_a_refused_model_is_left_as_it_was() -> None:
    model = build(family("deepseek_v32"))
    ids = torch.arange(60)[None] % 100 + 3
    before = model(input_ids=ids).logits
    layout = Lora(rank=2, alpha=4.0, targets=family("deepseek_v32").targets).layout(model)
    with pytest.raises(
        UserError, match=r"^engine\.name=batched: architecture 'deepseek_v32' lets a token see those behind it; use"
    ):
        BatchedEngine.of(spec_on(model, layout), tokens_per_pass=4096, longest=48)
    assert not [module for module in model.modules() if "forward" in vars(module)]
    assert torch.equal(model(input_ids=ids).logits, before)


def folder_of(name: str, place: Path) -> Path:
    build(family(name)).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


def test_auto_takes_reference_where_batched_cannot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The engine is told in one line, recorded, and taken again when the run goes on."""
    folder, data = folder_of("deepseek_v32", tmp_path / "model"), write_clients(tmp_path / "data.jsonl")

    def opened(name: str, recorded: dict[str, Any] | None = None) -> Session:
        values = settings(
            folder, data, engine={"name": name}, prompt={"template": "plain"}, adapter={"targets": ["q_b_proj"]}
        )
        return open_session(Experiment(**values), recorded)

    session = opened("auto")
    assert isinstance(session.engine, ReferenceEngine)
    assert session.environment["engine"] == "reference"
    reason = "architecture 'deepseek_v32' lets a token see those behind it"
    line = f"engine.name=auto: using 'reference', one client at a time: {reason}"
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    with pytest.raises(UserError, match=r"use engine\.name=reference"):
        _ = opened("batched").engine
    with pytest.raises(UserError, match=r"use engine\.name=reference"):
        _ = opened("auto", {"engine": "batched"}).engine


def test_auto_takes_batched_where_it_can(tiny_folder: Path, tmp_path: Path) -> None:
    values = settings(tiny_folder, write_clients(tmp_path / "data.jsonl"))
    for recorded, kind in ((None, BatchedEngine), ({"engine": "reference"}, ReferenceEngine)):
        assert isinstance(open_session(Experiment(**values), recorded).engine, kind)


class Router(nn.Linear):
    """A linear layer by its class alone."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.router(x)[0]
        return scores


@pytest.mark.parametrize("name", ["batched", "reference"])
def test_a_layer_that_cannot_carry_an_adapter_is_told_before_training(name: str) -> None:
    model = make_tiny("llama")
    model.model.layers[0].mlp = Routed().requires_grad_(False)
    layout = Layout.of({"model.layers.0.mlp.router": (32, 32)}, 2, 4.0)  # which adapter.targets would leave out
    with pytest.raises(
        UserError, match=r"^adapter\.targets: a layer among them cannot carry an adapter \(.*\); name other"
    ):
        make_engine(name, "llama", RandomCorpus((1,)), Training(local_steps=1), model=model, layout=layout)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_adapters_that_text_does_not_reach_train_alike(optimizer: Any) -> None:
    """A tower for images, say: nothing is learnt there, by any engine, with a frozen factor and kept moments too."""
    training = Training(optimizer=optimizer, momentum=0.9 * (optimizer == "sgd"), local_steps=2, keep_optimizer=True)
    found = []
    for name in ("batched", "reference"):
        model = make_tiny("llama", torch.float64)
        model.model.tower = nn.ModuleDict({"q_proj": nn.Linear(32, 32)}).double().requires_grad_(False)
        # adapter.targets would leave the tower out, where it can tell.
        modules = {f"model.layers.{n}.self_attn.q_proj": (32, 32) for n in range(2)} | {"model.tower.q_proj": (32, 32)}
        layout = Layout.of(modules, 2, 4.0)
        trainable = torch.ones(layout.size, dtype=torch.bool)
        layout.entries[0].view(trainable)[:] = False
        engine = make_engine(name, "llama", RandomCorpus((2,)), training, torch.float64, model=model, layout=layout)
        start = warm_row(layout)[None].double()
        found.append(engine.train(Work(torch.arange(1), start, trainable=trainable), 0, 1e-2))
    ours, theirs = found
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-6, atol=1e-9)
    assert ours.optimizer is not None
    assert theirs.optimizer is not None
    torch.testing.assert_close(ours.optimizer[:, 1:], theirs.optimizer[:, 1:], rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma3n_text", r"'gemma3n_text' reads more of a token than its embedding, .*; use engine\.name=reference$"),
        ("gemma4_text", r"^adapter\.virtual_tokens=3: the model cannot read them \(.*\); use adapter\.kind=lora$"),
    ],
)
def test_virtual_tokens_are_embeddings_alone(name: str, why: str) -> None:
    model = build(family(name))
    layout = VirtualPrompt(virtual_tokens=3, encoder_hidden=8).layout(model)
    with pytest.raises(UserError, match=why):
        make_engine("batched", "llama", RandomCorpus((1,)), Training(local_steps=1), model=model, layout=layout)
