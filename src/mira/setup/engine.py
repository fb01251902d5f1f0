"""Choice and construction of an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mira.adapters.types import Adapter
from mira.config import Experiment
from mira.core.engine import Engine
from mira.core.example_privacy import ExamplePrivacy
from mira.data.corpus import Corpus
from mira.data.federation import SPLITS
from mira.data.text import Encoder
from mira.engine.attention.hook import CannotPackError
from mira.engine.batched import BatchedEngine
from mira.engine.budget import useful_tokens
from mira.engine.checkpoint import check_gradients
from mira.engine.reference import ReferenceEngine
from mira.engine.seeds import SeedsEngine, without_gradients
from mira.engine.spec import EngineSpec, Text
from mira.engine.spread import SpreadEngine
from mira.model import Base

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePlan:
    """The parts of an engine that is not built yet. ``taken_over``: the environment of a resumed run, whose engine and pass size
    apply again. ``progress``: called with the number of computed tokens. ``privacy``: train with DP-SGD."""

    experiment: Experiment
    base: Base
    adapter: Adapter
    encoder: Encoder
    corpus: Corpus
    taken_over: Mapping[str, Any]
    progress: Callable[[int], None]
    privacy: ExamplePrivacy | None = None

    @property
    def shares_prefix(self) -> bool:
        """True if the common prefix of a client's sequences is computed once. Dropout rules it out: the sequences would share one
        mask."""
        return self.experiment.engine.prefix != "off" and not self.adapter.in_pass.dropout

    def build(self) -> Engine:
        """Build the engine. Raises UserError if it cannot compute the model."""
        experiment = self.experiment
        if experiment.engine.checkpointing:
            check_gradients(self.base.model)  # raises before the run starts
        engine = self._with_gradients(self.taken_over.get("engine") or experiment.engine.name)
        if self.adapter.directions is None:
            return engine
        return without_gradients(engine, self.adapter.directions, self.corpus, experiment.training, experiment.seed)

    def recorded(self, engine: Engine) -> dict[str, Any]:
        """The entries of the environment about ``engine``."""
        if isinstance(engine, SpreadEngine):
            return engine.about
        inner = engine.inner if isinstance(engine, SeedsEngine) else engine
        batched = isinstance(inner, BatchedEngine)
        return {
            "engine": "batched" if batched else "reference",
            "tokens_per_pass": inner.budget if isinstance(inner, BatchedEngine) else None,
        }

    def full(self, engine: Engine) -> int | None:
        """The tokens of all clients in one step that keep ``engine`` busy; None: those of one client, as each is computed by
        itself."""
        if not isinstance(engine, BatchedEngine):
            return None
        useful = torch.get_num_threads() * useful_tokens(self.base.model.dtype)
        return engine.budget if self.base.model.device.type != "cpu" else min(engine.budget, useful)

    def _with_gradients(self, name: str) -> BatchedEngine | ReferenceEngine:
        """The engine called ``name``; "auto": the batched engine if it can compute the model, else the reference engine."""
        if name == "reference":
            return ReferenceEngine.of(self._spec())
        try:
            engine = self._batched()
        except CannotPackError as error:
            if name != "auto":
                raise
            log.warning("engine.name=auto: using 'reference', one client at a time: %s", error.reason)
            return ReferenceEngine.of(self._spec())
        if engine.fallback is not None:
            kind = engine.adapted.patched.kind
            log.info("engine.name=batched: passes are %s; transformers generates answers, one prompt at a time", kind)
        return engine

    def _batched(self) -> BatchedEngine:
        section = self.experiment.engine
        longest = self._longest() + self.adapter.layout.virtual_tokens + self.experiment.evaluation.max_new_tokens
        return BatchedEngine.of(
            self._spec(),
            tokens_per_pass=self.taken_over.get("tokens_per_pass") or section.tokens_per_pass,
            prefix=self.shares_prefix,
            longest=longest,
            cuda_graphs=section.cuda_graphs == "auto",
        )

    def _spec(self) -> EngineSpec:
        text = Text(self.base.tokenizer.pad_token_id, self.encoder.stops, self.encoder.answer)
        return EngineSpec(
            self.base.model, text, self.adapter.in_pass, self.corpus, self.experiment.training, self.experiment.seed,
            self.experiment.engine.checkpointing, self.progress, self.privacy,
        )  # fmt: skip

    def _longest(self) -> int:
        """Tokens of the longest sequence."""
        corpus = self.corpus
        clients = range(corpus.first, corpus.first + corpus.num_clients)
        encoded = (item for number in clients for split in SPLITS for item in corpus.encoded(number, split))
        return max((len(item.tokens) for item in encoded), default=1)
