"""Texts as vectors, computed by the base model itself: no second model is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mira.adapters.reach import plainly

_LONGEST = 512  # tokens; the rest of a text is not read


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Embed each text as the mean over tokens of the last hidden state: [n,d] float32. No adapter, and eager attention."""
    rows = []
    with plainly(model):
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=_LONGEST, verbose=False)["input_ids"]
            rows.append(
                _last(model, torch.tensor([ids or [tokenizer.eos_token_id]], device=model.device)).mean(0).cpu()
            )
    return torch.stack(rows)


def _last(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The last hidden state of ``tokens`` [1,T]: [T,d] float32. Not every model names its body without the head."""
    if model.base_model is not model:
        return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0].float()  # type: ignore[no-any-return]
    return model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[-1][0].float()  # type: ignore[no-any-return]
