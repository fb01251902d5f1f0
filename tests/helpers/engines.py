"""A small federation of random tokens, and the engines on it: what the contract tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.tiny_models import EOS, PAD, VOCABULARY, make_tiny
from mira.adapters import prompt
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, start_row
from mira.adapters.prompt import PromptAdapter, VirtualPrompt
from mira.adapters.types import PassAdapter, Unadapted
from mira.core.layout import Layout
from mira.core.seeds import generator
from mira.core.training import Training
from mira.data.text import Encoded
from mira.engine.batched import BatchedEngine
from mira.engine.reference import ReferenceEngine
from mira.engine.spec import EngineSpec, Text


@dataclass(frozen=True)
class RandomCorpus:
    """Clients with unlike numbers of steps and sequences of unlike lengths; each client's sequences share a prefix."""

    steps: tuple[int, ...]
    batch: int = 3
    prefix: int = 12
    seed: int = 0

    def _sequences(self, count: int, *key: object) -> list[Encoded]:
        draw = generator("corpus", self.seed, *key)
        shared = generator("prefix", self.seed, key[1])
        head = torch.randint(3, 128, (self.prefix,), generator=shared).tolist()
        out = []
        for _ in range(count):
            body = int(torch.randint(1, 15, (), generator=draw))
            answer = int(torch.randint(1, 8, (), generator=draw))
            tail = torch.randint(3, 128, (body + answer,), generator=draw).tolist()
            out.append(Encoded(tuple(head + tail), (False,) * (self.prefix + body) + (True,) * answer, False))
        return out

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        return [self._sequences(self.batch, "train", client, round, step) for step in range(self.steps[client])]

    def encoded(self, client: int, split: str, limit: int | None = None) -> Sequence[Encoded]:
        return self._sequences(4 + client, split, client)[:limit]

    def prompts(self, client: int, split: str, limit: int | None = None) -> Sequence[tuple[int, ...]]:
        return [s.tokens[: s.label.index(True)] for s in self.encoded(client, split, limit)]

    def num_train(self, client: int) -> int:
        return 10 + client


@cache
def layout_on(kind: str, rank: int = 4) -> Layout:
    targets = ("c_attn", "c_proj") if kind == "gpt2" else ("q_proj", "v_proj", "down_proj")
    return Lora(rank=rank, alpha=8.0, targets=targets).layout(make_tiny(kind))


@cache
def prompt_on(kind: str, virtual_tokens: int = 5) -> Layout:
    return VirtualPrompt(virtual_tokens=virtual_tokens, encoder_hidden=16).layout(make_tiny(kind))


def adapter_of(model: PreTrainedModel, layout: Layout, dropout: float = 0.0) -> PassAdapter:
    """The adapter of ``layout`` on ``model``, as an engine takes it."""
    if not layout.entries:
        return Unadapted()
    return PromptAdapter(model, layout) if layout.virtual_tokens else LoraAdapter(model, layout, dropout)


def warm_row(layout: Layout, seed: int = 0) -> Tensor:
    """A start row whose B is not zero, so that gradients of A are there from the first step; a prompt starts warm."""
    if layout.virtual_tokens:
        return prompt.start_row(layout, seed)
    row = start_row(layout, seed)
    for entry in layout.entries:
        if entry.factor == "B":
            entry.view(row).normal_(0, 0.05, generator=generator("warm", seed, entry.module))
    return row


def numbers(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


TEXT = Text(VOCABULARY[PAD], frozenset([VOCABULARY[EOS]]), numbers)


def make_engine(
    name: str, kind: str, corpus: Any, training: Training, dtype: torch.dtype = torch.float32, **options: Any
) -> BatchedEngine | ReferenceEngine:
    layout = options.pop("layout", None) or layout_on(kind)
    model = options.pop("model", None) or make_tiny(kind, dtype)
    adapter, checkpointing = adapter_of(model, layout, options.pop("dropout", 0.0)), options.pop("checkpointing", False)
    spec = EngineSpec(model, TEXT, adapter, corpus, training, 0, checkpointing)
    if name == "reference":
        return ReferenceEngine.of(spec)
    return BatchedEngine.of(
        spec,
        tokens_per_pass=options.get("tokens_per_pass", 4096),
        prefix=options.get("prefix", True),
        cuda_graphs=options.get("cuda_graphs", True),
    )
