"""A model that answers right is measured right: exact match and loss before training are what transformers gives of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.chat_templates import FAMILIES, make
from mira import Experiment, run
from mira.config import load
from mira.data.federation import make_federation
from mira.data.types import Example

Turns = list[dict[str, str]]
SUMS = [(f"{a} and {b} make", str(a + b)) for a in range(4) for b in range(4)]
NAMES = ("end of turn is not end of text (Gemma 2)", "tokens that swallow line breaks (Phi-3)")


def turns(question: str, answer: str) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def trained(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A tiny model that knows the sums, taught on whole conversations with another turn after them, as chat models are."""
    torch.manual_seed(0)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (FAMILIES[name].eos, *FAMILIES[name].stops)]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.05, tie_word_embeddings=True,
            eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    talks = [[*turns(*one), {"role": "user", "content": "How are you?"}] for one in SUMS]
    ids = [tokenizer.apply_chat_template(talk, return_dict=False) for talk in talks]
    tokens, mask = padded(ids, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(250):
        loss = model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def padded(ids: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, ids))
    tokens = torch.tensor([[*one, *[pad] * (width - len(one))] for one in ids])
    return tokens, torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])


@torch.no_grad()
def of_transformers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> tuple[float, float]:
    """Exact match of ``generate`` with the model's own settings, and the loss of the answers with their ends."""
    right, nll, count = 0, 0.0, 0
    for example in examples:
        talk = turns(example.instruction, example.output)
        asked = tokenizer.apply_chat_template(
            talk[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        start = asked["input_ids"].shape[1]
        out = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, start:]
        right += tokenizer.decode(out, skip_special_tokens=True).strip() == example.output
        whole = tokenizer.apply_chat_template(talk, return_dict=False)
        ends = [n for n, token in enumerate(whole) if n > start and token in model.generation_config.eos_token_id]
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(start, ends[0] + 1)
        nll -= sum(float(logits[n - 1, whole[n]]) for n in places)
        count += len(places)
    return [right / len(examples), nll / count]


@pytest.mark.parametrize("name", NAMES)
def test_before_training_a_client_has_the_loss_and_the_answers_that_transformers_gives(
    name: str, tmp_path: Path
) -> None:
    tokenizer = make(name)
    model = trained(name, tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    for client in ("a", "b"):
        lines = [json.dumps({"instruction": question, "output": answer}) for question, answer in SUMS]
        (data / f"{client}.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "rounds": 1, "model": {"name": str(tmp_path / "model")}, "adapter": {"rank": 2}, "graph": {"name": "complete"},
        "data": {"source": "jsonl", "path": str(data)}, "split": {"train": 6, "validation": 2, "test": 8},
        "training": {"lr": 1e-6, "local_steps": 1, "batch_size": 2}, "engine": {"threads": 1},
        "evaluation": {"max_new_tokens": 8, "transfer_clients": 0},
    }  # fmt: skip
    result = run(Experiment(**values), tmp_path / "run")
    experiment = load(tmp_path / "run" / "config.yaml")
    clients = make_federation(experiment.data, experiment.split, experiment.seed).clients
    for client, found in zip(clients, result["clients"], strict=True):
        right, loss = of_transformers(model, tokenizer, client.test)
        assert right == 1.0, "the model knows the sums"
        assert found["exact_match_start"] == right
        assert found["loss_start"] == pytest.approx(loss, rel=1e-4)
