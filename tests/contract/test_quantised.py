"""A quantised base: what is stored, and that training on it is PEFT's on the same numbers.

The independent witness is the same base with its weights made whole by bitsandbytes' own functions: a plain model.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from helpers.displacement import displacement_error
from helpers.engines import RandomCorpus, layout_on, make_engine, warm_row
from helpers.sample_config import ADAPTERS, mira, settings, write_clients
from helpers.tiny_models import KINDS, Kind, make_tiny, make_tokenizer, save_tiny
from mira import run
from mira.config import Experiment, differences, resolved
from mira.core.errors import UserError
from mira.core.training import Training
from mira.core.types import Trained, Work
from mira.model import load, quantise

BITS = ("4bit", "8bit")
STEPS = (6, 3, 5)

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'mira-fl[quantized]'"
)


@pytest.fixture(scope="module", params=KINDS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path]:
    """A model as bf16 safetensors, so that it is quantised from the same numbers whatever it is computed in."""
    return request.param, save_tiny(tmp_path_factory.mktemp("stored") / request.param, request.param, torch.bfloat16)


def quantised(folder: Path, bits: str, dtype: str = "float32") -> PreTrainedModel:
    return load(str(folder), dtype=dtype, device="cpu", quantization=bits).model  # type: ignore[arg-type]


def whole(kind: Kind, model: PreTrainedModel) -> PreTrainedModel:
    """A plain fp32 model with the weights that the quantised ``model`` stands for."""
    from bitsandbytes import functional

    plain = make_tiny(kind)
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if weight is None:
            continue
        if weight.dtype == torch.uint8:
            weight = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif weight.dtype == torch.int8:
            weight = functional.int8_vectorwise_dequant(weight.data, module.state.SCB)
        target = plain.get_submodule(name)
        own = target.get_parameter("weight")
        own.data.copy_(weight.T if isinstance(target, Conv1D) else weight)
        if getattr(module, "bias", None) is not None:
            target.get_parameter("bias").data.copy_(module.get_parameter("bias"))
    return plain


def train(name: str, kind: Kind, model: PreTrainedModel, optimizer: str = "adamw", **options: Any) -> Trained:
    training = Training(lr=1e-3 if optimizer == "adamw" else 0.5, local_steps=6, clip=0.5, optimizer=optimizer)
    engine = make_engine(name, kind, RandomCorpus(STEPS), training, model=model, **options)
    assert engine.spec.layout == layout_on(kind)
    return engine.train(Work(torch.arange(3), start(kind)), 0, training.lr)


def start(kind: Kind) -> Tensor:
    return warm_row(layout_on(kind)).expand(3, -1)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_linear_layers_are_stored_small_and_compute_what_they_stand_for(stored: tuple[Kind, Path], bits: str) -> None:
    kind, folder = stored
    model = quantised(folder, bits)
    linear = [
        m for m in model.modules() if getattr(getattr(m, "weight", None), "dtype", None) in (torch.uint8, torch.int8)
    ]
    assert len(linear) == 2 * (4 if kind == "gpt2" else 7)  # all linear layers of two blocks
    for module in linear:
        numbers = module.in_features * module.out_features
        assert module.weight.nbytes == numbers * int(bits[0]) // 8
    plain, ids = whole(kind, model), torch.arange(3, 40)[None]
    logits, grads = [], []
    for each in (model, plain):
        x = each.get_input_embeddings()(ids).detach().requires_grad_()
        logits.append(each(inputs_embeds=x).logits)
        grads.append(torch.autograd.grad(logits[-1].square().mean(), x)[0])
    # The same sums over at most 128 numbers in fp32, in another order, through two layers.
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4 * float(grads[1].abs().max()))
    assert not torch.allclose(logits[0], make_tiny(kind)(ids).logits, rtol=1e-3, atol=1e-3)  # rounded it is


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_training_equals_peft_on_the_same_base_in_fp32(stored: tuple[Kind, Path], bits: str) -> None:
    """SGD, whose steps are as exact as its gradients: AdamW's first ones are signs, of gradients near 0 too."""
    kind, folder = stored
    oracle = train("reference", kind, quantised(folder, bits), "sgd")
    plain = train("reference", kind, whole(kind, quantised(folder, bits)), "sgd")
    for options in ({}, {"tokens_per_pass": 1}, {"prefix": False}, {"checkpointing": True}):
        ours = train("batched", kind, quantised(folder, bits), "sgd", **options)
        for rows in (oracle.rows, plain.rows):
            # fp32: sums in another order, as on a base that is not quantised.
            assert displacement_error(layout_on(kind), ours.rows, rows, start(kind)) <= 1e-5
        torch.testing.assert_close(ours.loss, oracle.loss, rtol=1e-5, atol=0)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_bf16_is_as_near_to_fp32_as_peft_in_bf16(stored: tuple[Kind, Path], bits: str) -> None:
    """What separates the engines is the format's own noise, measured on PEFT: its distance in bf16 from the same base
    in fp32. Half as much again is allowed, since noise is what is compared."""
    kind, folder = stored
    exact = train("reference", kind, whole(kind, quantised(folder, bits, "bfloat16"))).rows
    oracle = train("reference", kind, quantised(folder, bits, "bfloat16")).rows
    ours = train("batched", kind, quantised(folder, bits, "bfloat16")).rows
    noise = displacement_error(layout_on(kind), oracle.float(), exact, start(kind))
    assert 1e-4 < displacement_error(layout_on(kind), ours, exact, start(kind)) < 1.5 * noise


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["batched", "reference"])
@pytest.mark.parametrize("bits", BITS)
def test_training_after_an_evaluation_is_the_same(tiny_folder: Path, bits: str, name: str) -> None:
    """bitsandbytes has other products without gradients, and on some CPUs changes the weights for them."""
    rows = []
    for measured in (False, True):
        engine = make_engine(
            name, "llama", RandomCorpus(STEPS), Training(lr=1e-3, local_steps=6), model=quantised(tiny_folder, bits)
        )
        if measured:
            engine.evaluate(start("llama"), torch.arange(3), ("test",))
        rows.append(engine.train(Work(torch.arange(3), start("llama")), 0, 1e-3).rows)
    assert torch.equal(*rows)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_who_is_in_the_pass_does_not_matter_with_outliers_about(tiny_folder: Path, bits: str) -> None:
    """Activations beyond 6, for which LLM.int8 would treat whole columns of a pass in another way."""
    model = quantised(tiny_folder, bits)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data *= 4
    seen: list[Tensor] = []
    engine: Any = make_engine("batched", "llama", RandomCorpus(STEPS), Training(local_steps=1), model=model)
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    together = engine.evaluate(start("llama"), torch.arange(3), ("test",))
    handle.remove()
    assert max(float(x.abs().max()) for x in seen) > 6
    for k in range(3):
        alone = engine.evaluate(start("llama")[:1], torch.tensor([k]), ("test",))
        torch.testing.assert_close(alone.nll[0], together.nll[k], rtol=1e-6, atol=0)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", BITS)
