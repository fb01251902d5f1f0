"""How the passes of a model are computed, and proof on the spot that they give what it gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mira.adapters.attach import Attached
from mira.adapters.lowrank import AdapterBatch
from mira.engine.attention import hook
from mira.engine.attention.decoding import after
from mira.engine.attention.hook import CannotPackError, set_attention
from mira.engine.attention.packed import PackedAttention, Segment
from mira.engine.attention.token_mixers import mixers
from mira.engine.body import Body, Head, usual_tokens
from mira.engine.generate import positions
from mira.engine.model_errors import MODEL_ERRORS, is_not_model_error, raise_as
from mira.engine.watch import PassBehaviour, watch

_LONGEST = 1024  # tokens of a probe's first sequence
_SHORT = 6  # of those beside it
_FEW, _MIDDLE = (
    4,
    96,
)  # sequences that show whether a token sees those behind it, of at most so many tokens; one of more
_LENGTH = 4  # of the probe for the last MLP; short, so that what leaks from the token before weighs
# Of one token's hidden state, relative. bf16 rounds at 2⁻⁸ in every layer (0.02 on SmolLM2); a leak or a missing term moves some
# token by tenths or more. Of the same pass with one sequence changed nothing but another's rounding may differ.
SAME = {torch.bfloat16: 0.2, torch.float16: 0.2}
_LEAK = {torch.bfloat16: 0.01, torch.float16: 0.01}
_Made = TypeVar("_Made")


class _Leak(CannotPackError):
    """Raised where a sequence changes with another, which may be rounding."""


@dataclass(frozen=True)
class PatchedModel:
    """``kind``: 'packed'; 'packed, mixers padded', whose sequences come to some of its modules padded; or 'padded', where all
    of the model is computed so. ``decodes``: packed prompts can be answered too. ``one_at_a_time``: passes go in turn,
    since modules keep what they computed."""

    body: Body
    head: Head
    kind: str
    decodes: bool
    one_at_a_time: bool


@dataclass(frozen=True)
class _Probe:
    """Three sequences, two of which share a prefix, as the model gives them by itself: hidden states ``alone`` of each, with one
    more token than a pass has of it, and the ``logits`` [n,V] of the last."""

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
        """Hidden states [T,d] of the pass. ``changed``: with other tokens of the first sequence behind the prefix."""
        a, b, c = (one[:-1] for one in self.sequences)
        own = a[self.shared :].flip(0) if changed else a[self.shared :]
        tokens = torch.cat([a[: self.shared], own, b[self.shared :], c])
        places = [torch.arange(s.prefix, s.prefix + s.end - s.start) for s in self.segments]
        packed = PackedAttention(self.segments, keep=True)
        return body(tokens[None], torch.cat(places).to(tokens.device)[None], packed)[0], packed

    def wanted(self) -> Tensor:
        a, b, c = (one[:-1] for one in self.alone)
        return torch.cat([a, b[self.shared :], c])


@torch.no_grad()
def patch_attention(model: PreTrainedModel, attached: Attached, longest: int) -> PatchedModel:
    """The first way that gives what the model gives by itself, of sequences of ``longest`` tokens. Raises CannotPackError and
    leaves the model's attention as it was, where there is none."""
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
    set_attention(model, "eager")  # which every architecture has; also where this is not the first engine
    body = _tried(lambda: Body.of(model, attached))
    seen = _tried(lambda: watch(body, longest))
    probe = _tried(lambda: _Probe.of(body, longest))
    hook.register()
    set_attention(model, hook.NAME)
    try:
        kind, hidden, packed = _packed(body, probe, seen)
    except CannotPackError:
        set_attention(model, "eager" if usual == hook.NAME else usual)
        body, kind = replace(body, padded=True), "padded"
        _tried(lambda: _check_order(body, longest))
        if longest > _LONGEST:  # a choice among more tokens than the probe has would not show
            probe = _tried(lambda: _Probe.of(body, longest, longest))
        hidden, packed = _check(probe, body)
    head = _tried(lambda: body.head(probe.alone[-1]))
    if not difference(head(hidden[-len(probe.logits) + 1 :]), probe.logits[:-1]) <= limit(model, SAME):
        raise CannotPackError("makes other logits of the same hidden states")
    return PatchedModel(body, head, kind, kind == "packed" and _decodes(body, probe, packed), seen.keeping)


def _check_order(body: Body, longest: int) -> None:
    """Raises CannotPackError where what a token becomes changes with those behind it, as in a choice among all tokens."""
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


def _packed(body: Body, probe: _Probe, seen: PassBehaviour) -> tuple[str, Tensor, PackedAttention]:
    """How sequences are packed that is right, and the probe's pass."""
    if seen.numbering:
        raise CannotPackError("numbers the tokens of a pass itself")
    if seen.hiding:
        raise CannotPackError("hides other tokens than its attention is told")
    try:
        return "packed", *_check(probe, body)
    except CannotPackError as error:
        found = _tried(lambda: mixers(body, probe.sequences[0]))
        if not found and isinstance(error, _Leak):  # not one of its modules lets them: experts round by who is beside
            return "packed", *_check(probe, body, leaks=False)
        if not found:
            raise
        for mixer in found:
            body.pad_mixer(mixer)
        if _tried(lambda: mixers(body, probe.sequences[0])):
            raise
        return "packed, mixers padded", *_check(probe, body, leaks=False)


def _check(probe: _Probe, body: Body, leaks: bool = True) -> tuple[Tensor, PackedAttention]:
    """The hidden states [T,d] of the probe's pass. Raises CannotPackError where these are others than the model's by itself, or,
    with ``leaks`` and in 16 bits, where one sequence changes with another."""
    together, packed = _tried(lambda: probe.read(body))
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
    """Whether one more token of each sequence is what it is alone, after the keys and values that its pass left."""
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
    """The probe's, and how many tokens the first two share."""
    usual = usual_tokens(model)
    length = max(2, min(longest, positions(model) - 1))
    short = min(_SHORT, length)
    draw = torch.Generator().manual_seed(0)
    a, b, c = (usual[torch.randint(len(usual), (n,), generator=draw)] for n in (length + 1, short + 1, short + 1))
    shared = length // 2
    b = torch.cat([a[:shared], b[: length + 1 - shared]])
    return tuple(one.to(model.device) for one in (a, b, c)), shared


def _tried(compute: Callable[[], _Made]) -> _Made:
    """Its result, or CannotPackError with the reason."""
    with raise_as(lambda reason: CannotPackError(f"cannot be called as the engine calls it ({reason})")):
        return compute()


@torch.no_grad()
def find_last(body: Body, attached: Attached, width: int) -> None:
    """Which MLP of ``attached`` may leave out the tokens that nobody reads: one after which no token sees another. The
    order of modules is no proof that the last one is; that a needed token's hidden state stays as it was, is."""
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
    """Largest relative difference over tokens; none where they are equal, also to 0, as a padding token's may be."""
    x, y = x.double(), y.double()
    error = (x - y).norm(dim=-1)
    return float(torch.where(error == 0, error, error / y.norm(dim=-1)).max()) if len(x) else 0.0
