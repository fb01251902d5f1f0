"""Rows as methods keep them: one row for all in place 0, and one for each client, alone or in places 1 to K behind it."""

import torch
from torch import Tensor

from mira.core.errors import UserError
from mira.core.layout import Entry
from mira.core.mixing import weighted_mean
from mira.core.types import MemoryRows, ServerState, Setting, Trained

GLOBAL = torch.zeros(1, dtype=torch.int64)


def global_state(setting: Setting, extra: dict[str, Tensor] | None = None) -> ServerState:
    """A state that is one row for all."""
    return ServerState(MemoryRows(setting.start, 1, {}), setting.graph, extra or {})


def global_and_personal_state(setting: Setting, extra: dict[str, Tensor] | None = None) -> ServerState:
    """A state of K + 1 rows: that of all, and of client k in place k + 1."""
    return ServerState(MemoryRows(setting.start, setting.num_clients + 1, {}), setting.graph, extra or {})


def global_rows(state: ServerState, client: Tensor) -> Tensor:
    """The row of all, once for each of ``client`` [n] as it uses it: [n,P]. Read once, however many ask."""
    rows = state.rows[GLOBAL].repeat(len(client), 1)
    return rows if state.ranks is None else state.ranks.to_client_scale(rows, client)


def mean(state: ServerState, trained: Trained) -> Tensor:
    """FedAvg's mean [P] for the row of all: weighted by the clients' numbers of training examples. Where ranks differ, of each
    number over those who have it (``mira.core.ranks``); what none of them has stays."""
    if state.ranks is None:
        return weighted_mean(trained.rows, trained.examples)
    return state.ranks.mean(trained.rows, trained.client, trained.examples, otherwise=state.rows[GLOBAL][0])


def factor_mask(setting: Setting, factor: str, method: str) -> Tensor:
    """Which of the P numbers belong to factor "A" or "B" [P] bool. Raises UserError where there are no factors."""
    mask = torch.zeros(setting.layout.size, dtype=torch.bool)
    for pair in factor_pairs(setting, method):
        for entry in pair:
            entry.view(mask).fill_(entry.factor == factor)
    return mask


def factor_pairs(setting: Setting, method: str) -> list[tuple[Entry, Entry]]:
    """A and B of every layer. Raises UserError when the adapter is not made of them."""
    entries = setting.layout.entries
    foreign = [entry.factor for entry in entries if entry.factor not in ("A", "B")]
    if "magnitude" in foreign:
        raise UserError(
            f"method.name={method}: works on the factors A and B alone, and DoRA has magnitudes too; set adapter.dora=false,"
            " or method.name=fedit"
        )
    if foreign:
        raise UserError(
            f"method.name={method}: works on the factors A and B of LoRA, but this adapter has '{foreign[0]}'; "
            "set adapter.kind=lora, or method.name=fedit"
        )
    a = {entry.module: entry for entry in entries if entry.factor == "A"}
    return [(a[entry.module], entry) for entry in entries if entry.factor == "B"]
