"""The rows that methods keep: one global row in place 0, alone or with a row for each client k in place k + 1."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mira.core.errors import UserError
from mira.core.layout import Entry
from mira.core.mixing import mix, weighted_mean
from mira.core.offset import no_offset
from mira.core.ranks import Mix
from mira.core.types import MemoryRows, ServerState, Setting, Trained
from mira.methods.layers import refuse_experts

GLOBAL = torch.zeros(1, dtype=torch.int64)
"""The index [1] of the global row."""


def global_state(setting: Setting, extra: dict[str, Tensor] | None = None) -> ServerState:
    """A state of one global row."""
    return ServerState(MemoryRows(setting.start, 1, {}), setting.graph, extra or {})


def global_and_personal_state(setting: Setting, extra: dict[str, Tensor] | None = None) -> ServerState:
    """A state of K + 1 rows: the global row, and the row of client k in place k + 1."""
    return ServerState(MemoryRows(setting.start, setting.num_clients + 1, {}), setting.graph, extra or {})


def personal_state(setting: Setting, extra: dict[str, Tensor] | None = None) -> ServerState:
    """A state of K rows: the row of client k in place k."""
    return ServerState(MemoryRows(setting.start, setting.num_clients, {}), setting.graph, extra or {})


def global_rows(state: ServerState, client: Tensor) -> Tensor:
    """The global row, repeated [n,P] for each of ``client`` [n] in the client's scale and rank."""
    rows = state.rows[GLOBAL].repeat(len(client), 1)
    return rows if state.ranks is None else state.ranks.to_client_scale(rows, client)


def own_or_global(state: ServerState, client: Tensor, start: Tensor) -> Tensor:
    """The own rows [n,P] of ``client`` [n], in a state of K + 1 rows; the global row for a client whose own was never written and
    reads as the common ``start`` [P]."""
    own = state.rows[client + 1]
    return torch.where((own == start).all(1, keepdim=True), global_rows(state, client), own)


def mean(state: ServerState, trained: Trained, shared: Tensor | None = None) -> Tensor:
    """FedAvg's mean [P] of trained rows, weighted by the clients' numbers of training examples, or a robust one of equal weights.

    Where ranks differ, each number is averaged over the clients that have it (``mira.core.ranks``); numbers that none has keep
    the value of the global row. ``shared``: mask [P] of the numbers that leave the clients, None: all; others of the mean have no
    meaning.
    """
    if state.defence is not None:
        return robust_mean(state, trained, state.rows[GLOBAL][0], shared)
    if state.ranks is None:
        return weighted_mean(trained.rows, trained.examples)
    return state.ranks.mean(trained.rows, trained.client, trained.examples, otherwise=state.rows[GLOBAL][0])


def robust_mean(state: ServerState, trained: Trained, former: Tensor, shared: Tensor | None = None) -> Tensor:
    """The mean [P] of trained rows by the state's defence, about the ``former`` row [P]; ``shared`` as for ``mean``."""
    defence = state.defence
    assert defence is not None
    rows = trained.rows if shared is None else trained.rows.where(shared, former)
    if state.ranks is None:
        return defence.mean(trained.client, rows, former)
    return state.ranks.mean_by(rows, trained.client, former, lambda client: partial(defence.mean, client))


def compared(state: ServerState, rows: Tensor) -> Tensor:
    """The numbers of ``rows`` [n,P] by which clients are compared: those that all clients have."""
    return rows if state.ranks is None else rows[..., state.ranks.shared]


def combined(state: ServerState, trained: Trained, weight: Tensor) -> Tensor:
    """Σ_l w_kl·θ̂_l [M,P] over the trained rows: ``weight`` [M,M] float64, not negative, each row of sum 1.

    Where ranks differ, each number is combined over the clients that have it, their weights normalised (``mira.core.ranks``).
    """
    by = mixer(state)
    if state.ranks is None:
        return by(trained.client)(trained.rows, *_shares(weight), ())
    nobody = torch.empty(0, dtype=torch.int64)
    return state.ranks.mix(trained.rows, trained.client, nobody, lambda absent: iter(()), weight, _shares, by)


def mixer(state: ServerState) -> Callable[[Tensor], Mix]:
    """The function that mixes the rows of these clients: ``mixing.mix``, or that of the state's defence."""
    if (defence := state.defence) is None:
        return lambda client: mix
    return lambda client: partial(defence.mix, client)


def _shares(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of ``mix``: weights normalised to sum 1, the own row where they sum to 0."""
    total = weight.sum(1)
    return (total == 0).double(), weight / total.where(total > 0, 1.0)[:, None]


def factor_mask(setting: Setting, factor: str, method: str) -> Tensor:
    """Mask [P] of the numbers of factor "A" or "B". Raises UserError where the adapter has other tensors."""
    mask = torch.zeros(setting.layout.size, dtype=torch.bool)
    for pair in factor_pairs(setting, method):
        for entry in pair:
            entry.view(mask).fill_(entry.factor == factor)
    return mask


def offset_extra(setting: Setting, method: str) -> dict[str, Tensor]:
    """The extra tensors of a method that adds to the base's offset (``mira.core.offset``). Raises UserError where the adapter has
    other tensors than A and B, or experts."""
    pairs = factor_pairs(setting, method)
    refuse_experts(setting.layout, f"method.name={method}", "set name=fedit")
    layers = [[a.offset, b.offset, a.shape[1], b.shape[0], a.shape[0]] for a, b in pairs]
    return no_offset(setting.start, torch.tensor(layers))


def factor_pairs(setting: Setting, method: str) -> list[tuple[Entry, Entry]]:
    """A and B of every layer. Raises UserError where the adapter has other tensors."""
    entries = setting.layout.entries
    foreign = [entry.factor for entry in entries if entry.factor not in ("A", "B")]
    if "magnitude" in foreign:
        raise UserError(
            f"method.name={method}: needs an adapter of factors A and B alone, and DoRA has magnitudes too; set"
            " adapter.dora=false, or method.name=fedit"
        )
    if foreign:
        raise UserError(
            f"method.name={method}: needs the factors A and B of LoRA, but this adapter has '{foreign[0]}'; "
            "set adapter.kind=lora, or method.name=fedit"
        )
    a = {entry.module: entry for entry in entries if entry.factor == "A"}
    return [(a[entry.module], entry) for entry in entries if entry.factor == "B"]
