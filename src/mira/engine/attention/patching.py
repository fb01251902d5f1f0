"""The choice of the way to compute a model's passes, verified against the model's own output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mira.adapters.attach import Attached
from mira.adapters.lowrank import AdapterBatch
from mira.engine.attention import hook
from mira.engine.attention.decoding import after
from mira.engine.attention.hook import CannotPackError, set_attention
from mira.engine.attention.packed import PackedAttention
from mira.engine.attention.segment import Segment
from mira.engine.attention.token_mixers import find_token_mixers
from mira.engine.body import Body, Head, usual_tokens
from mira.engine.generate import positions
from mira.engine.model_errors import MODEL_ERRORS, is_not_model_error, raise_as
from mira.engine.watch import PassBehaviour, watch

_LONGEST = 1024  # tokens of a probe's first sequence
_SHORT = 6  # tokens of its other sequences
# Sequences for the test of causality: a few short ones, or a single one of more tokens.
_FEW, _MIDDLE = 4, 96
_LENGTH = 4  # of the probe for the last MLP; short, so that a leak from the token before shows
# Relative difference of one token's hidden state. bf16 rounds at 2⁻⁸ in every layer (0.02 on SmolLM2); a leak or a missing term
# changes some token by tenths or more. The same pass with one sequence changed may differ by the rounding of others only.
SAME = {torch.bfloat16: 0.2, torch.float16: 0.2}
_LEAK = {torch.bfloat16: 0.01, torch.float16: 0.01}
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class _Leak(CannotPackError):
    """Raised where a sequence changes with another one, possibly by rounding only."""


@dataclass(frozen=True)
class PatchedModel:
    """A model whose passes are computed by MIRA.

    ``kind``: 'packed'; 'packed, mixers padded', where sequences reach some modules in padded batches; or 'padded', where they
    reach the whole model so. ``decodes``: answers can be generated from packed prompts. ``one_at_a_time``: passes cannot run in
    parallel, since modules keep tensors between calls.
    """

    body: Body
    head: Head
    kind: str
    decodes: bool
    one_at_a_time: bool


@dataclass(frozen=True)
class _Probe:
    """Three sequences, of which two share a prefix, and the model's own output for them.

    ``shared``: tokens of the prefix. ``alone``: hidden states of each sequence, with one more token than a pass has of it.
    ``logits`` [n,V]: of the last sequence.
    """

    sequences: tuple[Tensor, ...]
    shared: int
    alone: tuple[Tensor, ...]
    logits: Tensor

    @staticmethod
    def of(body: Body, longest: int, most: int = _LONGEST) -> _Probe:
        sequences, shared = _sequences(body.model, min(longest, most))
        alone = tuple(body.module(input_ids=one[None], use_cache=False).last_hidden_state[0] for one in sequences)
        return _Probe(sequences, shared, alone, body.model(input_ids=sequences[-1][None], use_cache=False).logits[0])

    @property
    def segments(self) -> list[Segment]:
        a, b, c = (len(one) - 1 for one in self.sequences)
        p = self.shared
        ends = [p, a, a + b - p, a + b - p + c]
        return [Segment(0, p), Segment(p, ends[1], 0, p), Segment(ends[1], ends[2], 0, p), Segment(ends[2], ends[3])]

    def read(self, body: Body, changed: bool = False) -> tuple[Tensor, PackedAttention]:
        """Hidden states [T,d] of the packed pass. ``changed``: with other tokens of the first sequence after the prefix."""
        a, b, c = (one[:-1] for one in self.sequences)
        own = a[self.shared :].flip(0) if changed else a[self.shared :]
        tokens = torch.cat([a[: self.shared], own, b[self.shared :], c])
        places = [torch.arange(s.prefix, s.prefix + s.end - s.start) for s in self.segments]
        packed = PackedAttention(self.segments, keep=True)
        return body(tokens[None], torch.cat(places).to(tokens.device)[None], packed)[0], packed

    def wanted(self) -> Tensor:
        """The model's own hidden states [T,d] for the tokens of the pass."""
        a, b, c = (one[:-1] for one in self.alone)
        return torch.cat([a, b[self.shared :], c])


