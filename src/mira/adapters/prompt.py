"""P-tuning: trained virtual tokens in front of every sequence, computed by a small encoder.

Liu et al., "GPT Understands, Too", 2021 (P-tuning), with the MLP encoder of PEFT's PromptEncoder. The encoder's weights are part
of the row, so rows are mixed and trained further, never the prompts computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file, save_file
from torch import Tensor

from mira.adapters.peft_files import HEADER, PROMPT_ROW, WEIGHTS, write_base
from mira.adapters.types import BaseLike, SingleAdapterModel
from mira.adapters.virtual import encode
from mira.core.errors import UserError
from mira.core.layout import Entry, Factor, Layout, end_to_end
from mira.core.pydantic_config import STRICT, Count
from mira.core.seeds import generator

if TYPE_CHECKING:
    from peft import PromptEncoderConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VirtualPrompt:
    """P-tuning (Liu et al. 2021): trained virtual tokens in front of every sequence, computed by an MLP of two hidden layers."""

    kind: Literal["prompt"] = "prompt"
    virtual_tokens: Count = 20
    """Number of virtual tokens; the model's positions must leave room for them."""
    encoder_hidden: Count = 128
    """Width of the MLP, whose weights are part of the adapter."""
    start: Annotated[str, Field(min_length=1)] | None = None
    """An exported prompt that all clients start from: its folder, or its name on the model hub. Sizes and base must be the run's.
    null: a new one."""

    def smallest(self) -> Layout:
        return Layout((Entry("embedding.weight", "prompt", (self.virtual_tokens, 1), 0),))

    def layout(self, model: PreTrainedModel) -> Layout:
        """The row layout on ``model``, named as in PEFT's PromptEncoder: embeddings [V,d], then an MLP d → h → h → d."""
        (_, width), hidden = model.get_input_embeddings().get_parameter("weight").shape, self.encoder_hidden
        tensors: list[tuple[str, Factor, tuple[int, ...]]] = [
            ("embedding.weight", "prompt", (self.virtual_tokens, width))
        ]
        for layer, fan_in, fan_out in ((0, width, hidden), (2, hidden, hidden), (4, hidden, width)):
            tensors.append((f"mlp_head.{layer}.weight", "encoder", (fan_out, fan_in)))
            tensors.append((f"mlp_head.{layer}.bias", "encoder", (fan_out,)))
        return Layout(end_to_end(tensors))

    def on(self, base: BaseLike, seed: int) -> PromptAdapter:
        return PromptAdapter(base.model, self.layout(base.model), base, self.start)


@plain_dataclass(frozen=True)
class PromptAdapter:
    """A prompt on ``model``, which is that of ``base`` where one is given. ``given``: the exported prompt to start from."""

    model: PreTrainedModel
    layout: Layout
    base: BaseLike | None = None
    given: str | None = None
    dropout: float = 0.0
    directions: None = None

    @property
    def in_pass(self) -> PromptAdapter:
        return self

    def start(self, seed: int) -> Tensor:
        if self.given is not None and self.base is not None:
            return start_of(self.given, self.layout, self.base)
        return start_row(self.layout, seed)

    def attached(self, model: PreTrainedModel) -> SingleAdapterModel:
        from peft import get_peft_model

        peft = get_peft_model(model, peft_config(self.layout, None, inference=False))
        if model.dtype == torch.float64:
            peft.prompt_encoder.double()  # PEFT makes it in fp32 on any base
        named = dict(peft.named_parameters())
        return SingleAdapterModel(
            peft, self.layout, [named[f"prompt_encoder.default.{entry.module}"] for entry in self.layout.entries]
        )

    def save(self, folder: Path, row: Tensor, base_name: str) -> None:
        to_peft(folder, row, self.layout, base_name, self.base)

    @contextmanager
    def merged(self, row: Tensor) -> Iterator[PreTrainedModel]:
        raise UserError("--merge: a prompt is input and changes no weights; export the adapter alone")
        yield self.model


def start_row(layout: Layout, seed: int) -> Tensor:
    """Draw the common start row [P], float32, as PEFT's PromptEncoder does: embeddings normal, weights and biases of each linear
    layer uniform in ±1/√in."""
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


def start_of(given: str, layout: Layout, base: BaseLike) -> Tensor:
    """The row [P] of the exported prompt ``given``. Raises UserError, one line with the way out, where it does not fit."""
    from mira.adapters.pretrained import Pretrained  # the configuration is read without the hub's library

    found = Pretrained.find(given)
    found.check("P_TUNING", base)
    hidden = layout.entries[1].shape[0]
    for key, there, here in (
        ("virtual_tokens", found.settings.get("num_virtual_tokens"), layout.virtual_tokens),
        ("encoder_hidden", found.settings.get("encoder_hidden_size"), hidden),
    ):
        if there != here:
            raise found.refused(f"its {key} is {there}, and adapter.{key}={here}; set adapter.{key}={there}")
    try:
        return found.finite(from_peft(found.folder, layout))
    except UserError as error:
        raise found.refused(str(error).removeprefix(f"{found.folder}: ")) from None


def peft_config(layout: Layout, base_name: str | None, inference: bool) -> PromptEncoderConfig:
    """The PEFT config of ``layout``."""
    from peft import PromptEncoderConfig  # the configuration is read without PEFT

    (tokens, width), (hidden, _) = layout.entries[0].shape, layout.entries[1].shape
    return PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, token_dim=width, encoder_hidden_size=hidden,
        num_transformer_submodules=1, base_model_name_or_path=base_name, inference_mode=inference,
    )  # fmt: skip


def to_peft(folder: Path, row: Tensor, layout: Layout, base_name: str, base: BaseLike | None = None) -> None:
    """Write ``row`` [P] as a PEFT folder. PEFT keeps only the computed prompt; the row itself is in a file beside it that PEFT
    does not read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {entry.module: entry.view(row).contiguous().cpu() for entry in layout.entries}
    prompt = encode(list(tensors.values())).float()
    save_file({"prompt_embeddings": prompt}, folder / WEIGHTS, metadata=HEADER)
    if base is not None:
        write_base(folder, base)
    save_file(tensors, folder / PROMPT_ROW, metadata={"format": "pt"})
    peft_config(layout, base_name, inference=True).save_pretrained(str(folder))


def from_peft(folder: Path, layout: Layout) -> Tensor:
    """Read the row [P] that ``to_peft`` wrote. Raises UserError where it does not fit ``layout``, or PEFT itself wrote the
    folder."""
    if not (folder / PROMPT_ROW).is_file():
        raise UserError(
            f"{folder}: has no {PROMPT_ROW}; PEFT keeps only the computed prompt, and training needs its encoder"
        )
    tensors = load_file(folder / PROMPT_ROW)
    for entry in layout.entries:
        given = tuple(tensors[entry.module].shape) if entry.module in tensors else "missing"
        if given != entry.shape:
            raise UserError(
                f"{folder}: tensor '{entry.module}' is {given}, expected {entry.shape}; another adapter or base model?"
            )
    return torch.cat([tensors[entry.module].flatten() for entry in layout.entries])
