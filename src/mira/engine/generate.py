"""Greedy decoding for many adapters at once: prompts packed, then one token a step for all sequences together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mira.adapters.lowrank import Lane
from mira.engine.attention import Decode, Packed, Segment
from mira.engine.packing import Pass

_UNLIMITED = 1 << 30
_ROOM = 32  # the cache grows by this many tokens at a time


def positions(model: PreTrainedModel) -> int:
    """Tokens of the longest sequence ``model`` can read."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or _UNLIMITED)


@torch.no_grad()
def greedy(
    model: PreTrainedModel, head: nn.Module, packed: Pass, lane: Lane, per_job: Sequence[int], end: int, max_new: int
) -> list[list[int]]:
    """The answer tokens (without ``end``) of every packed prompt; an answer ends at the model's last position too.
    ``per_job``: prompts of each range of ``lane``."""
    device = model.device
    prompts = packed.prompts
    first_pass = Packed(packed.segments, keep=True)
    lane.needed = torch.tensor([s.end - 1 for s in prompts], device=device)
    hidden = model.base_model(
        input_ids=packed.tokens[None].to(device), position_ids=packed.positions[None].to(device),
        use_cache=False, packed=first_pass,
    ).last_hidden_state[0]  # fmt: skip
    state, length = _left_padded(first_pass, prompts, device)
    position = torch.tensor([s.prefix + s.end - s.start for s in prompts], device=device)
    place = 0
    ranges = []
    for (row, _, _), count in zip(packed.ranges, per_job, strict=True):
        ranges.append((row, place, place + count))
        place += count
    token = head(hidden[lane.needed]).argmax(-1)
    lane.ranges, lane.needed = ranges, None
    limit = positions(model)
    answers: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_new):
        done |= token == end
        for answer, value, stopped in zip(answers, token.tolist(), done.tolist(), strict=True):
            if not stopped:
                answer.append(value)
        done |= position >= limit
        if bool(done.all()) or step == max_new - 1:
            break
        state.length = length + step + 1
        _make_room(state)
        hidden = model.base_model(
            input_ids=token[:, None], position_ids=position.clamp(max=limit - 1)[:, None], use_cache=False, packed=state
        ).last_hidden_state[:, 0]
        token = head(hidden).argmax(-1)
        position = position + 1
    return answers


def _left_padded(first: Packed, prompts: Sequence[Segment], device: torch.device) -> tuple[Decode, int]:
    """The packed keys and values gathered into one left-padded rectangle, each shared prefix copied to its readers."""
    length = max(s.prefix + s.end - s.start for s in prompts)
    index = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros(len(prompts), 1, 1, length, dtype=torch.bool)
    for b, s in enumerate(prompts):
        past = torch.cat([torch.arange(s.prefix_start, s.prefix_end), torch.arange(s.start, s.end)])
        index[b, length - len(past) :] = past
        mask[b, ..., length - len(past) :] = True
    index = index.to(device)

    empty = ~mask[:, 0, :, :, None].to(device)  # [B,1,L,1]

    def gather(x: Tensor) -> Tensor:  # [1,h,T,d] -> [B,h,L,d]
        # Padding reads token 0, somebody else's: zeroed, for a mask does not keep out NaN (0·NaN is NaN).
        return x[0][:, index].transpose(0, 1).masked_fill(empty, 0)

    cache = {layer: (gather(k), gather(v)) for layer, (k, v) in first.cache.items()}
    return Decode(cache, mask.to(device)), length


def _make_room(state: Decode) -> None:
    if state.length <= state.mask.shape[-1]:
        return
    for layer, (k, v) in state.cache.items():
        more = k.new_zeros(*k.shape[:2], _ROOM, k.shape[3])
        state.cache[layer] = (torch.cat([k, more], dim=2), torch.cat([v, more], dim=2))
    room = torch.ones(*state.mask.shape[:-1], _ROOM, dtype=torch.bool, device=state.mask.device)
    state.mask = torch.cat([state.mask, room], dim=-1)
