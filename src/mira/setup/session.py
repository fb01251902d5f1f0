"""Everything an experiment is made of, built in one place: base model, clients, layout, method, graph, engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mira.adapters.types import Adapter
from mira.config import Experiment
from mira.core.errors import UserError, did_you_mean
from mira.core.graph import Graph, Groups
from mira.core.layout import Layout
from mira.core.threads import usable_threads
from mira.core.types import ClientBackend, Method, ServerState, Setting
from mira.data.corpus import Corpus, without_overlong
from mira.data.federation import SPLITS, Federation, make_federation
from mira.data.prompt_check import prove as prove_prompts
from mira.engine.attention.hook import CannotPackError
from mira.engine.batched import BatchedEngine
from mira.engine.checkpoint import check_gradients
from mira.engine.generate import positions
from mira.engine.memory import is_out_of_memory, share_heap
from mira.engine.reference import ReferenceEngine
from mira.engine.seeds import SeedsEngine, without_gradients
from mira.methods import uses_graph
from mira.methods.heterogeneous_ranks import with_ranks
from mira.model import Base, load
from mira.model.embed import embed
from mira.setup.environment import environment_of

log = logging.getLogger(__name__)

TOKENS = "tokens"  # in the run folder: the examples as encoded, for who opens the run again


@dataclass(frozen=True)
class Session:
    experiment: Experiment
    base: Base
    federation: Federation
    corpus: Corpus
    adapter: Adapter
    engine: BatchedEngine | ReferenceEngine | SeedsEngine
    environment: dict[str, Any]
    remote: ClientBackend | None = None
    """Training and measurement at sites on machines of their own; None: in this process, by ``engine``."""

    @property
    def layout(self) -> Layout:
        return self.adapter.layout

    @property
    def names(self) -> list[str]:
        return [client.name for client in self.federation.clients]

    def number(self, name: str) -> int:
        """The number of the client called ``name``. Raises UserError when there is none."""
        if name not in self.names:
            raise UserError(f"no client is named '{name}'{did_you_mean(name, self.names)}")
        return self.names.index(name)

    @property
    def method(self) -> Method:
        """The experiment's method, for clients of the ranks they have."""
        return self.method_as(self.experiment.method)

    def method_as(self, method: Method) -> Method:
        return with_ranks(method, self.layout, self.experiment.clients.rank, self.names)

    def start(self) -> Tensor:
        """The common start row [P], in the precision adapters are trained in."""
        row = self.adapter.start(self.experiment.seed)
        return row.double() if self.experiment.model.dtype == "float64" else row

    def descriptions(self) -> Tensor:
        """What every client's task is, as a vector of the base model's [K,d]."""
        return embed(self.base, [client.about for client in self.federation.clients])

    def graph(self) -> Graph:
        """Who is related to whom; nobody, for a method that does not mix along a graph."""
        if not self._along_graph:
            return Groups(torch.arange(len(self.names)))
        groups = [client.group for client in self.federation.clients]
        graph: Graph = self.experiment.graph.build(self.names, groups, self.experiment.seed, self.descriptions)
        return graph

    @property
    def description_bytes(self) -> int:
        """Bytes of a client's task description as a vector in fp32; 0 where the graph is not made of them."""
        asked = self._along_graph and getattr(self.experiment.graph, "source", None) == "description"
        return 4 * embed(self.base, ["."]).shape[1] if asked else 0

    @property
    def _along_graph(self) -> bool:
        return uses_graph(self.experiment.method)

    def initial_state(self) -> ServerState:
        """The state before round 0. Raises UserError when graph, method and data do not fit together."""
        clients = self.federation.clients
        training = self.experiment.training
        steps = max(training.steps_for(client.num_train) for client in clients)
        return self.method.init(
            Setting(
                self.layout,
                self.start(),
                len(clients),
                self.graph(),
                max_lr=training.lr,
                max_steps=steps,
                rounds=self.experiment.rounds,
            )
        )


