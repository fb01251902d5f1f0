"""Which layers carry an adapter, whatever the architecture, and the proof that PEFT reads the same adapter."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from helpers.tiny_models import make_tiny
from helpers.unusual_models import ADAPTABLE, make, make_seeing
from mira.adapters import lora_peft
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import from_peft, peft_config, to_peft
from mira.adapters.peft_check import beside, prove
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.seeds import generator

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
AUTO = {
    "phi3": {"qkv_proj", "o_proj"},
    "gemma4": _ATTENTION,
    "qwen3_moe": _ATTENTION,
    "mixtral": {"q_proj", "v_proj"},  # PEFT's own choice
    "gpt_oss": _ATTENTION,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,  # its indexer chooses tokens, and no gradient passes a choice
    "glm4_moe": _ATTENTION,
    "qwen3_next": _ATTENTION | {"in_proj_qkvz", "in_proj_ba", "out_proj"},
    "llama4": _ATTENTION,
    "phimoe": _ATTENTION,
    "lfm2": {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj"},
    "mamba": {"in_proj", "x_proj"},  # dt_proj is read as a weight, out_proj PEFT leaves out
    "mamba2": {"in_proj"},
    "falcon": {"query_key_value"},  # PEFT's own choice
    "falcon_h1": _ATTENTION | {"in_proj"},
    "ctrl": {"Wq", "Wk", "Wv", "dense"},
    "laguna": _ATTENTION | {"g_proj"},
}


def leaves(layout: Layout) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in layout.modules}


def random_row(layout: Layout) -> torch.Tensor:
    return torch.randn(layout.size, generator=generator("row")) * 0.2


@pytest.mark.parametrize("name", ADAPTABLE)
def test_auto_takes_what_lets_tokens_meet(name: str) -> None:
    model = make(name)
    layout = Lora(rank=2, alpha=4.0).layout(model)
    assert leaves(layout) == AUTO[name]
    prove(model, layout)


@pytest.mark.parametrize("name", ADAPTABLE)
def test_all_linear_is_every_layer_that_can_learn(name: str) -> None:
    model = make(name)
    layout = Lora(rank=2, alpha=4.0, targets="all-linear").layout(model)
    assert leaves(layout) > AUTO[name] or name in ("mixtral", "qwen3_moe", "gpt_oss", "mamba", "mamba2", "phimoe")
    assert "lm_head" not in leaves(layout)
    prove(model, layout)


def test_the_proof_holds_in_every_precision() -> None:
    for name, dtype in (("deepseek_v3", torch.bfloat16), ("deepseek_v3", torch.float16), ("gemma4", torch.float64)):
        model = make(name, dtype)
        prove(model, Lora(rank=2, alpha=4.0, targets="all-linear").layout(model))


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
@pytest.mark.parametrize("targets", ["auto", "all-linear", ("q_proj", "v_proj"), r".*(q|v)_proj"])
def test_an_image_tower_gets_no_adapter(kind: str, targets: str | tuple[str, ...]) -> None:
    model = make_seeing(kind)
    layout = Lora(rank=2, alpha=4.0, targets=targets).layout(model)
    assert {name.split(".layers.")[0] for name in layout.modules} == {"model.language_model"}
    assert {"q_proj", "v_proj"} <= leaves(layout)
    prove(model, layout)


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Lora(rank=2, alpha=4.0, targets=".*").layout(make("mamba"))
    assert {record.message for record in caplog.records} == {
        "adapter.targets: backbone.layers.*.mixer.dt_proj is left out, as it is not used when the model reads a text",
        "adapter.targets: backbone.layers.*.mixer.out_proj is left out, as it is left out by PEFT in architecture 'mamba'",
    }


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        (
            "mamba2",
            ("in_proj", "out_proj"),
            r"'out_proj': .*out_proj is left out by PEFT .*; name others, among in_proj",
        ),
        ("mamba2", ".*out_proj", r"out_proj is left out by PEFT"),
        ("llama4", ("router",), r"router computes more than a product with its weight"),
        ("deepseek_v32", ("wq_b",), r"wq_b is not used when the model reads a text"),
    ],
)
def test_layers_that_cannot_learn_are_refused_in_one_line(
    name: str, targets: str | tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Lora(rank=2, alpha=4.0, targets=targets).layout(make(name))
    assert str(refused.value).startswith("adapter.targets")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen3_next"])
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj", "down_proj"), ("gate_proj", "o_proj"), "all-linear"])
def test_dense_layers_beside_experts_stay_what_they_are_in_peft(
    name: str, targets: str | tuple[str, ...], tmp_path: Path
) -> None:
    """PEFT takes these names for those of experts, and warns of missing keys alone."""
    model = make(name)
    layout = Lora(rank=4, alpha=8.0, targets=targets).layout(model)
    row = random_row(layout)
    to_peft(tmp_path, row, layout, model, "base")
    assert torch.equal(from_peft(tmp_path, layout), row)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad(), beside(model, row, layout):
        ours = model(input_ids=ids).logits
    theirs = PeftModel.from_pretrained(make(name), tmp_path)(input_ids=ids).logits
    plain = model(input_ids=ids).logits
    assert float((theirs - ours).abs().max()) <= 1e-4 < 1e-2 < float((plain - ours).abs().max())


def test_the_proof_sees_an_adapter_that_peft_reads_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("deepseek_v3")
    layout = Lora(rank=2, alpha=4.0, targets=("gate_proj", "up_proj", "down_proj")).layout(model)
    monkeypatch.setattr(lora_peft, "by_weight", lambda modules, model: (list(modules), []))
    with pytest.raises(
        UserError, match=r"adapter\.targets: PEFT reads something else for 'model\.layers\.0\.mlp\.gate_pr"
    ):
        prove(model, layout)


def test_the_proof_sees_another_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny()
    layout = Lora(rank=2, alpha=4.0).layout(model)

    def doubled(*args: object, **kwargs: object) -> object:
        config = peft_config(*args, **kwargs)  # type: ignore[arg-type]
        config.lora_alpha *= 2
        return config

    monkeypatch.setattr(lora_peft, "peft_config", doubled)
    with pytest.raises(
        UserError, match=r"another adapter than this run \(\d+\.\d% of its effect on the logits differs\)"
    ):
        prove(model, layout)


def test_the_proof_says_what_peft_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mamba2")
    layout = Layout.of({"backbone.layers.0.mixer.out_proj": (64, 32)}, 2, 4.0)
    with pytest.raises(
        UserError, match=r"PEFT cannot read the adapter of this run back \(ValueError: .*out_proj"
    ) as refused:
        prove(model, layout)
    assert "\n" not in str(refused.value)


def test_the_proof_leaves_the_model_as_it_was() -> None:
    model = make_tiny()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    prove(model, Lora(rank=2, alpha=4.0).layout(model))
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_takes_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: PreTrainedModel = make_tiny()

    def broken(*args: object, **kwargs: object) -> None:
        raise AttributeError("no such\nthing")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(
        UserError, match=r"architecture 'llama' cannot compute a text of 32 tokens \(AttributeError: no such thing\)"
    ):
        Lora(rank=2, alpha=4.0).layout(model)


def test_dropout_where_peft_has_none_is_refused() -> None:
    model = make("deepseek_v3")
    layout = Lora(rank=2, alpha=4.0, dropout=0.1, targets=("gate_proj", "o_proj")).layout(model)
    with pytest.raises(
        UserError, match=r"adapter\.dropout=0\.1: not available in PEFT for 'model\.layers\.0\.mlp\.gate_proj'"
    ):
        peft_config(layout, model, None, 0.1)
