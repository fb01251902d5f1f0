"""Rows in and out of PEFT: what we write loads there, computes the same there, and comes back as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel

from helpers.engines import RandomCorpus, make_engine
from helpers.tiny_models import make_tiny
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, from_peft, merge, peft_config, start_row, to_peft
from mira.adapters.lowrank import AdapterBatch
from mira.core.errors import UserError
from mira.core.layout import Layout
from mira.core.seeds import generator
from mira.core.training import Training
from mira.engine.batched import BatchedEngine
from mira.engine.packing import pack

# (architecture, targets, rsLoRA); the comment says what is awkward about it.
CASES: dict[str, tuple[str, str | tuple[str, ...], bool]] = {
    "llama": ("llama", ("q_proj", "v_proj", "down_proj"), False),
    "llama-auto-rslora": ("llama", "auto", True),
    "llama-one-layer": ("llama", r"model\.layers\.1\..*(q|o)_proj", False),  # short names would match layer 0 too
    "gpt2": ("gpt2", ("c_attn",), False),  # Conv1D: weights lie as [in, out]
    "gpt2-attention": ("gpt2", ("c_attn", "attn.c_proj"), True),  # the MLP has a c_proj as well
    "gpt2-all": ("gpt2", ("c_attn", "c_proj", "c_fc"), False),
    "qwen2": ("qwen2", ("q_proj", "k_proj", "gate_proj"), False),
    "qwen2-rslora": ("qwen2", "auto", True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Layout]:
    kind, targets, rslora = CASES[request.param]
    return kind, Lora(rank=4, alpha=8.0, rslora=rslora, targets=targets).layout(make_tiny(kind))


def random_row(layout: Layout, seed: int = 0) -> Tensor:
    return torch.randn(layout.size, generator=generator("row", seed)) * 0.2


def sequences() -> Any:
    """Without labels: every token is read."""
    return [replace(s, label=(False,) * len(s.tokens)) for s in RandomCorpus((1,)).encoded(0, "test")]


def our_logits(kind: str, layout: Layout, row: Tensor, prefix: bool) -> list[Tensor]:
    """The batched engine's logits of each sequence's own tokens, three other rows in the same pass."""
    engine = make_engine("batched", kind, RandomCorpus((1,)), Training(local_steps=1))
    assert isinstance(engine, BatchedEngine)
    engine.adapted.attached.detach()
    engine = BatchedEngine.of(
        replace(engine.spec, adapter=LoraAdapter(engine.spec.model, layout)), tokens_per_pass=4096, prefix=prefix
    )
    rows = torch.stack([random_row(layout, 1), random_row(layout, 2), row, random_row(layout, 3)])
    packed = pack([(n, sequences()) for n in range(4)], prefix)
    with torch.no_grad(), engine.adapted.using(AdapterBatch(rows, packed.ranges)):
        logits = engine.adapted.head(engine.adapted.hidden_states(packed))
    mine = packed.prompts[2 * len(sequences()) : 3 * len(sequences())]
    return [logits[s.start : s.end] for s in mine]


def plain_logits(model: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([s.tokens])).logits[0] for s in sequences()]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference over the tokens that both have: ours may start behind a shared prefix."""
    return max(float((x - y[-len(x) :]).abs().max()) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("prefix", [True, False])
def test_peft_computes_the_same_logits(case: tuple[str, Layout], prefix: bool, tmp_path: Path) -> None:
    """fp32 logits of size 1: 1e-5 is the promise, 100 times the rounding of one number."""
    kind, layout = case
    row = random_row(layout)
    to_peft(tmp_path, row, layout, make_tiny(kind), "base")
    peft = PeftModel.from_pretrained(make_tiny(kind), tmp_path)
    theirs = plain_logits(peft)
    assert worst(our_logits(kind, layout, row, prefix), theirs) <= 1e-5
    assert worst(plain_logits(make_tiny(kind)), theirs) > 0.01  # the adapter does something
    attached = {name.removeprefix("base_model.model.") for name, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert attached == set(layout.modules)  # and sits nowhere else


def test_a_merged_model_computes_the_same_logits(case: tuple[str, Layout], tmp_path: Path) -> None:
    kind, layout = case
    row = random_row(layout)
    merged = make_tiny(kind)
    merge(merged, row, layout)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert worst(our_logits(kind, layout, row, True), plain_logits(loaded)) <= 1e-5


def test_a_row_comes_back_as_it_was(case: tuple[str, Layout], tmp_path: Path) -> None:
    kind, layout = case
    for seed in range(2):  # the second write replaces the first
        row = random_row(layout, seed)
        to_peft(tmp_path, row, layout, make_tiny(kind), "base")
        assert torch.equal(from_peft(tmp_path, layout), row)


def test_what_the_config_says(tmp_path: Path) -> None:
    layout = Lora(rank=4, alpha=8.0, rslora=True, targets=("c_attn", "attn.c_proj")).layout(make_tiny("gpt2"))
    to_peft(tmp_path, random_row(layout), layout, make_tiny("gpt2"), "some/base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    told = {
        k: config[k]
        for k in ("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "base_model_name_or_path")
    }
    assert told == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "use_rslora": True, "fan_in_fan_out": True,
        "base_model_name_or_path": "some/base",
    }  # fmt: skip


def test_short_names_are_written_where_they_suffice() -> None:
    """Serving engines and people know q_proj; full names only where a short one would match too much."""
    llama = make_tiny("llama")
    assert peft_config(Lora(rank=4, alpha=8.0).layout(llama), llama, None).target_modules == {"q_proj", "v_proj"}
    gpt2 = make_tiny("gpt2")
    full = peft_config(Lora(rank=4, alpha=8.0, targets=("attn.c_proj",)).layout(gpt2), gpt2, None).target_modules
    assert full == {"transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"}


def test_many_full_names_still_name_the_same_layers(tmp_path: Path) -> None:
    """PEFT shortens lists of 20 names and more; they must not match other layers then."""
    config = GPT2Config(vocab_size=128, n_embd=16, n_layer=12, n_head=2, n_positions=64)
    layout = Lora(rank=2, alpha=4.0, targets=("c_attn", "attn.c_proj")).layout(GPT2LMHeadModel(config))
    assert len(layout.modules) == 24
    model = GPT2LMHeadModel(config)
    to_peft(tmp_path, random_row(layout), layout, model, "base")
    peft = PeftModel.from_pretrained(model, tmp_path)
    attached = {name.removeprefix("base_model.model.") for name, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert attached == set(layout.modules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, r"lora_A\.weight' is \(4, 32\), expected \(2, 32\); another rank or base model\?"),
        ({"targets": ("q_proj",)}, r"holds 8 tensors, expected 4; other target modules\?"),
        ({"targets": ("q_proj", "v_proj", "o_proj")}, r"o_proj\.lora_A\.weight' is missing, expected"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    llama = make_tiny("llama")
    written = {"rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj")}
    layout = Lora(**written).layout(llama)
    to_peft(tmp_path, random_row(layout), layout, llama, "base")
    with pytest.raises(UserError, match=message):
        from_peft(tmp_path, Lora(**(written | change)).layout(llama))


# Which layers.


def names(model: PreTrainedModel, targets: str | tuple[str, ...]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in Lora(rank=4, alpha=8.0, targets=targets).layout(model).modules}


def test_targets_by_default_by_name_and_by_pattern(tiny_llama: PreTrainedModel, tiny_gpt2: PreTrainedModel) -> None:
    assert names(tiny_llama, "auto") == {"q_proj", "v_proj"}
    assert names(tiny_gpt2, "auto") == {"c_attn"}
    assert names(tiny_llama, ("up_proj", "self_attn.o_proj")) == {"up_proj", "o_proj"}
    layout = Lora(rank=4, alpha=8.0, targets=r".*layers\.1\.mlp\..*").layout(tiny_llama)
    assert layout.modules == tuple(f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    everything = names(tiny_llama, ".*")
    assert "lm_head" not in everything  # the head is shared with the embedding
    assert len(everything) == 7


def test_the_layout_lays_a_then_b_end_to_end(tiny_llama: PreTrainedModel) -> None:
    layout = Lora(rank=4, alpha=8.0, targets=("k_proj",)).layout(tiny_llama)
    assert [(e.module[-6:], e.factor, e.shape, e.offset) for e in layout.entries[:2]] == [
        ("k_proj", "A", (4, 32), 0),
        ("k_proj", "B", (16, 4), 128),
    ]
    assert layout.size == 2 * (128 + 64)
    assert layout.scale == 2.0
    assert Lora(rank=4, alpha=8.0, rslora=True).layout(tiny_llama).scale == 4.0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), r"no linear layer is named 'q_prj'; did you mean 'q_proj'\?"),
        (("q_proj", "embed_tokens"), r"no linear layer is named 'embed_tokens'"),
        (("proj",), r"no linear layer is named 'proj'"),
        ("q_proj", r"matches no linear layer; as a list: \[q_proj\]"),  # a pattern is matched in full
        ("(", r"not a valid pattern"),
        ((), r"matches no linear layer"),
    ],
)
def test_targets_that_name_nothing_are_refused(
    targets: str | tuple[str, ...], message: str, tiny_llama: PreTrainedModel
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Lora(rank=4, alpha=8.0, targets=targets).layout(tiny_llama)
    assert str(refused.value).startswith("adapter.targets")
    assert "\n" not in str(refused.value)


def test_an_architecture_without_a_default_of_peft_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama")
    monkeypatch.setattr(LlamaConfig, "model_type", "unheard-of")
    assert names(model, "auto") == {"q_proj", "k_proj", "v_proj", "o_proj"}


# Where rows start.


def test_the_start_row_is_seeded_and_changes_nothing_yet(tiny_llama: PreTrainedModel) -> None:
    layout = Lora(rank=4, alpha=8.0).layout(tiny_llama)
    torch.manual_seed(1)
    row = start_row(layout, 5)
    torch.manual_seed(2)
    assert torch.equal(row, start_row(layout, 5))
    assert not torch.equal(row, start_row(layout, 6))
    assert row.dtype == torch.float32
    for entry in layout.entries:
        assert bool((entry.view(row) == 0).all()) is (entry.factor == "B")
    a = [entry.view(row) for entry in layout.entries if entry.factor == "A"]
    assert not torch.equal(a[0], a[1])


def test_rows_start_as_pefts_do() -> None:
    """A·√in is uniform on [−1, 1] in both. 2 layers · 7 modules · rank 16 · ≥ 32 inputs: 8192 numbers, so that empirical
    quantiles are within 3 · √(¼/8192) · 2 = 0.033 of the true ones and of each other within 0.05."""
    model = make_tiny("llama")
    layout = Lora(rank=16, alpha=8.0, targets=".*_proj").layout(model)
    config = peft_config(layout, model, None)
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = dict(get_peft_model(model, config).named_parameters())
    row = start_row(layout, 0)
    entries = [entry for entry in layout.entries if entry.factor == "A"]
    ours = [entry.view(row) for entry in entries]
    theirs = [parameters[f"base_model.model.{e.module}.lora_A.default.weight"].detach() for e in entries]
    share = torch.linspace(0, 1, 21)
    quantiles = []
    for drawn in (ours, theirs):
        for x in drawn:
            assert float(x.abs().max()) <= x.shape[1] ** -0.5
        quantiles.append(torch.cat([(x * x.shape[1] ** 0.5).flatten() for x in drawn]).quantile(share))
    torch.testing.assert_close(quantiles[0], quantiles[1], rtol=0, atol=0.05)
    torch.testing.assert_close(quantiles[0], 2 * share - 1, rtol=0, atol=0.05)


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=5), st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=4
    ),
    st.integers(1, 3),
)
def test_views_cover_a_row_exactly_once(modules: dict[str, tuple[int, int]], rank: int) -> None:
    layout = Layout.of(modules, rank, 1.0)
    row = torch.zeros(2, layout.size)
    for entry in layout.entries:
        fan_in, fan_out = modules[entry.module]
        view = entry.view(row)
        assert view.shape == ((2, rank, fan_in) if entry.factor == "A" else (2, fan_out, rank))
        view.add_(1)  # a view, not a copy
    assert bool((row == 1).all())
    assert layout.modules == tuple(modules)
