"""MIRA: every client keeps its own row, and the server pulls related rows together along a graph.

Elbakary et al., "MIRA: A Method of Federated Multi-Task Learning for Large Language Models", IEEE Networking
Letters 7(3), 2025; the Laplacian step after Dinh et al., "A New Look and Convergence Rate of Federated Multi-Task
Learning with Laplacian Regularization" (FedU).
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from decimal import ROUND_FLOOR, Context
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from mira.core.errors import UserError
from mira.core.graph import Edges, Graph, Groups
from mira.core.layout import Layout
from mira.core.mixing import normalised_weights, paper_weights
from mira.core.product_mixing import product_distances, product_mix, rotated_mix
from mira.core.pydantic_config import STRICT
from mira.core.ranks import Weigh
from mira.core.robust import RULES, Rule
from mira.core.types import Change, Offer, ServerState, Setting, Trained, Work
from mira.methods.layers import pairs, shares
from mira.methods.rows import GLOBAL, compared, global_and_personal_state, mean, mixer, own_or_global, personal_state
from mira.methods.strength import FIXED, POINTS, check_own, of_similarity

log = logging.getLogger(__name__)

_BLOCK = 2**24  # numbers of absent neighbours' rows in memory at a time, 64 MiB in fp32
_START = "mira.start"  # in extra: the common start row [P]
_ROUNDS = "mira.rounds"  # in extra: rounds of the whole run
_PLACES = "mira.places"  # in extra: begin and end of each tensor in a row [n,2]
_PAIRS = "mira.pairs"  # in extra: ``layers.pairs``
_SHARES = "mira.shares"  # in extra: the share of the step for each of these
_STEP = "mira.step"  # in extra: the largest lr·steps, for checking a graph that is learned

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class Mira:
    """min Σ_k F_k(θ_k) + λ/2·tr(ΘᵀLΘ), by local training and one Laplacian step per round on the server."""

    uses_graph: ClassVar[bool] = True

    name: Literal["mira"] = "mira"
    form: Literal["normalised", "paper"] = "normalised"
    """Form of the server step. normalised: θ_k ← (1−s)·θ̂_k + s·weighted mean of its neighbours. paper: θ_k ← θ̂_k −
    ηEλ·Σ_l a_kl(θ̂_k − θ̂_l)."""
    strength: Share | Literal["personal", "similarity"] | None = None
    """s of the normalised form; 0 is local training. personal: each client takes the s out of 0, 0.25, 0.5, 0.75 and 1 with the
    least loss on its own validation data; that costs five forward passes over these data in each round, and a number costs none.
    similarity: s = m·c/(1 + m·c), c ≥ 0 the mean cosine of the client's displacement in the round to those of its m neighbours.
    null: personal, or 0.5 where clients cannot choose: with space=product, strength_end, privacy.unit=site, or
    privacy.metrics other than exact."""
    regularisation: Annotated[float, Field(ge=0)] = 1e-3
    """λ of the paper's form; the step is c = learning rate × local steps × λ. 0 is local training."""
    neighbours: Literal["cohort", "all"] = "cohort"
    """cohort: mix with the neighbours that trained in this round. all: with the last known adapters of all neighbours."""
    space: Literal["factors", "product", "rotated"] = "factors"
    """factors: mix A and B of LoRA separately. product: mix the updates B·A, truncated to rank r by singular values. rotated: mix
    A and B after rotating each neighbour's towards the client's own, in odd rounds by A, in even rounds by B (FedRot-LoRA)."""
    factors: Literal["all", "A", "B"] = "all"
    """The factors of LoRA to mix; a factor that is not mixed stays the client's own."""
    upper_layers: Share | tuple[Share, ...] = 1.0
    """Share of the step in the model's highest layer, linear from 1 in the lowest layer. A list gives shares from the lowest to
    the highest layer, at equal distances and linear in between: one for each layer, or fewer."""
    strength_end: Share | None = None
    """s in the last round, linear from strength (null: 0.5) in the first round; null: constant."""
    common_rounds: Annotated[int, Field(ge=0)] = 0
    """First rounds, in which all clients share one adapter (FedAvg). Each then goes on from it with one of its own, mixed along
    the graph. With strength=0 this is fedavg-ft."""

    def __post_init__(self) -> None:
        """Refuse settings that would have no effect, such as a strength of the other form."""
        if isinstance(self.strength, str):
            check_own(self.strength, self.form, self.space, self.strength_end, self.neighbours)
        paper = self.form == "paper"
        unused, form = ("strength", "normalised") if paper else ("regularisation", "paper")
        # 0.5 was the default of strength once, in both forms, and stands in run folders and files.
        if getattr(self, unused) not in ((None, FIXED) if paper else (type(self).regularisation,)):
            raise UserError(
                f"method.{unused}={getattr(self, unused):g}: belongs to form '{form}', not '{self.form}'; "
                f"set method.form={form} or leave {unused} out"
            )
        if paper and self.strength_end is not None:
            raise UserError(
                f"method.strength_end={self.strength_end:g}: belongs to form 'normalised', not 'paper'; leave it out"
            )
        if isinstance(self.upper_layers, tuple) and len(self.upper_layers) < 2:
            raise UserError(
                f"method.upper_layers={list(self.upper_layers)}: a list needs two shares or more, from the lowest layer to the "
                "highest; give one number for the share of the highest layer"
            )
        if self.space != "factors" and self.factors != "all":
            mixed = "products" if self.space == "product" else "A and B together"
            raise UserError(
                f"method.factors={self.factors}: space={self.space} mixes {mixed} and has no factor to choose; "
                "set method.space=factors or method.factors=all"
            )

    @property
    def fixed_by(self) -> str | None:
        """The setting with which clients have no strength to choose; None without one."""
        if self.strength_end is not None:
            return f"method.strength_end={self.strength_end:g}"
        return "method.space=product" if self.space == "product" else None

    def strength_for(self, told: bool = True) -> float | Literal["personal", "similarity"] | None:
        """strength, and in the place of null personal, or 0.5 where clients cannot choose; None in the paper's form. ``told``:
        whether clients tell losses as they are."""
        if self.form == "paper":
            return None
        if self.strength is not None:
            return self.strength
        return "personal" if told and self.fixed_by is None else FIXED

    @property
    def defences(self) -> tuple[Rule, ...]:
        """Single numbers of a product's factors say nothing: the product is the same in any rotation of them."""
        return RULES if self.space == "factors" else ("clip",)

    def init(self, setting: Setting) -> ServerState:
        alone = len(setting.graph.isolated())
        if alone and setting.num_clients > 1:
            log.warning(
                "%d of %d clients have no neighbour in the graph and train alone; graph.name=complete connects all clients",
                alone, setting.num_clients,
            )  # fmt: skip
        if self.space != "factors" and setting.rank is not None:
            raise UserError(
                f"method.space={self.space}: needs the same rank for all clients (clients.rank); use space=factors"
            )
        if self.common_rounds > setting.rounds:
            raise UserError(
                f"method.common_rounds={self.common_rounds}: the run has {setting.rounds} rounds; set it to {setting.rounds} or"
                " less, or raise rounds"
            )
        extra = self._parts(setting.layout)
        if self.strength_end is not None:
            extra[_ROUNDS] = torch.tensor(setting.rounds)
        if self.form == "paper":
            extra[_STEP] = torch.tensor(setting.max_lr * setting.max_steps, dtype=torch.float64)
            self._check(setting.graph, float(extra[_STEP]))
        if not self.common_rounds:
            return personal_state(setting, extra)
        return global_and_personal_state(setting, extra | {_START: setting.start})

    def broadcast(self, state: ServerState, cohort: Tensor) -> Work:
        return Work(cohort, start=self._rows(state, cohort))

    def aggregate(self, state: ServerState, trained: Trained) -> Change:
        graph = self._graph(state, trained)
        if graph is state.graph:
            return self._change(state, trained)
        return replace(self._change(replace(state, graph=graph), trained), graph=graph)

    def deployed(self, state: ServerState, client: Tensor) -> Tensor:
        return self._rows(state, client)

    def _rows(self, state: ServerState, client: Tensor) -> Tensor:
        """The rows [n,P] of ``client``: its own, or while it has none the common row."""
        return own_or_global(state, client, state.extra[_START]) if self.common_rounds else state.rows[client]

    def _change(self, state: ServerState, trained: Trained) -> Change:
        """FedAvg's step in a common round, else the step along the graph of ``state``."""
        if state.round < self.common_rounds:
            return Change(GLOBAL, mean(state, trained)[None], {}, notes={})
        client, absent = trained.client, torch.empty(0, dtype=torch.int64)
        if self.neighbours == "all":
            near = state.graph.neighbours(client)
            absent = near[~torch.isin(near, client)]
        a = state.graph.weights(client, torch.cat([client, absent]))
        strength = self.strength_for()
        if strength is None:
            step = trained.lr * float(trained.steps.double().mean()) * self.regularisation
            mixed = self._mixed(state, trained, absent, a, partial(paper_weights, c=step))
            change = _step(client, mixed, step, step * float(a.sum(1).mean()))
        elif isinstance(strength, str):
            change = self._own_strength(strength, state, trained, absent, a)
        else:
            step = self._strength(strength, state)
            mixed = self._mixed(state, trained, absent, a, partial(normalised_weights, s=step))
            change = _step(client, mixed, step, step * float((a.sum(1) > 0).double().mean()))
        return replace(change, index=client + 1) if self.common_rounds else change

    def _own_strength(self, kind: str, state: ServerState, trained: Trained, absent: Tensor, a: Tensor) -> Change:
        """The step with a strength of each client's own: a point between its row and the mean of its neighbours."""
        rows, client, related = trained.rows, trained.client, a.sum(1) > 0
        towards = self._mixed(state, trained, absent, a, partial(normalised_weights, s=1.0))
        if kind == "personal":
            change = _step(client, rows, POINTS[-1], 0.0)
            who = related.nonzero()[:, 0]
            lines = rows[who], towards[who]
            offer = Offer("strength", who, client[who], lines, "validation", POINTS, POINTS.index(FIXED))
            return replace(change, offer=offer) if len(who) else change
        s = of_similarity(self._moved(state, trained), a)
        change = _step(client, rows + s[:, None].to(rows.dtype) * (towards - rows), float(s.max()), float(s.mean()))
        taken = dict(zip(client[related].tolist(), s[related].tolist(), strict=True))
        return replace(change, of_clients={"strength": taken})

    def _strength(self, first: float, state: ServerState) -> float:
        """s of this round's server step; ``first``: of the first round."""
        if self.strength_end is None:
            return first
        done = state.round / max(int(state.extra[_ROUNDS]) - 1, 1)
        return first + (self.strength_end - first) * min(done, 1.0)

    def _parts(self, layout: Layout) -> dict[str, Tensor]:
        """The extra tensors for mixing parts of a row differently; none where all numbers are mixed alike."""
        if self.space != "factors":
            a = torch.tensor([entry.factor == "A" for entry in layout.entries])
            return {_PAIRS: pairs(layout, self.space), _SHARES: shares(layout, "all", self.upper_layers)[a]}
        share = shares(layout, self.factors, self.upper_layers)
        if bool((share == 1).all()):
            return {}
        return {_PLACES: torch.tensor([[e.offset, e.offset + e.size] for e in layout.entries]), _SHARES: share}

    def _mixed(self, state: ServerState, trained: Trained, absent: Tensor, a: Tensor, weigh: Weigh) -> Tensor:
        rows, extra = trained.rows, state.extra

        def known(who: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            blocks = who.split(max(1, _BLOCK // rows.shape[1]))
            return ((block, self._rows(state, block)) for block in blocks if len(block))

        others: Iterable[Tensor] = (block for _, block in known(absent))
        who = torch.cat([trained.client, absent])
        if _PAIRS in extra:
            own, pull = weigh(a)
            if state.defence is not None:
                others = list(others)
                pull = state.defence.clipped(who, pull, product_distances(rows, others, pull, extra[_PAIRS]))
            if self.space == "product":
                return product_mix(rows, own, pull, others, extra[_PAIRS], extra[_SHARES])
            return rotated_mix(rows, own, pull, others, extra[_PAIRS], extra[_SHARES], on_b=state.round % 2 == 1)
        if state.ranks is None:
            mixed = mixer(state)(who)(rows, *weigh(a), others)
        else:
            mixed = state.ranks.mix(rows, trained.client, absent, known, a, weigh, mixer(state))
        if _PLACES in extra:
            for (start, stop), share in zip(extra[_PLACES].tolist(), extra[_SHARES].tolist(), strict=True):
                mixed[:, start:stop] = rows[:, start:stop].lerp(mixed[:, start:stop], share)
        return mixed

    def _moved(self, state: ServerState, trained: Trained) -> Tensor:
        """Displacements [M,p] of the round, of the numbers that all clients have: clients of the same rank would look
        related by the zeros beyond it."""
        return compared(state, trained.rows) - compared(state, self._rows(state, trained.client))

    def _graph(self, state: ServerState, trained: Trained) -> Graph:
        """The graph to mix along, re-estimated from the rows just trained where it is one that is."""
        if isinstance(state.graph, Groups | Edges):
            return state.graph
        graph = state.graph.updated(state.round, trained.client, self._moved(state, trained))
        if graph is not state.graph and self.form == "paper":
            self._check(graph, float(state.extra[_STEP]), f" learned in round {state.round + 1}")
        return graph

    def _check(self, graph: Graph, per_lambda: float, which: str = "") -> None:
        """Raise UserError where rows would diverge. The energy tr(ΘᵀLΘ) does not increase for c ≤ 2/λ_max(L), and the subgraph of
        a cohort never has a larger λ_max. ``per_lambda``: the largest lr·steps of any round."""
        largest = graph.laplacian_max()
        if largest == 0 or per_lambda == 0:
            return
        c, limit = per_lambda * self.regularisation, 2 / largest
        admissible = limit / per_lambda
        if self.regularisation > admissible:
            raise UserError(
                f"method.regularisation={self.regularisation:g}: the step c = lr·steps·λ = {c:.4g} must be within "
                f"[0, {limit:.4g}] = 2/λ_max of the graph{which}, or adapters diverge; largest admissible: {_floor(admissible)}"
            )
        if c * graph.degree_max() > 1:
            log.warning(
                "method.regularisation=%g: c·max degree = %.3g is above 1: mixed adapters are no longer convex combinations",
                self.regularisation, c * graph.degree_max(),
            )  # fmt: skip


def _step(client: Tensor, rows: Tensor, step: float, effective: float) -> Change:
    """The change of the rows of ``client`` with the notes of a step; ``effective``: its mean over the clients."""
    return Change(client, rows, {}, {"mixing_step": step, "effective_step": effective})


def _floor(number: float) -> str:
    """``number`` with four digits, rounded down, so that the largest admissible value in a message is admissible."""
    return f"{Context(prec=4, rounding=ROUND_FLOOR).create_decimal_from_float(number):g}"
