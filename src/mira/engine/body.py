"""A model in two parts, as the model itself calls them: the body computes hidden states, the head computes logits from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from mira.adapters.attach import Attached, Forward
from mira.engine.attention.hook import current_attention, using_attention
from mira.engine.attention.packed import Attention, PackedAttention
from mira.engine.attention.padded import PaddedBatches
from mira.engine.model_errors import MODEL_ERRORS, is_not_model_error

Head = Callable[[Tensor], Tensor]


def usual_tokens(model: PreTrainedModel) -> Tensor:
    """Token ids without a special meaning."""
    config = model.config
    named = [
        value for one in (config, config.get_text_config()) for name, value in vars(one).items() if "token_i" in name
    ]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    size = int(config.get_text_config().vocab_size)
    return torch.tensor([token for token in range(min(size, 1024)) if token not in special])


@dataclass(frozen=True)
class Body:
    """``module`` computes the hidden states. ``padded``: sequences reach it in padded batches, with the model's own attention,
    since nothing else gives the model's results. ``token`` []: a token id without a special meaning."""

    model: PreTrainedModel
    module: nn.Module
    output: type[ModelOutput]
    attached: Attached
    token: Tensor
    padded: bool = False
    here: threading.local = field(default_factory=threading.local)

    @staticmethod
    @torch.no_grad()
    def of(model: PreTrainedModel, attached: Attached) -> Body:
        """Find the body by calling the model: the outermost module within it that returns hidden states."""
        found: list[tuple[nn.Module, type[ModelOutput]]] = []

        def note(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, ModelOutput) and isinstance(getattr(out, "last_hidden_state", None), Tensor):
                found.append((module, type(out)))

        hooks = [module.register_forward_hook(note) for module in model.modules() if module is not model]
        try:
            token = usual_tokens(model)[0].to(model.device)
            model(input_ids=token.expand(1, 2), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        module, output = found[-1]
        body = Body(model, module, output, attached, token)
        attached.patch_forward(module, body._with_given_states)
        return body

    def __call__(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Last hidden states [B,L,d] of ``ids`` and ``positions`` [B,L]."""
        if self.padded and isinstance(attention, PackedAttention):
            return self._padded_forward(ids, attention)
        with using_attention(attention):
            out = self.module(input_ids=ids, position_ids=positions, use_cache=False)
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _padded_forward(self, ids: Tensor, packed: PackedAttention) -> Tensor:
        batches = self.batches(packed, ids.device)
        outs = []
        for batch in batches.batches:
            mask = batch.real.long()
            with self.using(batch.adapters):
                out = self.module(input_ids=batch.split(ids), attention_mask=mask, use_cache=False)
            outs.append(out.last_hidden_state)
        return batches.joined(outs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N,V] of hidden states [N,d], by the model's own forward with these in the place of its body's result."""
        self.here.given = hidden[None]
        try:
            return self.model(input_ids=self.token.expand(1, 1), use_cache=False).logits[0]  # type: ignore[no-any-return]
        finally:
            self.here.given = None

    def head(self, hidden: Tensor) -> Head:
        """The fastest head that gives the model's own logits of ``hidden`` [N,d]: the output embeddings alone, or ``logits``.

        Tried also on large hidden states, where a cap on the logits shows.
        """
        plain = self.model.get_output_embeddings()
        if plain is None:
            return self.logits
        try:
            size = plain(hidden).abs().amax().clamp(min=1e-6)
        except (
            MODEL_ERRORS
        ) as error:  # the model's own forward may convert hidden states to the precision of the weights
            if is_not_model_error(error):
                raise
            return self.logits
        same = all(torch.equal(plain(x), self.logits(x)) for x in (hidden, hidden / size, hidden * (100 / size)))
        return plain if same else self.logits

    def pad_mixer(self, mixer: nn.Module) -> None:
        """Patch ``mixer``: the sequences of a pass reach it in padded batches."""

        def patch(plain: Forward) -> Forward:
            def forward(*args: Any, **kwargs: Any) -> Any:
                packed = current_attention()
                if not isinstance(packed, PackedAttention):
                    return plain(*args, **kwargs)
                return self._padded_mixer(plain, packed, args, kwargs)

            return forward

        self.attached.patch_forward(mixer, patch)

    def _padded_mixer(self, plain: Forward, packed: PackedAttention, args: Any, kwargs: Any) -> Any:
        total = packed.segments[-1].end
        batches = self.batches(packed, self.model.device)
        outs = []
        for batch in batches.batches:

            def split(x: Any, batch: Any = batch) -> Any:
                return batch.split(x) if isinstance(x, Tensor) and x.shape[:2] == (1, total) else x

            with self.using(batch.adapters):
                outs.append(plain(*tree_map(split, args), **tree_map(split, kwargs)))
        if isinstance(outs[0], Tensor):
            return batches.joined(outs)
        return (batches.joined([out[0] for out in outs]), *(None for _ in outs[0][1:]))

    def batches(self, packed: PackedAttention, device: torch.device) -> PaddedBatches:
        """The padded batches of a pass, laid out once for all its layers."""
        if packed.batches is None:
            packed.batches = PaddedBatches.of(packed.segments, self.attached.adapters, device)
        return packed.batches

    @contextmanager
    def using(self, adapters: Any) -> Iterator[None]:
        with nullcontext() if adapters is None else self.attached.using(adapters):
            yield

    def _with_given_states(self, plain: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = getattr(self.here, "given", None)
            return plain(*args, **kwargs) if given is None else self.output(last_hidden_state=given)

        return forward
