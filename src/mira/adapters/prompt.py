"""P-tuning: virtual tokens in front of every sequence, the output of a small encoder that is trained with them.

Liu et al., "GPT Understands, Too", 2021 (P-tuning), with the MLP encoder of PEFT's PromptEncoder. The encoder's weights are
part of the row: rows are mixed and trained further as they are, never as the prompt computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from peft import PromptEncoderConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mira.adapters.virtual import encode
from mira.core.errors import UserError
from mira.core.layout import Factor, Layout, end_to_end
from mira.core.seeds import generator

ROW = "prompt_encoder.safetensors"  # beside PEFT's files, which hold the computed prompt alone


@dataclass(frozen=True)
class Prompt:
    """``virtual_tokens`` V of embeddings [V,d] through an MLP d → h → h → d, h = ``encoder_hidden``."""

    virtual_tokens: int
    encoder_hidden: int

    def layout(self, model: PreTrainedModel) -> Layout:
        """The row layout on ``model``, tensors named as in PEFT's PromptEncoder."""
        (_, width), hidden = model.get_input_embeddings().get_parameter("weight").shape, self.encoder_hidden
        tensors: list[tuple[str, Factor, tuple[int, ...]]] = [
            ("embedding.weight", "prompt", (self.virtual_tokens, width))
        ]
        for layer, fan_in, fan_out in ((0, width, hidden), (2, hidden, hidden), (4, hidden, width)):
            tensors.append((f"mlp_head.{layer}.weight", "encoder", (fan_out, fan_in)))
            tensors.append((f"mlp_head.{layer}.bias", "encoder", (fan_out,)))
        return Layout(end_to_end(tensors))


@dataclass(frozen=True)
class PromptAdapter:
    """A prompt on ``model``."""

    model: PreTrainedModel
    layout: Layout

    def start(self, seed: int) -> Tensor:
        return start_row(self.layout, seed)

    def save(self, folder: Path, row: Tensor, base_name: str) -> None:
        to_peft(folder, row, self.layout, base_name)

    @contextmanager
    def merged(self, row: Tensor) -> Iterator[PreTrainedModel]:
        raise UserError("--merge: a prompt is input, no change of the weights; export the adapter alone")
        yield self.model


def start_row(layout: Layout, seed: int) -> Tensor:
    """The common start row [P], float32, from the distributions of PEFT's PromptEncoder: E normal, and of each linear
    layer weights and biases uniform in ±1/√in."""
    row = torch.empty(layout.size)
    draw = generator("start", seed)
    fan_in = 1
    for entry in layout.entries:
        if entry.factor == "prompt":
            entry.view(row).normal_(generator=draw)
            continue
        fan_in = entry.shape[1] if len(entry.shape) == 2 else fan_in  # a bias follows its weight
        entry.view(row).uniform_(-1 / sqrt(fan_in), 1 / sqrt(fan_in), generator=draw)
    return row


def peft_config(layout: Layout, base_name: str | None, inference: bool) -> PromptEncoderConfig:
    """The PEFT config of ``layout``."""
    (tokens, width), (hidden, _) = layout.entries[0].shape, layout.entries[1].shape
    return PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, token_dim=width, encoder_hidden_size=hidden,
        num_transformer_submodules=1, base_model_name_or_path=base_name, inference_mode=inference,
    )  # fmt: skip


def to_peft(folder: Path, row: Tensor, layout: Layout, base_name: str) -> None:
    """Write ``row`` [P] as a PEFT folder. PEFT keeps and loads the computed prompt, not what it is computed from; that
    lies beside it, in a file PEFT does not read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {entry.module: entry.view(row).contiguous().cpu() for entry in layout.entries}
    prompt = encode(list(tensors.values())).float()
    save_file({"prompt_embeddings": prompt}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / ROW, metadata={"format": "pt"})
    peft_config(layout, base_name, inference=True).save_pretrained(str(folder))


def from_peft(folder: Path, layout: Layout) -> Tensor:
    """The row [P] that ``to_peft`` wrote. Raises UserError when it does not fit ``layout`` or was written by PEFT itself."""
    if not (folder / ROW).is_file():
        raise UserError(f"{folder}: has no {ROW}; PEFT keeps the computed prompt alone, from which no row can be made")
    tensors = load_file(folder / ROW)
    for entry in layout.entries:
        given = tuple(tensors[entry.module].shape) if entry.module in tensors else "nothing"
        if given != entry.shape:
            raise UserError(
                f"{folder}: tensor '{entry.module}' is {given}, expected {entry.shape}; another adapter or base model?"
            )
    return torch.cat([tensors[entry.module].flatten() for entry in layout.entries])