def test_a_run_on_a_quantised_base(tiny_folder: Path, tmp_path: Path, bits: str) -> None:
    values = settings(tiny_folder, write_clients(tmp_path / "clients.jsonl"), rounds=1)
    values["model"]["quantization"], values["engine"]["checkpointing"] = bits, True
    folder = tmp_path / "run"
    result = run(Experiment(**values), folder)
    assert result["model"]["quantization"] == bits
    adapter = Path(result["clients"][0]["adapter"])
    loaded = PeftModel.from_pretrained(quantised(tiny_folder, bits), str(adapter))
    named = dict(loaded.named_parameters())
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        assert torch.equal(named[name.replace(".weight", ".default.weight")], tensor)
    merged = mira("export", folder, "--client", "ann", "--merge")
    assert merged.out == f"{folder}/merged/ann\n"
    assert "--merge: merging into the unquantised weights of" in merged.err
    plain = PeftModel.from_pretrained(load(str(tiny_folder)).model, str(adapter))
    ids = torch.arange(20, 40)[None]
    of_merged = load(f"{folder}/merged/ann").model(input_ids=ids).logits
    torch.testing.assert_close(of_merged, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert mira("export", folder, "--client", "ann").out == f"{folder}/{ADAPTERS}/ann\n"
    values["model"]["quantization"] = "none"
    assert differences(resolved(Experiment(**values)), Experiment.from_yaml(folder / "config.yaml")) == [
        f'model.quantization: "none" here, "{bits}" there'
    ]


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # transformers says that the stored one counts
def test_weights_stored_quantised_are_taken_for_what_they_are(tiny_folder: Path, tmp_path: Path) -> None:
    model = quantised(tiny_folder, "4bit")
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for asked in ("none", "8bit"):
        message = rf"^model\.quantization={asked}: .* stored quantised; set model\.quantization=4bit$"
        with pytest.raises(UserError, match=message):
            load(str(tmp_path), device="cpu", quantization=asked)  # type: ignore[arg-type]


def test_without_the_library_the_extra_is_named(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^model\.quantization=4bit: .*pip install 'mira-fl\[quantized\]'$"):
        load(str(tiny_folder), quantization="4bit")


def test_not_with_double_precision(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.quantization=8bit: "):
        load(str(tiny_folder), dtype="float64", quantization="8bit")
    values = settings(tiny_folder, tiny_folder)
    values["model"] |= {"quantization": "8bit", "dtype": "float64"}
    with pytest.raises(UserError, match=r"^model\.quantization=8bit: not available with model\.dtype=float64"):
        Experiment(**values)
