"""MIRA: every client keeps its own row; the server pulls related rows together along a graph.

Elbakary et al., "MIRA: A Method of Federated Multi-Task Learning for Large Language Models", IEEE Networking
Letters 7(3), 2025; the Laplacian step after Dinh et al., "A New Look and Convergence Rate of Federated Multi-Task
Learning with Laplacian Regularization" (FedU).
"""

import logging
from decimal import ROUND_FLOOR, Context
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.errors import UserError
from mira.core.graph import Graph
from mira.core.learned import Learned
from mira.core.mixing import normalised_step, paper_step
from mira.core.strict import STRICT
from mira.core.tensors import to_tensors
from mira.core.types import Change, MemoryRows, ServerState, Setting, Trained, Work

log = logging.getLogger(__name__)

_BLOCK = 2**24  # numbers of absent neighbours' rows in memory at a time, 64 MiB in fp32
_STEP = "mira.step"  # in extra: the largest lr·steps, for checking a graph that is learned


@dataclass(frozen=True, config=STRICT)
class Mira:
    """min Σ_k F_k(θ_k) + λ/2·tr(ΘᵀLΘ), by local training and one Laplacian step a round on the server."""

    name: Literal["mira"] = "mira"
    form: Literal["normalised", "paper"] = "normalised"
    """normalised: θ_k ← (1−s)·θ̂_k + s·weighted mean of its neighbours. paper: θ_k ← θ̂_k − ηEλ·Σ_l a_kl(θ̂_k − θ̂_l)."""
    strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    """s of the normalised form; 0 is local training only."""
    regularisation: Annotated[float, Field(ge=0)] = 1e-3
    """λ of the paper's form; the step is c = learning rate × local steps × λ. 0 is local training only."""
    neighbours: Literal["cohort", "all"] = "cohort"
    """Mix with the neighbours that trained this round, or with the last known rows of all graph neighbours."""

    def __post_init__(self) -> None:
        """A strength of the form that is not in use would be ignored in silence."""
        unused, form = ("strength", "normalised") if self.form == "paper" else ("regularisation", "paper")
        if getattr(self, unused) != getattr(type(self), unused):
            raise UserError(
                f"method.{unused}={getattr(self, unused):g}: belongs to form '{form}', not '{self.form}'; "
                f"set method.form={form} or leave {unused} out"
            )

    def init(self, setting: Setting) -> ServerState:
        alone = len(setting.graph.alone())
        if alone and setting.num_clients > 1:
            log.warning(
                "%d of %d clients have no neighbour in the graph and train alone; graph.name=complete relates everybody",
                alone, setting.num_clients,
            )  # fmt: skip
        extra = {}
        if self.form == "paper":
            extra[_STEP] = torch.tensor(setting.max_lr * setting.max_steps, dtype=torch.float64)
            self._check(setting.graph, float(extra[_STEP]))
        return ServerState(MemoryRows(setting.start, setting.num_clients, {}), setting.graph, extra)

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=state.rows[cohort])

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        graph, extra = self._graph(state, trained)
        absent = torch.empty(0, dtype=torch.int64)
        if self.neighbours == "all":
            near = graph.neighbours(trained.client)
            absent = near[~torch.isin(near, trained.client)]
        a = graph.weights(trained.client, torch.cat([trained.client, absent]))
        size = max(1, _BLOCK // trained.rows.shape[1])
        others = (state.rows[block] for block in absent.split(size) if len(block))
        if self.form == "normalised":
            mixed = normalised_step(trained.rows, a, self.strength, others)
            effective = self.strength * float((a.sum(1) > 0).double().mean())
            notes = {"mixing_step": self.strength, "effective_step": effective}
            return Change(trained.client, mixed, extra, notes)
        c = trained.lr * float(trained.steps.double().mean()) * self.regularisation
        mixed = paper_step(trained.rows, a, c, others)
        notes = {"mixing_step": c, "effective_step": c * float(a.sum(1).mean())}
        return Change(trained.client, mixed, extra, notes)

    def serve(self, state: ServerState, client: Tensor) -> Tensor:
        return state.rows[client]

    def _graph(self, state: ServerState, trained: Trained) -> tuple[Graph, dict[str, Tensor]]:
        """The graph to mix along, and what to keep of it where it was learned anew from the rows just trained."""
        graph = state.graph
        if not isinstance(graph, Learned) or state.round % graph.every:
            return graph, {}
        graph = graph.updated(trained.client, trained.rows)
        if self.form == "paper":
            self._check(graph, float(state.extra[_STEP]), f" learned in round {state.round + 1}")
        return graph, to_tensors(graph)

    def _check(self, graph: Graph, per_lambda: float, which: str = "") -> None:
        """Energy does not increase for c ≤ 2/λ_max(L); an induced cohort graph never has a larger λ_max.
        ``per_lambda``: the largest lr·steps of any round."""
        largest = graph.laplacian_max()
        if largest == 0 or per_lambda == 0:
            return
        c, limit = per_lambda * self.regularisation, 2 / largest
        admissible = limit / per_lambda
        if self.regularisation > admissible:
            raise UserError(
                f"method.regularisation={self.regularisation:g}: the step c = lr·steps·λ = {c:.4g} must be within "
                f"[0, {limit:.4g}] = 2/λ_max of the graph{which}, or rows diverge; largest admissible: {_floor(admissible)}"
            )
        if c * graph.degree_max() > 1:
            log.warning(
                "method.regularisation=%g: c·max degree = %.3g is above 1: mixed rows are no longer convex combinations",
                self.regularisation, c * graph.degree_max(),
            )  # fmt: skip


def _floor(number: float) -> str:
    """Four digits, rounded down: what a message names as the largest admissible value must be admissible."""
    return f"{Context(prec=4, rounding=ROUND_FLOOR).create_decimal_from_float(number):g}"
