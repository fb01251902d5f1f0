"""The engine on the device against the oracle on the CPU in double precision: tiny models of several families."""

from __future__ import annotations

import traceback
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.first_look import Report
from mira.adapters.lora import Lora
from mira.core.training import Training
from mira.core.types import Work
from mira.engine.batched import BatchedEngine
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec, Text
from mira.model.base import norms_in_double

# Grouped heads, biases, a fused projection, windows, sinks, experts, latent attention, a recurrence.
FAMILIES = (
    "llama", "qwen2", "gpt2", "mistral", "gemma3_text", "qwen3", "phi3", "gpt_oss", "qwen3_moe", "deepseek_v3", "qwen3_5_text",
)  # fmt: skip
EXPERTS = ("gpt_oss", "qwen3_moe", "deepseek_v3")
SINGLE = ("gemma3_text", "qwen3_moe")  # compute a part in single precision whatever the model's
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TRAINING = Training(optimizer="sgd", lr=1e-2, local_steps=2)
ALLOWED = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 0.0,
}  # of a row's displacement, as in the contract tests
NOISE = 2  # times the error of the plain loop in the same precision


def measure(report: Report) -> None:
    device, tiny = torch.device(report.options.device), report.options.tiny
    cases: list[dict[str, Any]] = []
    for family in FAMILIES[:1] if tiny else FAMILIES:
        for dtype in DTYPES:
            case: dict[str, Any] = {"family": family, "dtype": str(dtype).removeprefix("torch.")}
            try:
                case |= _case(family, dtype, device)
            except Exception:
                case |= {"same": False, "error": traceback.format_exc(limit=-4)}
            cases.append(case)
            report.write(cases)


def _case(family: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Errors of the engine and of the plain loop, both in ``dtype`` on ``device``, relative to what the oracle moves."""
    exact = _in_double(family, _model(family, dtype))
    oracle = ReferenceEngine.of(_spec(family, exact))
    start = torch.stack([_engines().warm_row(oracle.spec.layout, seed) for seed in range(2)])
    start = start.to(torch.promote_types(dtype, torch.float32))
    wanted = oracle.train(Work(torch.arange(2), start.double()), 0, TRAINING.lr)
    of = partial(BatchedEngine.of, tokens_per_pass=4096, longest=48)
    ours = of(_spec(family, _on(device, family, dtype)))
    loop = ReferenceEngine.of(_spec(family, _on(device, family, dtype)))
    found, plain = (engine.train(Work(torch.arange(2), start), 0, TRAINING.lr) for engine in (ours, loop))
    errors = [_error(each.rows, wanted.rows, start) for each in (found, plain)]
    least = ALLOWED[torch.float32 if dtype == torch.float64 and family in SINGLE else dtype]
    allowed = max(least, NOISE * errors[1])
    return {
        "computed": ours.adapted.patched.kind, "engine": errors[0], "loop": errors[1], "allowed": allowed,
        "loss": float(((found.loss - wanted.loss) / wanted.loss).abs().max()), "same": errors[0] <= allowed,
    }  # fmt: skip


def _error(rows: Tensor, wanted: Tensor, start: Tensor) -> float:
    """Largest relative error of a row's displacement."""
    moved = (wanted.double() - start.double()).norm(dim=1)
    return float(((rows.double() - wanted.double()).norm(dim=1) / moved).max())


def _spec(family: str, model: PreTrainedModel) -> EngineSpec:
    engines = _engines()
    layout = Lora(rank=2, alpha=4.0, targets=tuple(_family(family).targets)).layout(model)
    text = Text(1, frozenset([0]), engines.numbers)
    corpus = engines.RandomCorpus((1, 2), batch=2)
    return EngineSpec(model, text, engines.adapter_of(model, layout), corpus, TRAINING, 0)


def _model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = import_module("helpers.model_families").build(_family(family), dtype)
    return _in_double(family, model) if dtype == torch.float64 else model


def _on(device: torch.device, family: str, dtype: torch.dtype) -> PreTrainedModel:
    model = _model(family, dtype)
    model.to(device=device)  # type: ignore[call-arg]
    return model


def _in_double(family: str, model: PreTrainedModel) -> PreTrainedModel:
    """Experts one by one: their product of all at once is not made for double precision."""
    if family in EXPERTS:
        model.set_experts_implementation("eager")
    norms_in_double(model.double())
    return model


def _family(name: str) -> Any:
    return next(one for one in import_module("helpers.model_families").FAMILIES if one.name == name)


def _engines() -> Any:
    return import_module("helpers.engines")  # of the tests
