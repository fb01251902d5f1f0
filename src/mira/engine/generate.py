"""Greedy decoding for many adapters at once: prompts packed, then one token a step for all sequences together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from mira.adapters.lowrank import Lane
from mira.engine.attention import Packed
from mira.engine.decode import after
from mira.engine.packing import Pass

_UNLIMITED = 1 << 30


def positions(model: PreTrainedModel) -> int:
    """Tokens of the longest sequence ``model`` can read. Under LongRoPE only as far as its frequencies do not depend on the
    longest sequence of a pass, which may be another client's."""
    config = model.config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", None) or _UNLIMITED)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # for all layers, or by their type
    ends = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([limit, *map(int, ends)])


@torch.no_grad()
def greedy(
    model: PreTrainedModel, head: nn.Module, packed: Pass, lane: Lane, per_job: Sequence[int], end: int, max_new: int
) -> list[list[int]]:
    """The answer tokens (without ``end``) of every packed prompt; an answer ends at the model's last position too.
    ``per_job``: prompts of each range of ``lane``."""
    device = model.device
    prompts = packed.prompts
    first_pass = Packed(packed.segments, keep=True)
    lane.needed = torch.tensor([s.end - 1 for s in prompts])
    hidden = model.base_model(
        input_ids=packed.tokens[None].to(device), position_ids=packed.positions[None].to(device),
        use_cache=False, packed=first_pass,
    ).last_hidden_state[0]  # fmt: skip
    state = after(prompts, first_pass.cache, max_new)
    first_pass.cache.clear()
    position = torch.tensor([s.prefix + s.end - s.start for s in prompts], device=device)
    place = 0
    ranges = []
    for (row, _, _), count in zip(packed.ranges, per_job, strict=True):
        ranges.append((row, place, place + count))
        place += count
    token = head(hidden[lane.needed.to(device)]).argmax(-1)
    lane.turn_to(ranges)
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
        state.advance()
        hidden = model.base_model(
            input_ids=token[:, None], position_ids=position.clamp(max=limit - 1)[:, None], use_cache=False, packed=state
        ).last_hidden_state[:, 0]
        token = head(hidden).argmax(-1)
        position = position + 1
    return answers