@torch.no_grad()
def patch_attention(model: PreTrainedModel, attached: Attached, longest: int) -> PatchedModel:
    """Patch ``model`` so that packed passes give its own results: the first kind that does, for sequences of ``longest`` tokens.

    Raises CannotPackError where there is none, and restores the model's attention.
    """
    usual = model.config._attn_implementation
    try:
        return _patch(model, attached, longest)
    except CannotPackError as error:
        set_attention(model, usual)
        raise CannotPackError(f"architecture '{model.config.model_type}' {error.reason}") from None


def _patch(model: PreTrainedModel, attached: Attached, longest: int) -> PatchedModel:
    usual = model.config._attn_implementation
    if getattr(model.config, "is_encoder_decoder", False):
        raise CannotPackError("has an encoder, which the engine does not feed")
    set_attention(model, "eager")  # every architecture has it; another engine may have set its own
    body = _tried(Body.of, model, attached)
    behaviour = _tried(watch, body, longest)
    probe = _tried(_Probe.of, body, longest)
    hook.register()
    set_attention(model, hook.NAME)
    try:
        kind, hidden, packed = _packed(body, probe, behaviour)
    except CannotPackError:
        set_attention(model, "eager" if usual == hook.NAME else usual)
        body, kind = replace(body, padded=True), "padded"
        _tried(_check_order, body, longest)
        if longest > _LONGEST:  # sparse attention may choose only among more tokens than the probe has
            probe = _tried(_Probe.of, body, longest, longest)
        hidden, packed = _check(probe, body)
    head = _tried(body.head, probe.alone[-1])
    if not difference(head(hidden[-len(probe.logits) + 1 :]), probe.logits[:-1]) <= limit(model, SAME):
        raise CannotPackError("makes other logits of the same hidden states")
    return PatchedModel(body, head, kind, kind == "packed" and _decodes(body, probe, packed), behaviour.keeps_tensors)


