"""Models of known shapes with random weights, and clients with random tokens: what a GPU is timed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.workload import LR, Workload
from mira.adapters.lora import Lora
from mira.adapters.lora_peft import LoraAdapter, start_row
from mira.core.seeds import generator
from mira.core.training import Training
from mira.data.text import Encoded
from mira.engine.batched import BatchedEngine
from mira.engine.spec import EngineSpec, Text

STEPS = 2  # of every client in a round
# Shapes of SmolLM2-135M, of the LLaMA-1.3B of the paper, and of Llama 2 7B.
SHAPES = {
    "135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "1.3B": LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False,
    ),
    "7B": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, tie_word_embeddings=False,
    ),
}  # fmt: skip
TINY = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


@dataclass(frozen=True)
class Crowd:
    """Clients, each with ``batch`` sequences a step of ``shortest`` to ``longest`` tokens."""

    clients: int
    batch: int
    longest: int
    shortest: int

    @staticmethod
    def even(clients: int, batch: int, length: int) -> Crowd:
        return Crowd(clients, batch, length, length)

    @property
    def tiny(self) -> Crowd:
        """A few clients and tokens, even where this crowd is even."""
        return Crowd(3, 2, 24, 24 if self.shortest == self.longest else 16)

    def __str__(self) -> str:
        length = f"{self.longest}" if self.shortest == self.longest else f"{self.shortest}–{self.longest}"
        return f"{self.clients} × ({self.batch} × {length})"


@dataclass(frozen=True)
class RandomTokens:
    """In the place of a corpus. Half of the shortest sequence is the same in all of a client's, as an instruction is; the last
    eighth of each is the answer."""

    crowd: Crowd
    vocabulary: int

    @property
    def num_clients(self) -> int:
        return self.crowd.clients

    def num_train(self, client: int) -> int:
        return self.crowd.batch

    def batches(self, round: int, client: int) -> list[list[Encoded]]:
        return [self._batch(client, step) for step in range(STEPS)]

    def _batch(self, client: int, step: int) -> list[Encoded]:
        crowd, draw = self.crowd, generator("gpu", client, step)
        shared = crowd.shortest // 2
        tokens = torch.randint(self.vocabulary, (crowd.batch, crowd.longest), generator=draw)
        tokens[:, :shared] = tokens[0, :shared]
        tokens[:, shared] = torch.arange(crowd.batch)  # where the common tokens end, for certain
        lengths = torch.randint(crowd.shortest, crowd.longest + 1, (crowd.batch,), generator=draw).tolist()
        return [
            Encoded(tuple(line[:n]), tuple(place >= n - n // 8 for place in range(n)), False)
            for line, n in zip(tokens.tolist(), lengths, strict=True)
        ]


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Made on the device in its precision: drawing 7 billion numbers on a CPU takes minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model: PreTrainedModel = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).eval()
    return model


def random_workload(model: PreTrainedModel, crowd: Crowd) -> Workload:
    layout = Lora(rank=16, alpha=32.0, targets=("q_proj", "v_proj")).layout(model)
    corpus: Any = RandomTokens(crowd, model.config.vocab_size)
    engine = BatchedEngine.of(
        EngineSpec(
            model, Text(0, frozenset([0]), str), LoraAdapter(model, layout), corpus,
            Training(lr=LR, local_steps=STEPS, batch_size=crowd.batch, clip=None), 0,
        ),
        longest=crowd.longest,
    )  # fmt: skip
    return Workload.of(engine, start_row(layout, 0))