def open_session(
    experiment: Experiment,
    recorded: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
    folder: Path | None = None,
    first: int = 0,
    clients: Federation | None = None,
) -> Session:
    """Build all of ``experiment``. ``folder``: its run folder, where there is one; ``recorded``: the environment recorded
    there, of which threads, the engine and the size of a pass are taken over; ``first``: the number of the first client;
    ``clients``: those known, where their data need not be read."""
    recorded = recorded or {}
    threads = recorded.get("threads") or experiment.engine.threads or usable_threads()
    torch.set_num_threads(threads)
    share_heap()
    federation = clients or make_federation(experiment.data, experiment.split, experiment.seed)
    base = load(
        experiment.model.name, experiment.model.source, experiment.model.dtype, experiment.model.device,
        experiment.model.trust_remote_code, experiment.model.quantization, experiment.model.revision,
    )  # fmt: skip
    training, prompt = experiment.training, experiment.prompt
    adapter: Adapter = experiment.adapter.on(base, experiment.seed)
    layout, dropout = adapter.layout, adapter.in_pass.dropout
    # A model knows no positions beyond its own: longer inputs are cut to what it can read.
    room = positions(base.model) - layout.virtual_tokens
    if room < 1:
        raise UserError(
            f"adapter.virtual_tokens={layout.virtual_tokens}: the model has {positions(base.model)} positions, which leaves"
            " none for text; take fewer"
        )
    today = recorded.get("prompt", {}).get("date") or Date.today().isoformat()
    encoder = prompt.encoder(base.tokenizer, room, base.stops, today)
    experiment = experiment.model_copy(update={"prompt": replace(prompt, date=encoder.wording.date)})
    log.info("%s", encoder.about)
    for caution in encoder.cautions:
        log.warning("%s", caution)
    if prompt.overlong == "drop":
        federation = without_overlong(federation, encoder)
    prove_prompts(federation, encoder)
    corpus = Corpus(federation, encoder, training.batch_size, training.local_steps, training.local_epochs, first)
    if folder is not None:
        corpus.recall(folder / TOKENS)
    truncated = {name: count for name, count in corpus.truncated().items() if count}
    if truncated:
        which = ", ".join(f"{name} ({count})" for name, count in truncated.items())
        log.warning("at most %d tokens an example: prompts cut for %s", encoder.max_length, which)
    prefix = experiment.engine.prefix != "off"
    if prefix and dropout:
        log.warning(
            "adapter.dropout=%g: the shared prefix is off, since sharing it would share one dropout mask", dropout
        )
        prefix = False
    common = partial(
        dict[str, Any], model=base.model, pad=base.tokenizer.pad_token_id, stops=encoder.stops,
        decode=encoder.answer, adapter=adapter.in_pass, corpus=corpus,
        training=training, seed=experiment.seed, progress=progress,
        checkpointing=experiment.engine.checkpointing,
    )  # fmt: skip
    if experiment.engine.checkpointing:
        check_gradients(base.model)  # refuses before the run begins
    batched = partial(
        BatchedEngine, tokens_per_pass=recorded.get("tokens_per_pass") or experiment.engine.tokens_per_pass, prefix=prefix,
        longest=_longest(corpus) + layout.virtual_tokens + experiment.evaluation.max_new_tokens,
        cuda_graphs=experiment.engine.cuda_graphs == "auto",
    )  # fmt: skip
    engine: BatchedEngine | ReferenceEngine | SeedsEngine
    engine = _engine(recorded.get("engine") or experiment.engine.name, batched, common)
    name, budget = ("batched", engine.budget) if isinstance(engine, BatchedEngine) else ("reference", None)
    if adapter.directions is not None:
        engine = without_gradients(engine, adapter.directions, corpus, training, experiment.seed)
    now = environment_of(base, federation, threads, name, prefix, budget, truncated, encoder)
    return Session(experiment, base, federation, corpus, adapter, engine, now)


def _engine(
    name: str, batched: Callable[..., BatchedEngine], common: Callable[[], dict[str, Any]]
) -> BatchedEngine | ReferenceEngine:  # fmt: skip
    """The engine called ``name``; under "auto" the batched one, where that can compute the model."""
    if name == "reference":
        return ReferenceEngine(**common())
    try:
        engine = batched(**common())
    except CannotPackError as error:
        if name != "auto":
            raise
        log.warning("engine.name=auto takes reference, one client at a time: %s", error.reason)
        return ReferenceEngine(**common())
    if not engine.carrier.way.decodes:
        log.info(
            "engine.name=batched: passes are %s; transformers answers, one prompt at a time", engine.carrier.way.kind
        )
    return engine


def _longest(corpus: Corpus) -> int:
    """Tokens of the longest sequence."""
    clients = range(corpus.first, corpus.first + corpus.num_clients)
    encoded = (item for number in clients for split in SPLITS for item in corpus.encoded(number, split))
    return max((len(item.tokens) for item in encoded), default=1)


@contextmanager
def enough_memory(experiment: Experiment) -> Iterator[None]:
    """Running out of memory where no client can be left out, as a fault that the user can mend."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"prompt.max_length={experiment.prompt.max_length}: out of memory while measuring; start a new run with less of it,"
            " or with a smaller evaluation.max_new_tokens"
        ) from None
