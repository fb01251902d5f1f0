"""A trial pass before a run, for errors of a model that only show with adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from mira.adapters.attach import Attached
from mira.adapters.lowrank import AdapterBatch
from mira.adapters.peft_check import trial_row
from mira.core.layout import Layout
from mira.engine.attention.hook import CannotPackError, temporary_attention
from mira.engine.attention.packed import PackedAttention
from mira.engine.attention.patching import SAME, difference, limit
from mira.engine.attention.segment import Segment
from mira.engine.body import Body, usual_tokens
from mira.engine.model_errors import raise_as, unsupported

_LENGTH = 4  # tokens of a sequence


@torch.no_grad()
def try_adapters(body: Body, attached: Attached, layout: Layout) -> None:
    """Raise UserError where a layer cannot carry an adapter, or where a token is more to the model than its embedding."""
    _check_experts(body, attached, layout)
    device = body.model.device
    ids = body.token.expand(1, _LENGTH)
    with (
        attached.using(AdapterBatch(torch.zeros(1, layout.size, device=device), [(0, 0, _LENGTH)])),
        raise_as(unsupported(layout)),
    ):
        body(ids, torch.arange(_LENGTH, device=device)[None], PackedAttention([Segment(0, _LENGTH)]))
    if layout.virtual_tokens:
        with raise_as(unsupported(layout)):
            _check_embeddings(body, ids)


def _check_experts(body: Body, attached: Attached, layout: Layout) -> None:
    """Raise CannotPackError where a pass of two clients does not compute each client's tokens with its own experts."""
    if not layout.experts:
        return
    model = body.model

    def cannot(reason: str) -> CannotPackError:
        return CannotPackError(f"architecture '{model.config.model_type}' gives its experts other tokens ({reason})")

    row = trial_row(model, layout).to(model.device, torch.promote_types(model.dtype, torch.float32))
    rows, usual = torch.stack([row, torch.zeros_like(row)]), usual_tokens(model)
    ids = usual[torch.arange(2 * _LENGTH) % len(usual)].to(model.device)[None]
    places = torch.arange(_LENGTH, device=ids.device).repeat(2)[None]
    segments = [Segment(0, _LENGTH), Segment(_LENGTH, 2 * _LENGTH)]
    ranges = [(client, s.start, s.end) for client, s in enumerate(segments)]
    with raise_as(cannot):
        with attached.using(AdapterBatch(rows, ranges)):
            together = body(ids, places, PackedAttention(segments))[0]
        with attached.using(AdapterBatch(rows, ranges[:1])):
            first = body(ids[:, :_LENGTH], places[:, :_LENGTH], PackedAttention(segments[:1]))[0]
        second = body(ids[:, _LENGTH:], places[:, _LENGTH:], PackedAttention(segments[:1]))[0]  # whose row is 0
    error = difference(together, torch.cat([first, second]))
    if not error <= limit(model, SAME):
        raise cannot(f"relative difference {error:.2g}")


def _check_embeddings(body: Body, ids: Tensor) -> None:
    """Raise CannotPackError where a token is more to the model than its embedding: a virtual token has nothing else."""
    embeddings = body.model.get_input_embeddings()
    with temporary_attention(body.model, "eager"):
        found = body.module(inputs_embeds=2 * embeddings(ids), use_cache=False).last_hidden_state[0]
        hook = embeddings.register_forward_hook(lambda module, given, out: 2 * out)
        try:
            known = body.module(input_ids=ids, use_cache=False).last_hidden_state[0]
        finally:
            hook.remove()
    if not difference(found, known) <= limit(body.model, SAME):
        where = f"architecture '{body.model.config.model_type}'"
        raise CannotPackError(f"{where} reads more of a token than its embedding, which virtual tokens do not have")
