"""Quantised base models with bitsandbytes: NF4 (Dettmers et al., "QLoRA", 2023), or the weights of LLM.int8 (Dettmers et al.,
2022) with one scale for each row. In both, products are computed in the model's precision."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig, PreTrainedModel

from mira.core.errors import UserError

Quantization = Literal["none", "4bit", "8bit"]


def needed_for(quantization: Quantization) -> tuple[str, ...]:
    """The libraries that influence numbers, beside those that every run needs."""
    return () if quantization == "none" else ("bitsandbytes",)


def loading(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options of ``from_pretrained`` that quantise the linear layers, except the head, while they are loaded.

    Raises UserError with float64, or where bitsandbytes is not installed.
    """
    if quantization == "none":
        return {}
    if dtype == torch.float64:
        raise UserError(
            f"model.quantization={quantization}: computes in float32, bfloat16 or float16; set model.dtype to one"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization={quantization}: bitsandbytes is missing; pip install 'mira-fl[quantized]'")
    # It warns, when imported, of kernels that it does not find on the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        settings = {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }  # fmt: skip
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}


def quantization_of(model: PreTrainedModel) -> Quantization:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4bit"
    return "8bit" if getattr(model, "is_loaded_in_8bit", False) else "none"


def check(model: PreTrainedModel, asked: Quantization, name: str) -> None:
    """Raise UserError where the weights are stored in another quantisation than ``asked``."""
    found = quantization_of(model)
    stored = found != "none" or getattr(model, "is_quantized", False)
    if found != asked or stored != (asked != "none"):
        fix = f"set model.quantization={found}" if found != "none" else "give the unquantised model"
        raise UserError(f"model.quantization={asked}: the weights of {name} are stored quantised; {fix}")


def settle(model: nn.Module) -> None:
    """Use one product for training and evaluation, whatever else is in a pass.

    Without gradients, bitsandbytes repacks 4-bit weights on some CPUs for a product in bf16, which has no gradient. Its 8-bit
    product also rounds the activations, except in columns with an outlier of any token: a client's result would depend on the
    other clients in the pass (by 0.08 of the logits on SmolLM2-135M).
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.init_8bit_state()  # the module then holds the scales, and copies of it do too
            vars(module)["forward"] = MethodType(_eight_bit, module)


def _eight_bit(module: Any, x: Tensor) -> Tensor:
    return _EightBit.apply(x, module.weight.data, module.state.SCB, module.bias)  # type: ignore[no-any-return, no-untyped-call]


class _EightBit(torch.autograd.Function):
    """W·x + b in the precision of x. W [out,in] is dequantised from int8 and one scale for each row, in the backward pass
    again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return linear(x, _dequantised(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        return grad @ _dequantised(weight, scale, grad.dtype), None, None, None


def _dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_((scale / 127)[:, None])
