"""The session of a run: base model, clients, adapter, method, graph and engine of one experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mira.adapters.loading import load_peft
from mira.adapters.offset import OffsetWeights, holding_offset, offset_weights
from mira.adapters.types import Adapter
from mira.config import Experiment
from mira.core.checks import checked_graph, checked_state
from mira.core.engine import ClientBackend, Engine
from mira.core.errors import UserError, did_you_mean
from mira.core.graph import Graph, Groups
from mira.core.layout import Layout
from mira.core.offset import offset_of
from mira.core.types import Method, ServerState, Setting, uses_graph
from mira.data.corpus import Corpus
from mira.data.federation import Federation
from mira.engine.embed import embed
from mira.engine.memory import is_out_of_memory
from mira.engine.spread import SpreadEngine
from mira.methods.defended import defended
from mira.methods.heterogeneous_ranks import with_ranks
from mira.methods.warm_start import WarmStart
from mira.model import Base
from mira.setup.engine import EnginePlan
from mira.setup.privacy import Accountant
from mira.setup.spread import spread_out

TOKENS = "tokens"  # in the run folder: the examples as encoded, for a session that opens the run again


@dataclass(frozen=True)
class Session:
    """The parts of a run. Client k is number k in ``federation`` and in ``names``."""

    experiment: Experiment
    base: Base
    federation: Federation
    corpus: Corpus
    adapter: Adapter
    engine_plan: EnginePlan
    surroundings: dict[str, Any]
    """The environment without the engine."""
    remote: ClientBackend | None = None
    """Training and evaluation at sites on other machines; None: in this process, by ``engine``."""
    spread: bool = False
    """Compute on the workers that the configuration asks for."""
    accountant: Accountant | None = None
    """Counts what training costs in privacy; None: it adds no noise."""

    @cached_property
    def engine(self) -> Engine:
        """The engine of this process, built on first use: a server of sites needs none."""
        return spread_out(self.engine_plan) if self.spread else self.engine_plan.build()

    @cached_property
    def _offset_weights(self) -> OffsetWeights:
        return offset_weights(self.adapter)

    def rebase(self, offset: Tensor | None) -> None:
        """Give the base the ``offset`` [n,P] of a state; None: the weights as loaded."""
        if offset is not None or "_offset_weights" in vars(self):
            self._offset_weights.set(offset)

    @contextmanager
    def on_base_of(self, state: ServerState) -> Iterator[None]:
        """The base with the offset of ``state`` while the context is open, afterwards as loaded."""
        self.rebase(offset_of(state))
        try:
            yield
        finally:
            self.rebase(None)

    def save(self, folder: Path, row: Tensor, offset: Tensor | None, base_name: str) -> None:
        """Write the adapter that is on the base as loaded what ``row`` [P] is on the one with ``offset`` [n,P]."""
        adapter, row = (self.adapter, row) if offset is None else holding_offset(self.adapter, row, offset)
        adapter.save(folder, row, base_name)

    def close(self) -> None:
        """End the workers, if there are any, and restore the base."""
        self.rebase(None)
        engine = vars(self).get("engine")
        if isinstance(engine, SpreadEngine):
            engine.close()

    @property
    def environment(self) -> dict[str, Any]:
        """The environment that a run records; without an engine if the clients are remote."""
        return self.surroundings | ({} if self.remote else self.engine_plan.recorded(self.engine))

    @property
    def layout(self) -> Layout:
        return self.adapter.layout

    @property
    def names(self) -> list[str]:
        return [client.name for client in self.federation.clients]

    def number(self, name: str) -> int:
        """The number of the client called ``name``. Raises UserError if there is none."""
        if name not in self.names:
            raise UserError(f"no client is named '{name}'{did_you_mean(name, self.names)}")
        return self.names.index(name)

    @property
    def method(self) -> Method:
        """The experiment's method, for the ranks of its clients and with its defence."""
        return self.method_as(self.experiment.method)

    def method_as(self, method: Method) -> Method:
        """``method`` for the ranks of this experiment's clients, and with its defence."""
        e = self.experiment
        return defended(with_ranks(method, self.layout, e.clients.rank, self.names), e.server.robust)

    def method_of(self, experiment: Experiment, names: Sequence[str]) -> Method:
        """The method of another ``experiment`` on this base model, whose clients are ``names``."""
        return with_ranks(experiment.method, self.layout, experiment.clients.rank, names)

    def method_with_warm_start(self, start: Tensor, new: Callable[[], Tensor]) -> Method:
        """The experiment's method with a warm start: clients ``new()`` [n] start from the mean of their neighbours, not from the
        common ``start`` [P]."""
        return self.method_as(WarmStart(self.experiment.method, self.layout, start, new))

    def peft_model(self, row: Tensor, offset: Tensor | None) -> Any:
        """The base model as loaded, with the adapter that ``save`` writes on it, as PEFT reads its folder: a ``PeftModel`` in
        eval mode. PEFT changes the modules of a base loaded from files; one from memory is copied. Raises UserError if PEFT has
        no such kind of adapter."""
        model = self.base.model if self.base.path else deepcopy(self.base.model)
        with TemporaryDirectory() as place:
            self.save(Path(place), row, offset, self.base.name)
            return load_peft(model, Path(place))

    def start(self) -> Tensor:
        """The common start row [P], in the training precision of adapters."""
        row = self.adapter.start(self.experiment.seed)
        return row.double() if self.experiment.model.dtype == "float64" else row

    def descriptions(self) -> Tensor:
        """Embeddings [K,d] of the clients' task descriptions by the base model."""
        return embed(self.base.model, self.base.tokenizer, [client.about for client in self.federation.clients])

    def graph(self) -> Graph:
        """The graph of the clients; without edges for a method that uses no graph. Raises UserError if the section builds none
        or one of another number of clients."""
        if not self._along_graph:
            return Groups(torch.arange(len(self.names)))
        groups = [client.group for client in self.federation.clients]
        section = self.experiment.graph
        place = f"graph.name={section.name}: build"
        try:
            graph = section.build(self.names, groups, self.experiment.seed, self.descriptions)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{place}: {' '.join(str(error).split())}") from error
        return checked_graph(graph, len(self.names), place)

    @property
    def description_bytes(self) -> int:
        """Bytes of a client's task description as an fp32 vector; 0 if the graph is not made of descriptions."""
        asked = self._along_graph and getattr(self.experiment.graph, "source", None) == "description"
        return 4 * embed(self.base.model, self.base.tokenizer, ["."]).shape[1] if asked else 0

    @property
    def _along_graph(self) -> bool:
        return uses_graph(self.experiment.method)

    def initial_state(self) -> ServerState:
        """The state before round 0. Raises UserError if graph, method and data do not fit together, or where the method returns
        wrong objects."""
        clients = self.federation.clients
        training = self.experiment.training
        steps = max(training.steps_for(client.num_train) for client in clients)
        setting = Setting(
            self.layout,
            self.start(),
            len(clients),
            self.graph(),
            max_lr=training.lr,
            max_steps=steps,
            rounds=self.experiment.rounds,
            plain_sgd=training.plain_sgd,
            seed=self.experiment.seed,
        )
        # The method without ranks: the wrapper of ranks computes with the objects that are checked here.
        state = checked_state(self.experiment.method, self.method.init(setting), setting.start, len(clients))
        self.rebase(offset_of(state))  # a base that takes none is refused before the run begins
        return state


@contextmanager
def enough_memory(experiment: Experiment) -> Iterator[None]:
    """Turn an out-of-memory error during evaluation, where no client can be left out, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"prompt.max_length={experiment.prompt.max_length}: out of memory while measuring; start a new run with a smaller"
            " value, or with a smaller evaluation.max_new_tokens"
        ) from None