def _check_order(body: Body, longest: int) -> None:
    """Raise CannotPackError where a token depends on later ones, as with a choice among all tokens."""
    draw = torch.Generator().manual_seed(1)
    usual = usual_tokens(body.model)
    length = max(2, min(longest, positions(body.model) - 1))
    some = usual[torch.randint(len(usual), (_FEW if length <= _MIDDLE else 1, length), generator=draw)].to(
        body.model.device
    )
    whole, part = (
        body.module(input_ids=ids, use_cache=False).last_hidden_state for ids in (some, some[:, : some.shape[1] // 2])
    )
    if not difference(whole[:, : part.shape[1]], part) <= limit(body.model, SAME):
        raise CannotPackError("lets a token see those behind it")


def _packed(body: Body, probe: _Probe, behaviour: PassBehaviour) -> tuple[str, Tensor, PackedAttention]:
    """The kind of packing that gives the model's own results, and the probe's pass: hidden states and attention."""
    if behaviour.numbers_tokens:
        raise CannotPackError("numbers the tokens of a pass itself")
    if behaviour.hides_keys:
        raise CannotPackError("hides other tokens than its attention is told")
    try:
        return "packed", *_check(probe, body)
    except CannotPackError as error:
        found = _tried(find_token_mixers, body, probe.sequences[0])
        if not found and isinstance(error, _Leak):  # no module mixes tokens; experts round differently in other company
            return "packed", *_check(probe, body, leaks=False)
        if not found:
            raise
        for mixer in found:
            body.pad_mixer(mixer)
        if _tried(find_token_mixers, body, probe.sequences[0]):
            raise
        return "packed, mixers padded", *_check(probe, body, leaks=False)


def _check(probe: _Probe, body: Body, leaks: bool = True) -> tuple[Tensor, PackedAttention]:
    """The hidden states [T,d] of the probe's pass, and its attention.

    Raises CannotPackError where they differ from the model's own or, with ``leaks`` and in 16 bits, where one sequence changes
    with another.
    """
    together, packed = _tried(probe.read, body)
    if not (packed.calls or packed.batches):
        raise CannotPackError("has no attention that can be exchanged")
    error = difference(together, probe.wanted())
    if not error <= limit(body.model, SAME):
        raise CannotPackError(
            f"computes other hidden states when sequences share a pass (relative difference {error:.2g})"
        )
    if leaks and body.model.dtype in _LEAK:
        a, b = probe.shared, len(probe.sequences[0]) - 1
        leak = difference(*(torch.cat([x[:a], x[b:]]) for x in (probe.read(body, changed=True)[0], together)))
        if not leak <= _LEAK[body.model.dtype]:
            raise _Leak(f"lets sequences of a pass see each other (relative difference {leak:.2g})")
    return together, packed


def _decodes(body: Body, probe: _Probe, packed: PackedAttention) -> bool:
    """Tell whether decoding one more token of each sequence, from the pass's keys and values, gives the model's own result."""
    state = after(packed.segments[1:], packed.cache, 1)
    state.advance()
    tokens = torch.stack([one[-1:] for one in probe.sequences])
    places = torch.tensor([[len(one) - 1] for one in probe.sequences], device=tokens.device)
    try:
        found = body(tokens, places, state)[:, 0]
    except MODEL_ERRORS as error:
        if is_not_model_error(error):
            raise
        return False
    wanted = torch.stack([one[-1] for one in probe.alone])
    return difference(found, wanted) <= limit(body.model, SAME)


def _sequences(model: PreTrainedModel, longest: int) -> tuple[tuple[Tensor, ...], int]:
    """The sequences of the probe, and the number of tokens that the first two share."""
    usual = usual_tokens(model)
    length = max(2, min(longest, positions(model) - 1))
    short = min(_SHORT, length)
    draw = torch.Generator().manual_seed(0)
    a, b, c = (usual[torch.randint(len(usual), (n,), generator=draw)] for n in (length + 1, short + 1, short + 1))
    shared = length // 2
    b = torch.cat([a[:shared], b[: length + 1 - shared]])
    return tuple(one.to(model.device) for one in (a, b, c)), shared


def _tried(compute: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
    """The result of ``compute``; raises CannotPackError where the model fails."""
    with raise_as(lambda reason: CannotPackError(f"cannot be called as the engine calls it ({reason})")):
        return compute(*args, **kwargs)


@torch.no_grad()
def find_last_mlp(body: Body, attached: Attached, width: int) -> None:
    """Set ``attached.last`` to the gated MLP after which no token sees another, if there is one: it may skip unread tokens.

    The order of modules does not prove that the last one is: the hidden state of a needed token must stay the same.
    """
    if not attached.mlps or body.padded:
        return
    device = body.model.device
    row, needed = torch.zeros(1, width, device=device), torch.tensor([_LENGTH - 1])

    def hidden(last: nn.Module | None) -> Tensor:
        attached.last = last
        ids = torch.arange(_LENGTH, device=device)[None]
        try:
            with attached.using(AdapterBatch(row, [(0, 0, _LENGTH)], needed=needed)):
                return body(ids + 1, ids, PackedAttention([Segment(0, _LENGTH)]))[0]
        finally:
            attached.last = None

    whole, part = hidden(None), hidden(attached.mlps[-1])
    limit = 0.05 if body.model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if difference(part[needed], whole[needed]) <= limit:
        attached.last = attached.mlps[-1]


def limit(model: PreTrainedModel, limits: dict[torch.dtype, float]) -> float:
    return limits.get(model.dtype, 1e-3)


def difference(x: Tensor, y: Tensor) -> float:
    """Largest relative difference of a token; 0 where both are equal, also where both are 0, as a padding token may be."""
    x, y = x.double(), y.double()
    error = (x - y).norm(dim=-1)
    return float(torch.where(error == 0, error, error / y.norm(dim=-1)).max()) if len(x) else 0.0
